"""Every training stops in good order when its whole process group is told to, and goes on exactly.

The command runs in a process group of its own, with loading processes, as under `timeout`, SLURM
or a terminal; signals come in the middle of the second and of the third step.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_restyle_training import make_psp

from utils.io import load_weights, save_torch

# The training is stopped in one folder and gone on with, and runs undisturbed in another.
PROGRAM = f"""
import os, signal, sys
sys.path[:] = {sys.path!r}
from conftest import load_script
from datasets import images_dataset
from training import coach_restyle_psp, moco, stylegan2_loop

name, straight, stopped, *flags = sys.argv[1:]
images_dataset._CACHE_LIMIT = 0    # else sets this small need no loading processes
script = load_script(name)
kind = {{'train_stylegan2_ada': stylegan2_loop.Trainer,
        'train_restyle_psp': coach_restyle_psp.Coach,
        'train_content_encoder': moco.MocoTrainer}}[name]

class Loading(stylegan2_loop.Trainer):
    def __init__(self, *args, **options):
        super().__init__(*args, **{{**options, 'workers': 2}})

if name == 'train_stylegan2_ada':
    script.Trainer = Loading    # its command loads in processes on GPUs only
folder = {{'train_stylegan2_ada': '--outdir', 'train_restyle_psp': '--exp_dir',
          'train_content_encoder': '--out_dir'}}[name]
assert script.main([folder, straight, *flags]) == 0
step, calls = kind.step, []
signals = {{2: signal.SIGTERM, 3: signal.SIGINT}}    # at these steps

def interrupted(trainer, *args):
    calls.append(1)
    if len(calls) in signals:
        os.killpg(0, signals[len(calls)])
    return step(trainer, *args)

def resumed():
    if name == 'train_stylegan2_ada':
        return ['--resume', os.path.join(stopped, *os.listdir(stopped))]
    return [folder, stopped, *flags, '--resume']

kind.step = interrupted
assert script.main([folder, stopped, *flags]) == 128 + signal.SIGTERM and len(calls) == 2
assert script.main(resumed()) == 128 + signal.SIGINT and len(calls) == 3
assert script.main(resumed()) == 0 and len(calls) == 4
"""

FLAGS = {
    'train_stylegan2_ada': [
        '--data',
        '{images}',
        '--cfg=small',
        '--batch=4',
        '--aug=noaug',
        '--kimg=0.016',
        '--device=cpu',
        '--cbase=256',
        '--cmax=8',
    ],
    'train_restyle_psp': [
        '--train_path',
        '{images}',
        '--test_path',
        '{images}',
        '--stylegan_weights',
        '{generator}',
        '--encoder_type',
        'LightEncoder',
        '--light_width',
        '8',
        '--encoder_size',
        '32',
        '--l2_lambda',
        '1',
        '--batch_size',
        '4',
        '--max_steps',
        '4',
        '--n_iters_per_batch',
        '2',
        '--workers',
        '2',
        '--test_workers',
        '1',
        '--device',
        'cpu',
    ],
    'train_content_encoder': [
        '--data',
        '{images}',
        '--arch=resnet18',
        '--small_stem',
        '--input_size=32',
        '--batch_size=4',
        '--max_steps=4',
        '--workers=2',
        '--device=cpu',
    ],
}
STATES = {
    'train_stylegan2_ada': '*/network-snapshot-00000.016.pt',
    'train_restyle_psp': 'checkpoints/state_4.pt',
    'train_content_encoder': 'checkpoints/state_4.pt',
}


@pytest.fixture(scope='module')
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp('inputs')
    rng = np.random.default_rng(0)
    (root / 'images').mkdir()
    for i in range(8):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / 'images' / f'{i}.png')
    psp = make_psp()
    save_torch(
        root / 'generator.pt', {'g_ema': psp.decoder.state_dict(), 'latent_avg': psp.latent_avg[0]}
    )
    return {'images': str(root / 'images'), 'generator': str(root / 'generator.pt')}


def assert_same(a: object, b: object, where: str = '') -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f'{where}/{key}')
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b or a != a, where


@pytest.mark.parametrize('name', sorted(FLAGS))
def test_stops_in_good_order_and_goes_on_exactly(
    tmp_path: Path, inputs: dict[str, str], name: str
) -> None:
    flags = [flag.format(**inputs) for flag in FLAGS[name]]
    done = subprocess.run(
        [
            sys.executable,
            '-c',
            PROGRAM,
            name,
            str(tmp_path / 'straight'),
            str(tmp_path / 'stopped'),
            *flags,
        ],
        start_new_session=True,
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg'},
    )
    assert done.returncode == 0, done.stderr
    states = [
        load_weights(path)
        for folder in ('straight', 'stopped')
        for path in (tmp_path / folder).glob(STATES[name])
    ]
    assert len(states) == 2
    assert_same(*states)
