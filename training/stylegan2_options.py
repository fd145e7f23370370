"""The options of a generator training: flags, what goes with what, what may change on resume."""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.adversarial import LOSSES
from training.augment import MAX_STRENGTH, PIPES
from training.run import FREE_OPTIONS
from training.stylegan2_config import PRESETS
from training.stylegan2_resume import flag_of
from utils.cli import (
    boolean,
    fraction,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_int,
)
from utils.errors import UserError
from utils.io import sha256_file
from utils.runs import RECORD_NAME

log = logging.getLogger(__name__)

TICK_KIMG = 4
_UNNAMED = object()
# What shapes a run beside its TrainConfig and seed, and is kept in snapshots.
SETTINGS = ('cfg', 'aug', 'augpipe', 'p', 'target', 'mirror', 'subset')

# Flags that may change when a run folder is gone on in, beside those of every training: they do
# not touch what is learnt, or say how long.
_FREE = {
    *FREE_OPTIONS,
    'kimg',
    'snap',
    'metrics',
    'metric_network',
    'inception_weights',
    'metric_images',
    'gpus',
    'batch_gpu',
    'precision',
    'fp32',
    'nhwc',
    'nobench',
    'allow_tf32',
    'dry_run',
    'data',
}


def add_options(p: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds all flags of the training to a parser and returns it."""
    for add in (
        _add_required,
        _add_general,
        _add_data,
        _add_training,
        _add_augmentation,
        _add_continuing,
        _add_performance,
    ):
        add(p)
    return p


def _add_required(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group('required, except with --resume RUN')
    g.add_argument('--outdir', type=Path, metavar='DIR', help='where the numbered run folders go')
    g.add_argument(
        '--data', type=Path, metavar='ZIP|DIR', help='archive made by scripts/dataset_tool.py'
    )


def _add_general(p: argparse.ArgumentParser) -> None:
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


def _add_data(p: argparse.ArgumentParser) -> None:
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


def _add_training(p: argparse.ArgumentParser) -> None:
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
    _add_networks(g)
    g.add_argument(
        '--max_minutes',
        type=positive_float,
        metavar='MIN',
        help='stop in good order after that time, as Ctrl-C and SIGTERM do; resume later',
    )


def _add_networks(g: argparse._ArgumentGroup) -> None:
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


def _add_augmentation(p: argparse.ArgumentParser) -> None:
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


def _add_continuing(p: argparse.ArgumentParser) -> None:
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


def _add_performance(p: argparse.ArgumentParser) -> None:
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


def given_flags(p: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """The options that a command line names, by name; without those left at their defaults."""
    unnamed = argparse.Namespace(**dict.fromkeys(vars(p.parse_args([])), _UNNAMED))
    return {k: v for k, v in vars(p.parse_args(argv, unnamed)).items() if v is not _UNNAMED}


def resumed_options(
    p: argparse.ArgumentParser, opts: argparse.Namespace, argv: Sequence[str]
) -> argparse.Namespace:
    """Options of the run folder to go on in; UserError when a flag given now contradicts them."""
    path = opts.resume / RECORD_NAME
    if not path.is_file():
        raise UserError(f'--resume {opts.resume}: not a run folder (no {RECORD_NAME})')
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
        resolved, wanted = record['options'], record['inputs'].get('data')
        saved = p.parse_args(resolved['flags'])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{path} is damaged; begin a new run from the newest snapshot beside it: '
            '--resume FILE --outdir DIR --data ZIP'
        ) from error
    given = p.parse_args([*resolved['flags'], *argv])
    changes = [
        f'{flag_of(name)}: was {resolved.get(name, getattr(saved, name))}, now {value}'
        for name, value in given_flags(p, argv).items()
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
