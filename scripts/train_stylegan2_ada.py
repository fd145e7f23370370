"""Trains StyleGAN2-ADA on an archive of equal square images.

    python scripts/train_stylegan2_ada.py --outdir=runs/gan --data=fundus256.zip --gpus=1 \\
        --cfg=paper256 --mirror=1 --kimg=5000

Every run gets its own numbered folder in --outdir with snapshots (network-snapshot-<kimg>.pt,
which the other scripts read), sample grids, stats.jsonl, TensorBoard logs and curves.png.
"""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from datasets.archive import ImageArchive
from training.augment import PIPES
from training.run import finish
from training.stylegan2_config import TrainConfig, make_config
from training.stylegan2_growing import grow
from training.stylegan2_networks import export_inference
from training.stylegan2_options import (
    SETTINGS,
    TICK_KIMG,
    add_options,
    check_options,
    given_flags,
    resolve_augmentation,
    resumed_options,
)
from training.stylegan2_resume import Start, check_flags, load_start, read_start, resumed_config
from training.stylegan2_run import GeneratorTraining, Metric, generator_run
from utils import cli, distributed
from utils.errors import UserError
from utils.io import sha256_file
from utils.logs import setup_logging
from utils.precision import allow_tf32
from utils.runs import add_continuation, hold_run, run_record, start_run
from utils.signals import start_processes, stop_on_signal

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    return add_options(cli.parser_of(__doc__))


def run_name(opts: argparse.Namespace, batch: int) -> str:
    """What tells runs of one folder apart: the data, the configuration, and what is unusual."""
    parts = [
        opts.data.stem,
        'mirror' if opts.mirror else None,
        f'subset{opts.subset}' if opts.subset else None,
        opts.cfg,
        f'batch{batch}',
        f'gamma{opts.gamma:g}' if opts.gamma is not None else None,
        None if opts.discriminator == 'stylegan2' else opts.discriminator,
        None if opts.aug == 'ada' else opts.aug,
        None if opts.augpipe == 'bgc' else opts.augpipe,
        'resume' if opts.resume else None,
        'grow' if opts.grow else None,
        f'freezed{opts.freezed}' if opts.freezed else None,
    ]
    return '-'.join(p for p in parts if p)


def new_run_dir(outdir: Path, name: str) -> Path:
    numbers = [
        int(m.group(1))
        for p in (outdir.iterdir() if outdir.is_dir() else [])
        if (m := re.match(r'(\d{5})-', p.name))
    ]
    return outdir / f'{max(numbers, default=-1) + 1:05d}-{name}'


def build_config(
    opts: argparse.Namespace, argv: Sequence[str], start: Start, size: int, world: int
) -> TrainConfig:
    """The configuration of the flags, or of the snapshot that is gone on from."""
    try:
        if start.exact:
            given = given_flags(build_parser(), argv)
            return resumed_config(
                start.weights['config'],
                world,
                kimg=given.get('kimg'),
                batch_gpu=given.get('batch_gpu'),
            )
        return make_config(
            opts.cfg,
            size,
            world,
            kimg=opts.kimg,
            batch=opts.batch,
            batch_gpu=opts.batch_gpu,
            gamma=opts.gamma,
            pl_weight=opts.pl_weight,
            n_mlp=opts.map_depth,
            freezed=opts.freezed,
            use_noise=opts.use_noise,
            cbase=opts.cbase,
            cmax=opts.cmax,
            discriminator=opts.discriminator,
            d_lr=opts.d_lr,
        )
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def check_data(
    dataset: ImageArchive, config: TrainConfig, start: Start, opts: argparse.Namespace
) -> None:
    """UserError when there are too few pictures, or others than the training had so far."""
    if len(dataset) < config.batch:
        raise UserError(
            f'{opts.data} holds {len(dataset)} images, fewer than one batch of '
            f'{config.batch}; lower --batch or add images'
        )
    had = start.settings().get('images')
    if dataset.resolution != config.size or had not in (None, dataset.digest()):
        raise UserError(
            f'--data {opts.data}: other pictures than {start.path} was trained with; '
            'give those, or begin anew from its networks: --resume FILE --transfer=1'
        )


def build_metric(opts: argparse.Namespace, dataset: ImageArchive) -> Metric | None:
    """The function that measures snapshots, or None for --metrics=none."""
    if opts.metrics == 'none':
        return None
    from evaluation.snapshots import training_metric

    names = opts.metrics.split(',')
    return training_metric(
        names,
        dataset,
        n_images=opts.metric_images,
        content_weights=opts.metric_network,
        inception_weights=opts.inception_weights,
    )


def build_training(
    opts: argparse.Namespace,
    dataset: ImageArchive,
    config: TrainConfig,
    device: torch.device,
    precision: str,
) -> GeneratorTraining:
    """The networks and their training, with the settings that a resumed run takes over."""
    torch.backends.cudnn.benchmark = not opts.nobench
    allow_tf32(opts.allow_tf32)
    settings = {name: getattr(opts, name) for name in SETTINGS}
    return GeneratorTraining(
        dataset,
        config,
        device=device,
        seed=opts.seed,
        augment=opts.aug,
        augment_names=PIPES[opts.augpipe],
        augment_p=opts.p or 0.0,
        ada_target=opts.target,
        precision=None if precision == 'fp32' else precision,
        workers=opts.workers if device.type == 'cuda' else 0,
        settings={**settings, 'images': dataset.digest()},
        metric=build_metric(opts, dataset),
    )


def start_folder(
    opts: argparse.Namespace, argv: Sequence[str], start: Start, resolved: dict
) -> Path:
    """The run folder, with this start in its record; the first process holds it from here on."""
    run_dir = (
        opts.resume
        if start.same_folder
        else distributed.broadcast_object(
            new_run_dir(opts.outdir, run_name(opts, resolved['batch']))
        )
    )
    if distributed.is_main():
        if start.same_folder:
            hold_run(run_dir)
            add_continuation(run_dir, argv, from_snapshot=start.path.name)
        else:
            inputs = {'resume': opts.resume, 'grow': opts.grow}
            if opts.data.is_file():
                inputs['data'] = opts.data
            start_run(run_dir, run_record(resolved, inputs=inputs, seed=opts.seed))
        setup_logging(run_dir / 'log.txt')
        log.info('run folder %s', run_dir)
        if start.same_folder:
            log.info('going on from %s', start.path.name)
    return run_dir


def resolve(opts: argparse.Namespace, argv: Sequence[str], start: Start) -> None:
    """Fills in what the snapshot to go on from, or else the defaults, say of the settings."""
    check_flags(start, given_flags(build_parser(), argv))
    for name in (*SETTINGS, 'seed'):
        setattr(opts, name, start.settings().get(name, getattr(opts, name)))
    opts.augpipe = opts.augpipe or 'bgc'
    opts.target = 0.6 if opts.target is None else opts.target
    opts.snap = opts.snap or (4 if opts.cfg == 'small' else 50)


def resolved_options(
    opts: argparse.Namespace,
    argv: Sequence[str],
    config: TrainConfig,
    n_images: int,
    precision: str,
) -> dict:
    """What the record says of the options, and --dry-run prints."""
    return {
        'flags': argv,
        **config.to_dict(),
        'data': opts.data,
        'n_images': n_images,
        'precision': precision,
        **{name: getattr(opts, name) for name in SETTINGS},
        'seed': opts.seed,
        'snap': opts.snap,
        'metrics': opts.metrics,
        'world_size': max(opts.gpus, distributed.world_size()),
    }


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    opts = build_parser().parse_args(argv)
    resolve_augmentation(opts)
    check_options(opts)
    if opts.resume is not None and opts.resume.is_dir():
        opts = resumed_options(build_parser(), opts, argv)
        resolve_augmentation(opts)
    device = cli.resolve_device(opts.device)
    if opts.gpus > 1 and 'WORLD_SIZE' not in os.environ and not opts.dry_run:
        if device.type == 'cuda' and opts.gpus > torch.cuda.device_count():
            raise UserError(f'--gpus {opts.gpus}: only {torch.cuda.device_count()} GPU(s) here')
        return start_processes(opts.gpus, __file__, argv)
    setup_logging()
    device = distributed.init(device)
    if not distributed.is_main():
        setup_logging(level=logging.WARNING)
    return train(opts, argv, device)


def train(opts: argparse.Namespace, argv: Sequence[str], device: torch.device) -> int:
    """Trains with resolved flags, exports the generator, and returns the exit code."""
    on_gpu = device.type == 'cuda'
    start = read_start(opts.resume, transfer=opts.transfer, freezed=opts.freezed)
    resolve(opts, argv, start)
    dataset = ImageArchive(
        opts.data, mirror=opts.mirror, subset=opts.subset, seed=opts.seed, cache=not on_gpu
    )
    world = max(opts.gpus, distributed.world_size())
    config = build_config(opts, argv, start, dataset.resolution, world)
    check_data(dataset, config, start, opts)
    opts.discriminator = config.discriminator
    if config.batch_gpu == 1:
        log.warning(
            'one image per pass: the discriminator sees no statistics over a group; give a '
            'larger --batch or --batch-gpu'
        )
    precision = 'fp32' if opts.fp32 else opts.precision or ('fp16' if on_gpu else 'fp32')
    resolved = resolved_options(opts, argv, config, len(dataset), precision)
    if opts.dry_run:
        build_metric(opts, dataset)  # complains of what is missing
        shown = {k: str(v) if isinstance(v, Path) else v for k, v in resolved.items()}
        print(json.dumps(shown, indent=2))
        return 0
    training = build_training(opts, dataset, config, device, precision)
    load_start(training, start)
    if opts.grow and not start.weights:
        grow(training, opts.grow)
        log.info('grown from %s', opts.grow)
    run_dir = start_folder(opts, argv, start, resolved)
    log.info(
        '%d images of %d px, batch %d, %s, %s, %g kimg',
        len(dataset),
        config.size,
        config.batch,
        precision,
        device,
        config.kimg,
    )
    return run_to_the_end(training, run_dir, opts)


def run_to_the_end(training: GeneratorTraining, run_dir: Path, opts: argparse.Namespace) -> int:
    """Trains, exports the generator, and returns the exit code."""
    kimg = training.config.kimg
    run = generator_run(
        training,
        run_dir,
        kimg=kimg,
        snapshot_kimg=opts.snap * TICK_KIMG,
        tick_kimg=min(TICK_KIMG, kimg / 10),
    )
    with stop_on_signal() as signalled:
        done = run.to_the_end(requested=signalled, max_minutes=opts.max_minutes)
    if distributed.is_main():
        if not done:
            log.info('--resume=%s goes on', run_dir)
        export_inference(run.checkpoints.path(training.progress), run_dir / 'generator.pt')
        log.info(
            'generator for the other scripts: %s (sha256 %s)',
            run_dir / 'generator.pt',
            sha256_file(run_dir / 'generator.pt')[:12],
        )
    return finish(signalled)


if __name__ == '__main__':
    cli.run(main)
