"""Trains StyleGAN2-ADA on an archive of equal square images.

    python scripts/train_stylegan2_ada.py --outdir=runs/gan --data=fundus256.zip --gpus=1 \\
        --cfg=paper256 --mirror=1 --kimg=5000

Every run gets its own numbered folder in --outdir with snapshots (network-snapshot-<kimg>.pt,
which the other scripts read), sample grids, stats.jsonl, TensorBoard logs and curves.png.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
import logging

import torch

from datasets.archive import ImageArchive
from training.adversarial import LOSSES
from training.augment import MAX_STRENGTH, PIPES
from training.run import Stopping, finish
from training.stylegan2_config import PRESETS, TrainConfig, make_config
from training.stylegan2_growing import grow
from training.stylegan2_loop import Trainer, export_inference, train
from training.stylegan2_resume import (
    Start,
    check_flags,
    flag_of,
    load_start,
    read_start,
    resumed_config,
)
from utils import distributed
from utils.cli import (
    boolean,
    fraction,
    nonnegative_float,
    nonnegative_int,
    parser,
    positive_float,
    positive_int,
    resolve_device,
    run,
)
from utils.errors import UserError
from utils.io import sha256_file
from utils.logs import setup_logging
from utils.runs import RECORD_NAME, add_continuation, hold_run, run_record, start_run
from utils.signals import run_launcher, stop_on_signal

log = logging.getLogger(__name__)

TICK_KIMG = 4
Metric = Callable[[torch.nn.Module, torch.device], dict[str, float]]
_UNNAMED = object()
# What shapes a run beside its TrainConfig and seed, and is kept in snapshots.
_SETTINGS = ('cfg', 'aug', 'augpipe', 'p', 'target', 'mirror', 'subset')

# Flags that may change when a run folder is gone on in: they do not touch what is learnt, or say
# how long.
_FREE = (
    'outdir',
    'resume',
    'kimg',
    'snap',
    'metrics',
    'metric_network',
    'inception_weights',
    'metric_images',
    'device',
    'gpus',
    'batch_gpu',
    'precision',
    'fp32',
    'nhwc',
    'nobench',
    'allow_tf32',
    'workers',
    'max_minutes',
    'dry_run',
    'data',
)


def build_parser() -> argparse.ArgumentParser:
    p = parser(__doc__.splitlines()[0], epilog='\n'.join(__doc__.splitlines()[1:]))
    g = p.add_argument_group('required, except with --resume RUN')
    g.add_argument('--outdir', type=Path, metavar='DIR', help='where the numbered run folders go')
    g.add_argument(
        '--data', type=Path, metavar='ZIP|DIR', help='archive made by scripts/dataset_tool.py'
    )
    g = p.add_argument_group('general')
    g.add_argument(
        '--gpus',
        type=positive_int,
        default=1,
        metavar='INT',
        help='processes on this machine, one per GPU (gloo processes on the CPU)',
    )
    g.add_argument(
        '--snap',
        type=positive_float,
        metavar='TICKS',
        help=f'ticks of {TICK_KIMG} kimg between snapshots, fractions allowed (default: '
        '50, in --cfg=small 4)',
    )
    g.add_argument(
        '--metrics',
        default='none',
        metavar='LIST',
        help='none, or fd_fundus, kid_fundus (need --metric_network) and fid, kid (need '
        '--inception_weights), comma separated, at every snapshot',
    )
    g.add_argument(
        '--metric_network',
        type=Path,
        metavar='FILE',
        help='content encoder file for fd_fundus (scripts/train_content_encoder.py)',
    )
    g.add_argument(
        '--inception_weights',
        type=Path,
        metavar='FILE',
        help='Inception weights for fid and kid (pt_inception-2015-12-05-6726825d.pth, '
        'from the pytorch-fid releases)',
    )
    g.add_argument(
        '--metric_images',
        type=positive_int,
        default=2000,
        metavar='INT',
        help='generated images per metric',
    )
    g.add_argument('--seed', type=nonnegative_int, default=0, metavar='INT', help='random seed')
    g.add_argument('--device', default='auto', help='cpu, cuda, cuda:N or auto')
    g.add_argument(
        '-n',
        '--dry-run',
        '--dry_run',
        dest='dry_run',
        action='store_true',
        help='print the resolved options and exit',
    )
    g = p.add_argument_group('data')
    g.add_argument(
        '--cond',
        type=boolean,
        default=False,
        metavar='BOOL',
        help='class-conditional training: not available, the weight format has no class input',
    )
    g.add_argument('--subset', type=positive_int, metavar='INT', help='train on that many images')
    g.add_argument(
        '--mirror',
        type=boolean,
        default=False,
        metavar='BOOL',
        help='double the set by mirroring (mixes left and right eyes)',
    )
    g = p.add_argument_group('training')
    g.add_argument('--cfg', default='auto', choices=PRESETS, help='base configuration')
    g.add_argument(
        '--gamma',
        type=nonnegative_float,
        metavar='FLOAT',
        help="R1 weight (default: the configuration's, as of the next four)",
    )
    g.add_argument('--kimg', type=positive_float, metavar='KIMG', help='length of the training')
    g.add_argument('--batch', type=positive_int, metavar='INT', help='images per step')
    g.add_argument(
        '--batch-gpu',
        '--batch_gpu',
        dest='batch_gpu',
        type=positive_int,
        metavar='INT',
        help='images per pass and process; lower to save memory',
    )
    g.add_argument(
        '--pl_weight', type=nonnegative_float, metavar='FLOAT', help='path length weight'
    )
    g.add_argument(
        '--use_noise',
        type=boolean,
        metavar='BOOL',
        help='noise injection in the generator (default: on, off in --cfg=small)',
    )
    g.add_argument(
        '--map-depth',
        '--map_depth',
        dest='n_mlp',
        type=int,
        choices=range(2, 9),
        metavar='2..8',
        help='layers of the mapping network',
    )
    g.add_argument(
        '--cbase',
        type=positive_int,
        metavar='INT',
        help='width of the networks: --cbase / R channels at R px (default: the '
        "configuration's; 16384 in auto to 256 px, 2048 in small at 64 px)",
    )
    g.add_argument(
        '--cmax',
        type=positive_int,
        metavar='INT',
        help="most channels of a layer (default: the configuration's; 512, 128 in small)",
    )
    g.add_argument(
        '--max_minutes',
        type=positive_float,
        metavar='MIN',
        help='stop in good order after that time, as Ctrl-C and SIGTERM do; resume later',
    )
    g.add_argument(
        '--discriminator',
        default='stylegan2',
        choices=tuple(LOSSES),
        help="StyleGAN2's, or projected: heads on frozen EfficientNet-Lite0 features, "
        'hinge loss, from 64 px on',
    )
    g.add_argument(
        '--d_lr',
        type=positive_float,
        metavar='RATE',
        help="learning rate of the discriminator (default: the generator's)",
    )
    g = p.add_argument_group('augmentation')
    g.add_argument(
        '--aug',
        choices=('ada', 'noaug', 'fixed'),
        help='adaptive, none, or fixed strength (default: ada; with '
        '--discriminator=projected fixed, --p=0.8 --augpipe=diff)',
    )
    g.add_argument('--p', type=fraction, metavar='FLOAT', help='strength for --aug=fixed')
    g.add_argument('--target', type=fraction, metavar='FLOAT', help='ADA target (default 0.6)')
    g.add_argument('--augpipe', choices=sorted(PIPES), help='augmentations used (default: bgc)')
    g = p.add_argument_group('continuing')
    g.add_argument(
        '--resume',
        type=Path,
        metavar='RUN|FILE',
        help='a run folder: go on in it from its newest snapshot; a snapshot file: go '
        'on from it in a new folder; a generator file: transfer learning',
    )
    g.add_argument(
        '--transfer',
        type=boolean,
        default=False,
        metavar='BOOL',
        help='with --resume FILE, a snapshot: take its networks only and begin anew, '
        'as for other data',
    )
    g.add_argument(
        '--grow',
        type=Path,
        metavar='FILE',
        help='begin with the networks of half the resolution, of a snapshot, generator '
        'file or ReStyle checkpoint; the pictures start as its own, enlarged',
    )
    g.add_argument(
        '--freezed',
        type=nonnegative_int,
        default=0,
        metavar='INT',
        help='with --resume FILE that holds a discriminator (a snapshot, or a converted '
        '.pkl): its layers kept frozen (FreezeD), from the image side',
    )
    g = p.add_argument_group('performance')
    g.add_argument(
        '--precision',
        choices=('fp32', 'fp16', 'bf16'),
        help='of the four highest resolutions (default: fp16 on a GPU, fp32 on a CPU; '
        'bf16 is faster on CPUs that have it)',
    )
    g.add_argument(
        '--fp32', type=boolean, default=False, metavar='BOOL', help='the same as --precision=fp32'
    )
    g.add_argument(
        '--nhwc',
        type=boolean,
        default=True,
        metavar='BOOL',
        help='channels-last layout; always on in the mixed-precision resolutions',
    )
    g.add_argument(
        '--nobench', type=boolean, default=False, metavar='BOOL', help='no cuDNN autotuning'
    )
    g.add_argument(
        '--allow-tf32',
        '--allow_tf32',
        dest='allow_tf32',
        type=boolean,
        default=False,
        metavar='BOOL',
        help='TF32 matrix products in the fp32 parts',
    )
    g.add_argument(
        '--workers',
        type=nonnegative_int,
        default=3,
        metavar='INT',
        help='image loading processes (0 on the CPU, where the cache is faster)',
    )
    return p


def resolve_augmentation(opts: argparse.Namespace) -> None:
    """Fills in the augmentation that goes with the discriminator where no --aug was given."""
    if opts.aug is not None:
        return
    opts.aug = 'ada'
    if opts.discriminator == 'projected':
        opts.aug = 'fixed'
        opts.p = MAX_STRENGTH if opts.p is None else opts.p
        opts.augpipe = opts.augpipe or 'diff'


def check_options(opts: argparse.Namespace) -> None:
    if opts.cond:
        raise UserError(
            '--cond=1: the weight format has no class input, so training is '
            'unconditional; train one generator per class with --data per class'
        )
    if opts.aug == 'fixed' and opts.p is None:
        raise UserError('--aug=fixed needs --p')
    if opts.aug != 'fixed' and opts.p is not None:
        raise UserError('--p goes with --aug=fixed')
    if opts.aug != 'ada' and opts.target is not None:
        raise UserError('--target goes with --aug=ada')
    if opts.aug == 'noaug' and opts.augpipe is not None:
        raise UserError('--augpipe goes with --aug=ada or --aug=fixed')
    if opts.fp32 and opts.precision not in (None, 'fp32'):
        raise UserError(f'--fp32=1 and --precision={opts.precision} contradict each other')
    if opts.aug == 'fixed' and opts.p > MAX_STRENGTH:
        log.warning('--p %.2f: above %.1f augmentations leak into the images', opts.p, MAX_STRENGTH)
    if opts.resume and not opts.resume.exists():
        raise UserError(
            f'--resume {opts.resume}: no such file or run folder (nothing is '
            'downloaded; convert a .pkl with scripts/convert_stylegan2_ada.py)'
        )
    folder = opts.resume is not None and opts.resume.is_dir()
    missing = [flag for flag in ('outdir', 'data') if getattr(opts, flag) is None]
    if missing and not folder:
        raise UserError(f'--{" and --".join(missing)} must be given, except with --resume RUN')
    if folder and opts.outdir and opts.outdir.resolve() != opts.resume.resolve().parent:
        raise UserError(f'--resume {opts.resume} goes on in that folder; leave --outdir out')
    if opts.transfer and (folder or opts.resume is None):
        raise UserError('--transfer=1 goes with --resume FILE')
    if opts.grow and opts.resume and not folder:
        raise UserError('--grow begins a new run, --resume FILE goes on from another: choose one')
    if opts.freezed and opts.resume is None:
        raise UserError(
            '--freezed would freeze an untrained discriminator; give a trained one '
            'with --resume FILE'
        )


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


def given_flags(argv: Sequence[str]) -> dict[str, object]:
    """The options that a command line names, by name; without those left at their defaults."""
    p = build_parser()
    p.set_defaults(**dict.fromkeys(vars(p.parse_args([])), _UNNAMED))
    return {k: v for k, v in vars(p.parse_args(argv)).items() if v is not _UNNAMED}


def resumed_options(opts: argparse.Namespace, argv: Sequence[str]) -> argparse.Namespace:
    """Options of the run folder to go on in; UserError when a flag given now contradicts them."""
    path = opts.resume / RECORD_NAME
    if not path.is_file():
        raise UserError(f'--resume {opts.resume}: not a run folder (no {RECORD_NAME})')
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
        resolved, wanted = record['options'], record['inputs'].get('data')
        saved = build_parser().parse_args(resolved['flags'])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{path} is damaged; begin a new run from the newest snapshot beside it: '
            '--resume FILE --outdir DIR --data ZIP'
        ) from error
    given = build_parser().parse_args([*resolved['flags'], *argv])
    changes = [
        f'{flag_of(name)}: was {resolved.get(name, getattr(saved, name))}, now {value}'
        for name, value in given_flags(argv).items()
        if name not in _FREE and value != resolved.get(name, getattr(saved, name))
    ]
    if not given.data.exists():
        raise UserError(f'--data {given.data}: not there any more; say where it is now')
    if wanted and (not given.data.is_file() or sha256_file(given.data) != wanted):
        changes.append(f'--data {given.data}: not the archive the run began with')
    elif not wanted and given.data.resolve() != saved.data.resolve():
        changes.append(f'--data: was {saved.data}, now {given.data}')
    if changes:
        raise UserError(
            f'--resume {opts.resume} holds a run with other settings '
            f'({"; ".join(changes)}); leave those flags out, or begin a new run from '
            'its snapshot: --resume FILE --transfer=1'
        )
    given.resume, given.max_minutes = opts.resume, opts.max_minutes
    return given


def build_config(
    opts: argparse.Namespace, argv: Sequence[str], start: Start, size: int, world: int
) -> TrainConfig:
    """The configuration of the flags, or of the snapshot that is gone on from."""
    try:
        if start.exact:
            given = given_flags(argv)
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
            n_mlp=opts.n_mlp,
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


def start_processes(n: int, argv: Sequence[str]) -> int:
    """Runs this script under torchrun with `n` processes; returns its exit code."""
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        f'--nproc_per_node={n}',
        '--',
        str(Path(__file__).resolve()),
        *argv,
    ]
    return run_launcher(command)


def build_metric(opts: argparse.Namespace, dataset: ImageArchive) -> Metric | None:
    """The function that measures snapshots, or None for --metrics=none."""
    if opts.metrics == 'none':
        return None
    from evaluation.fidelity import training_metric

    names = opts.metrics.split(',')
    return training_metric(
        names,
        dataset,
        n_images=opts.metric_images,
        content_weights=opts.metric_network,
        inception_weights=opts.inception_weights,
    )


def build_trainer(
    opts: argparse.Namespace,
    dataset: ImageArchive,
    config: TrainConfig,
    device: torch.device,
    precision: str,
) -> Trainer:
    """The networks and their training, with the settings that a resumed run takes over."""
    torch.backends.cudnn.benchmark = not opts.nobench
    torch.backends.cuda.matmul.allow_tf32 = opts.allow_tf32
    torch.backends.cudnn.allow_tf32 = opts.allow_tf32
    settings = {name: getattr(opts, name) for name in _SETTINGS}
    return Trainer(
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


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    opts = build_parser().parse_args(argv)
    resolve_augmentation(opts)
    check_options(opts)
    if opts.resume is not None and opts.resume.is_dir():
        opts = resumed_options(opts, argv)
        resolve_augmentation(opts)
    device = resolve_device(opts.device)
    if opts.gpus > 1 and 'WORLD_SIZE' not in os.environ and not opts.dry_run:
        if device.type == 'cuda' and opts.gpus > torch.cuda.device_count():
            raise UserError(f'--gpus {opts.gpus}: only {torch.cuda.device_count()} GPU(s) here')
        return start_processes(opts.gpus, argv)
    setup_logging()
    device = distributed.init(device)
    if not distributed.is_main():
        setup_logging(level=logging.WARNING)
    world = max(opts.gpus, distributed.world_size())
    on_gpu = device.type == 'cuda'
    start = read_start(opts.resume, transfer=opts.transfer, freezed=opts.freezed)
    check_flags(start, given_flags(argv))
    for name in (*_SETTINGS, 'seed'):
        setattr(opts, name, start.settings().get(name, getattr(opts, name)))
    opts.augpipe = opts.augpipe or 'bgc'
    opts.target = 0.6 if opts.target is None else opts.target
    dataset = ImageArchive(
        opts.data, mirror=opts.mirror, subset=opts.subset, seed=opts.seed, cache=not on_gpu
    )
    config = build_config(opts, argv, start, dataset.resolution, world)
    check_data(dataset, config, start, opts)
    opts.discriminator = config.discriminator
    snap = opts.snap or (4 if opts.cfg == 'small' else 50)
    if config.batch_gpu == 1:
        log.warning(
            'one image per pass: the discriminator sees no statistics over a group; give a '
            'larger --batch or --batch-gpu'
        )
    precision = 'fp32' if opts.fp32 else opts.precision or ('fp16' if on_gpu else 'fp32')
    resolved = {
        'flags': argv,
        **config.to_dict(),
        'data': opts.data,
        'n_images': len(dataset),
        'precision': precision,
        **{name: getattr(opts, name) for name in _SETTINGS},
        'seed': opts.seed,
        'snap': snap,
        'metrics': opts.metrics,
        'world_size': world,
    }
    metric = build_metric(opts, dataset)
    if opts.dry_run:
        print(
            json.dumps(
                {k: str(v) if isinstance(v, Path) else v for k, v in resolved.items()}, indent=2
            )
        )
        return 0
    trainer = build_trainer(opts, dataset, config, device, precision)
    load_start(trainer, start)
    if opts.grow and start.weights is None:
        grow(trainer, opts.grow)
        log.info('grown from %s', opts.grow)
    run_dir = start_folder(opts, argv, start, resolved)
    if metric is not None:
        metric = partial(metric, folder=run_dir)
    log.info(
        '%d images of %d px, batch %d, %s, %s, %g kimg',
        len(dataset),
        config.size,
        config.batch,
        precision,
        device,
        config.kimg,
    )
    return run_to_the_end(trainer, run_dir, opts, snap=snap, metric=metric)


def run_to_the_end(
    trainer: Trainer, run_dir: Path, opts: argparse.Namespace, *, snap: float, metric: Metric | None
) -> int:
    """Trains, exports the generator, and returns the exit code."""
    kimg = trainer.config.kimg
    with stop_on_signal() as signalled:
        last = train(
            trainer,
            run_dir,
            kimg=kimg,
            snapshot_kimg=snap * TICK_KIMG,
            tick_kimg=min(TICK_KIMG, kimg / 10),
            metric=metric,
            should_stop=Stopping(
                trainer.device, requested=signalled, max_minutes=opts.max_minutes
            ).wished,
        )
    if distributed.is_main():
        export_inference(last, run_dir / 'generator.pt')
        log.info(
            'generator for the other scripts: %s (sha256 %s)',
            run_dir / 'generator.pt',
            sha256_file(run_dir / 'generator.pt')[:12],
        )
    return finish(signalled)


if __name__ == '__main__':
    run(main)
