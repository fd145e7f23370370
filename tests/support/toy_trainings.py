"""The trainings of the project as commands of toy size, and processes in which they are stopped."""

import importlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytorch_optimizer  # noqa: F401, slow to import in every process, like the next two
import torch
import torch._dynamo
from fresh_process import start_fresh
from golden_fill import fill_state_dict
from PIL import Image
from torch.utils.tensorboard import SummaryWriter  # noqa: F401
from two_processes import become_rank, free_port

from classification import main as grader_command
from classification import train as grader_training
from datasets import pictures
from MIA import MIA_train
from models.stylegan2 import Generator
from scripts import train_content_encoder, train_restyle_e4e, train_restyle_psp, train_stylegan2_ada
from training import run as training_run
from training import stylegan2_loop
from training.run import TrainingRun
from training.stylegan2_run import GeneratorTraining
from utils.io import save_torch

STEPS = 4
_HANGS_AFTER = 1800  # seconds, of which a busy machine needs many


class Toy(NamedTuple):
    """A command of STEPS steps.

    states, result: where its states are, below its folder, and what is left of the last step.
    interval: steps between two states. again: the flags that go on, of a folder. loads: it has
    loading processes. alone: it has one process by design.
    """

    main: Callable[[Sequence[str]], int]
    flags: Sequence[str]
    folder: str
    states: str
    result: str
    interval: int
    again: Callable[[Path], Sequence[str]]
    loads: bool = True
    alone: bool = False


def _restyle(main: Callable, encoder: str, *more: str) -> Toy:
    flags = '--train_path={images} --test_path={images} --stylegan_weights={generator}'
    flags += f' --encoder_type={encoder} --light_width=8 --encoder_size=32 --l2_lambda=1'
    flags += f' --batch_size=4 --max_steps={STEPS} --val_interval=2 --n_iters_per_batch=2'
    return Toy(
        main,
        [*flags.split(), *more],
        '--exp_dir',
        'checkpoints/state_*.pt',
        f'checkpoints/state_{STEPS}.pt',
        2,
        lambda folder: ['--resume'],
    )


def toys() -> dict[str, Toy]:
    """The five trainings, and the variant of one, by name."""
    gan = '--data={images} --cfg=small --batch=4 --aug=noaug --snap=0.002 --cbase=256 --cmax=8'
    moco = '--data={images} --arch=resnet18 --small_stem --input_size=32 --batch_size=4'
    grader = '-config={grader} --seed=1 --labels_train={labels} --baseline=real'
    grader += ' --labels_test={test_labels} --test_images_path={images}'
    pairs = '--train_df_path={root} --train_image_path={images} --centroid_image_path={centroids}'
    pairs += ' --samek=2 --image_size=32 --centroid_type=centroid_ours'
    return {
        'generator': Toy(
            train_stylegan2_ada.main,
            [*gan.split(), f'--kimg={STEPS * 0.004}'],
            '--outdir',
            '*/network-snapshot-*.pt',
            f'*/network-snapshot-00000.{STEPS * 4:03d}.pt',
            2,
            lambda folder: ['--resume', str(next(folder.iterdir()))],
        ),
        'restyle': _restyle(train_restyle_psp.main, 'LightEncoder'),
        'e4e': _restyle(
            train_restyle_e4e.main,
            'LightProgressiveEncoder',
            '--w_discriminator_lambda=0.1',
            '--use_w_pool',
            '--progressive_start=1',
            '--progressive_step_every=1',
        ),
        'content': Toy(
            train_content_encoder.main,
            [*moco.split(), f'--max_steps={STEPS}', '--save_interval=2'],
            '--out_dir',
            'checkpoints/state_*.pt',
            f'checkpoints/state_{STEPS}.pt',
            2,
            lambda folder: ['--resume'],
        ),
        'grader': Toy(
            grader_command.main,
            [*grader.split(), f'--epochs={STEPS}'],
            '--out_dir',
            'seed_1/checkpoint.pt',
            'seed_1/*_weights.pt',
            1,
            lambda folder: [],
            loads=False,
            alone=True,
        ),
        'pairs': Toy(
            MIA_train.main,
            [*pairs.split(), f'--epochs={STEPS}'],
            '--out_dir',
            'centroid_ours_aptos_k2/state_*.pt',
            f'centroid_ours_aptos_k2/state_{STEPS}.pt',
            1,
            lambda folder: [],
            loads=False,
            alone=True,
        ),
    }


def make_inputs(root: Path) -> dict[str, str]:
    """Photographs, tables and a generator; the values of the braces in the flags."""
    rng, names = np.random.default_rng(0), [f'p{i}' for i in range(12)]
    (root / 'centroids').mkdir(parents=True)
    (root / 'images').mkdir()
    for i, name in enumerate(names):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / 'images' / f'{name}.png')
        if i % 2 == 0:
            Image.fromarray(255 - pixels).save(root / 'centroids' / f'c{i // 2}.png')
    grades = [i % 2 * 3 for i in range(12)]
    table = pd.DataFrame({'id_code': names, 'diagnosis': grades, 'patient_id': names})
    table[:8].to_csv(root / 'labels.csv', index=False)
    table[8:].to_csv(root / 'test.csv', index=False)
    groups = [i // 2 + 1 for i in range(12)]
    release = [f'c{i // 2}' for i in range(12)]
    pd.DataFrame(
        {'id_code': names, 'centers': groups, 'count_centers': 2, 'release_name': release}
    ).to_csv(root / 'groups.csv', index=False)
    settings = {'arch': 'resnet18', 'small_stem': True, 'image_size': 32, 'batch_size': 4}
    (root / 'grader.yaml').write_text(json.dumps(settings))
    decoder = Generator(32, style_dim=16, n_mlp=2, channels={4: 8, 8: 8, 16: 8, 32: 8})
    decoder.load_state_dict(fill_state_dict(decoder.state_dict(), equalized=True))
    weights = {'g_ema': decoder.state_dict(), 'latent_avg': torch.zeros(16)}
    save_torch(root / 'generator.pt', weights)
    return {
        'root': str(root),
        'images': str(root / 'images'),
        'labels': str(root / 'labels.csv'),
        'test_labels': str(root / 'test.csv'),
        'centroids': str(root / 'centroids'),
        'grader': str(root / 'grader.yaml'),
        'generator': str(root / 'generator.pt'),
    }


class TinyNet(torch.nn.Module):
    """Stands in for a ResNet, whose states would take seconds to write."""

    feature_dim = 512

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 64, 4, 4, bias=False)
        self.bn = torch.nn.BatchNorm2d(64)
        self.head = torch.nn.Linear(64, 512)
        self.fc = torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.head(self.bn(self.conv1(x)).relu().mean((2, 3))))


class Stop(NamedTuple):
    """The signal that the whole process group gets amid the step after `done` steps."""

    number: signal.Signals
    done: int


def play(
    name: str,
    flags: Sequence[str],
    *,
    workers: int = 0,
    processes: int = 1,
    stop: Stop | None = None,
) -> int:
    """Runs a command in a fresh process (group); its exit code, -9 when it was killed."""
    process = start_fresh(_lead, name, list(flags), workers, processes, stop)
    process.join(_HANGS_AFTER)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        raise TimeoutError(f'{name} hangs')
    return process.exitcode


def _lead(name: str, flags: list[str], workers: int, processes: int, stop: Stop | None) -> None:
    os.setsid()
    if processes == 1:
        sys.exit(_work(name, flags, workers, stop))
    port = free_port()
    fork = multiprocessing.get_context('fork')
    ranks = [
        fork.Process(
            target=_join, args=(rank, processes, port, name, flags, workers, stop), daemon=False
        )
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for rank in ranks:
        rank.join()
    sys.exit(max(abs(rank.exitcode) for rank in ranks))


def _join(rank: int, world: int, port: int, *arguments: Any) -> None:
    become_rank(rank, world, port)
    sys.exit(_work(*arguments))


def _work(name: str, flags: list[str], workers: int, stop: Stop | None) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    toy = toys()[name]
    grader_training._SAVE_SECONDS = 0  # else no state is written in so short a training
    # What takes longer than the steps and is looked at by other tests.
    training_run.plot_curves = lambda *_, **__: None
    stylegan2_loop._MEAN_LATENT_SAMPLES = 64
    for module in ('classification.grader', 'evaluation.attacks.pairs', 'training.moco'):
        importlib.import_module(module).build_resnet = TinyNet
    if toy.loads:
        flags = [*flags, f'--workers={workers}'] if name != 'generator' else flags
        _load_in_processes(workers)
    if stop is not None:
        _stop_amid_a_step(stop)
    return toy.main([*flags, '--device=cpu'])


def _load_in_processes(workers: int) -> None:
    """Also where sets are small, and for the generator on a CPU."""
    if workers:
        pictures._CACHE_LIMIT = 0

    def training(*arguments: Any, **options: Any) -> GeneratorTraining:
        return GeneratorTraining(*arguments, **{**options, 'workers': workers, 'n_grid': 1})

    train_stylegan2_ada.GeneratorTraining = training


def _stop_amid_a_step(stop: Stop) -> None:
    to_the_end = TrainingRun.to_the_end

    def stopped(run: TrainingRun, **options: Any) -> bool:
        training = run.training
        advance = training.advance

        def interrupted() -> dict:
            first = os.environ.get('RANK', '0') == '0'
            if first and training.progress // training.stride == stop.done:
                os.killpg(0, stop.number)
            return advance()

        training.advance = interrupted
        return to_the_end(run, **options)

    TrainingRun.to_the_end = stopped
