"""Trains the ReStyle-pSp encoder that finds the latents of photographs.

    python scripts/train_restyle_psp.py --dataset_type=aptos_encode \\
        --encoder_type=ResNetBackboneEncoder --exp_dir=runs/restyle --output_size=512 \\
        --workers=8 --batch_size=8 --test_batch_size=8 --test_workers=8 --val_interval=5000 \\
        --save_interval=10000 --start_from_latent_avg --lpips_lambda=0.8 --l2_lambda=1 \\
        --moco_lambda=0.5 --w_norm_lambda=0 --id_lambda=0 --input_nc=6 --n_iters_per_batch=5 \\
        --stylegan_weights=runs/gan/generator.pt

A small run on a CPU:

    python scripts/train_restyle_psp.py --exp_dir=runs/restyle64 --train_path=train/ \\
        --test_path=test/ --stylegan_weights=generator.pt --encoder_type=LightEncoder \\
        --encoder_size=64 --l2_lambda=1 --amp=bf16 --max_steps=5000

Several processes: torchrun --nproc_per_node=N scripts/train_restyle_psp.py ... --batch_size counts
the images of a step over all of them. The same command with --resume goes on where a run stopped.

In --exp_dir: checkpoints/best_model.pt and iteration_<step>.pt (for the other scripts),
checkpoints/state_<step>.pt (for --resume), avg_image.png, logs/ (TensorBoard, sample sheets),
stats.jsonl and curves.png with the losses after every refinement.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import logging

import torch
from torch import nn

from configs.data_configs import DATASETS
from configs.paths_config import model_paths
from criteria.w_norm import latent_norm
from datasets.pictures import Pictures
from models.encoders import (
    ENCODERS,
    LiteEncoder,
    build_encoder,
    init_from_lite0,
    init_from_resnet34,
    load_resnet34,
)
from models.features.pretrained import weight_file
from models.psp import PSP, psp_from_checkpoint
from models.stylegan2 import load_generator
from training.coach_restyle_psp import Coach, encoder_run
from training.reconstruction import ContentTerm, L2Term, LpipsTerm, Term
from training.restyle_options import FREE, PLACES, add_options, check_options, coach_config
from training.run import finish, open_folder
from utils import cli, distributed
from utils.errors import UserError
from utils.io import load_weights
from utils.logs import setup_logging
from utils.runs import run_record
from utils.seeds import seed_everything, torch_generator
from utils.signals import stop_on_signal

log = logging.getLogger(__name__)

DEFAULT_ENCODER = 'ResNetBackboneEncoder'


def build_parser(
    doc: str = __doc__, encoders: Iterable[str] = ENCODERS, default_encoder: str = DEFAULT_ENCODER
) -> argparse.ArgumentParser:
    """The flags of an encoder training; doc: what its script says of itself."""
    p = cli.parser_of(doc)
    add_options(p, encoders, default_encoder, sorted(DATASETS))
    return p


def data_roots(opts: argparse.Namespace) -> list[Path]:
    """(training, validation) paths from the flags or the entry of --dataset_type."""
    entry = DATASETS[opts.dataset_type]
    roots = []
    for part, given in (('train', opts.train_path), ('test', opts.test_path)):
        source, target = entry[f'{part}_source_root'], entry[f'{part}_target_root']
        if given is None and source != target:
            raise UserError(
                f'{opts.dataset_type}: {part}_source_root and {part}_target_root '
                'differ; the encoder is trained to draw what it sees'
            )
        if given is None and source is None:
            raise UserError(
                f'no {part} photographs: give --{part}_path, or set the path of '
                f'{opts.dataset_type} in configs/paths_config.py'
            )
        roots.append(Path(given or source))
    return roots


def build_psp(opts: argparse.Namespace, default_encoder: str) -> PSP:
    """Networks from --checkpoint_path or new ones around --stylegan_weights."""
    if opts.checkpoint_path:
        checkpoint = load_weights(opts.checkpoint_path, what='ReStyle-pSp checkpoint')
        psp = psp_from_checkpoint(checkpoint, source=str(opts.checkpoint_path))
        name = type(psp.encoder).__name__
        for flag, given, found in (
            ('encoder_type', opts.encoder_type, name),
            ('encoder_size', opts.encoder_size, psp.input_size),
        ):
            if given not in (None, found):
                raise UserError(
                    f'--{flag} {given}: the encoder in {opts.checkpoint_path} has {found}'
                )
        check_size(opts, psp.decoder.size, opts.checkpoint_path)
        return psp
    decoder, latent_avg = load_generator(opts.stylegan_weights)
    check_size(opts, decoder.size, opts.stylegan_weights)
    seed_everything(opts.seed, 'encoder')
    name = opts.encoder_type or default_encoder
    options = {'width': opts.light_width} if name.startswith('Light') else {}
    try:
        encoder = build_encoder(
            name,
            n_styles=decoder.n_latent,
            style_dim=decoder.style_dim,
            input_size=opts.encoder_size or 256,
            **options,
        )
    except ValueError as error:
        raise UserError(f'--encoder_size: {error}') from error
    start_from_imagenet(encoder, opts)
    if latent_avg is None:
        latent_avg = decoder.mean_latent()
    return PSP(encoder, decoder, latent_avg, opts.encoder_size or 256)


def configured_path(name: str) -> Path:
    """Where configs/paths_config.py says the file of a network is."""
    return Path(model_paths[name] or name)


def check_size(opts: argparse.Namespace, size: int, path: Path) -> None:
    if opts.output_size not in (None, size):
        raise UserError(
            f'--output_size {opts.output_size}: the generator in {path} makes {size} px'
        )


def start_from_imagenet(encoder: nn.Module, opts: argparse.Namespace) -> None:
    if isinstance(encoder, LiteEncoder):
        init_from_lite0(encoder, generator=torch_generator(opts.seed, 'stem'))
        return
    configured = configured_path('resnet34')
    if opts.resnet34_weights is None and 'ResNet' in type(encoder).__name__:
        if configured.is_file():
            opts.resnet34_weights = configured
        else:
            log.warning('no ImageNet weights (--resnet34_weights); the encoder starts at random')
    if opts.resnet34_weights is not None:
        init_from_resnet34(
            encoder,
            load_resnet34(opts.resnet34_weights),
            generator=torch_generator(opts.seed, 'stem'),
            source=opts.resnet34_weights,
        )


def build_losses(opts: argparse.Namespace, device: torch.device) -> dict[str, tuple[Term, float]]:
    """{name: (term, weight)} of the reconstruction losses that are on."""
    losses: dict[str, tuple[Term, float]] = {}
    if opts.l2_lambda:
        losses['l2'] = L2Term(), opts.l2_lambda
    if opts.lpips_lambda:
        losses['lpips'] = LpipsTerm(opts.lpips_weights, device), opts.lpips_lambda
    if opts.moco_lambda:
        losses['moco'] = ContentTerm(opts.content_weights, device), opts.moco_lambda
    return losses


def used(weights: Path, weight: float) -> Path | None:
    """The file of a loss's network, None when the loss is off."""
    return weight_file(weights) if weight else None


def build_coach(
    opts: argparse.Namespace,
    make_coach: Callable[..., Coach],
    default_encoder: str,
    device: torch.device,
) -> Coach:
    """The networks, pictures and losses of the flags; fills in what those left open."""
    train_path, test_path = data_roots(opts)
    opts.lpips_weights = opts.lpips_weights or configured_path('alexnet')
    opts.content_weights = opts.content_weights or configured_path('moco')
    losses = build_losses(opts, device)
    psp = build_psp(opts, default_encoder)
    opts.encoder_type, opts.encoder_size = type(psp.encoder).__name__, psp.input_size
    opts.output_size = psp.decoder.size
    if opts.mirror is None:
        opts.mirror = DATASETS[opts.dataset_type]['transforms'].mirror
    train_set = Pictures(train_path, psp.input_size)
    test_set = Pictures(test_path, psp.input_size)
    penalty = None
    if opts.w_norm_lambda:
        average = psp.latent_avg.to(device) if opts.start_from_latent_avg else None
        penalty = latent_norm(average), opts.w_norm_lambda
    return make_coach(
        psp,
        train_set,
        test_set,
        coach_config(opts),
        losses=losses,
        device=device,
        latent_penalty=penalty,
        meta={k: v for k, v in vars(opts).items() if k not in PLACES},
        workers=0 if train_set.cached else opts.workers,
        test_workers=0 if test_set.cached else opts.test_workers,
    )


def record_of(opts: argparse.Namespace, coach: Coach) -> dict:
    """The run record: options, and digests of photographs and weights."""
    sets: dict[str, Any] = {'train_images': coach.train_set, 'test_images': coach.test_set}
    described = {name: f'{len(part)} images, {part.digest()}' for name, part in sets.items()}
    return run_record(
        {**vars(opts), **described},
        inputs={
            'stylegan_weights': None if opts.checkpoint_path else opts.stylegan_weights,
            'checkpoint_path': opts.checkpoint_path,
            'resnet34_weights': opts.resnet34_weights,
            'lpips_weights': used(opts.lpips_weights, opts.lpips_lambda),
            'content_weights': used(opts.content_weights, opts.moco_lambda),
        },
        seed=opts.seed,
    )


def train(
    opts: argparse.Namespace,
    make_coach: Callable[..., Coach] = Coach,
    default_encoder: str = DEFAULT_ENCODER,
) -> int:
    """Runs the training of `opts` with the Coach that `make_coach` builds; the exit code."""
    setup_logging()
    check_options(opts)
    device = distributed.init(cli.resolve_device(opts.device))
    coach = build_coach(opts, make_coach, default_encoder, device)
    open_folder(
        opts.exp_dir,
        partial(record_of, opts, coach),
        resume=opts.resume is not None,
        free_options=FREE,
        resume_flag='--resume',
    )
    run = encoder_run(coach, opts.exp_dir, keep_states=opts.keep_states)
    if opts.resume is not None:
        run.resume(None if opts.resume == 'newest' else Path(opts.resume))
    log.info(
        '%d training and %d validation images of %d px, generator %d px, %s, batch %d on %d '
        'process(es), %s',
        coach.n_train,
        coach.n_test,
        opts.encoder_size,
        opts.output_size,
        opts.encoder_type,
        opts.batch_size,
        distributed.world_size(),
        device,
    )
    with stop_on_signal() as signalled:
        done = run.to_the_end(requested=signalled, max_minutes=opts.max_minutes)
    log.info(
        '%s after %d steps; checkpoints in %s',
        'finished' if done else 'stopped',
        coach.step_count,
        opts.exp_dir / 'checkpoints',
    )
    return finish(signalled)


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    return train(build_parser().parse_args(argv))


if __name__ == '__main__':
    cli.run(main)
