"""The options of a generator training: flags, what goes with what, what may change on resume."""

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.adversarial import LOSSES
from training.augment import MAX_STRENGTH, PIPES
from training.run import FREE_OPTIONS
from training.stylegan2_config import PRESETS
from utils import options
from utils.errors import UserError
from utils.io import sha256_file
from utils.kinds import (
    boolean,
    choice,
    fraction,
    nonnegative_float,
    nonnegative_int,
    path,
    positive_float,
    positive_int,
    text,
    whole,
)
from utils.options import add_flags, option
from utils.runs import RECORD_NAME

log = logging.getLogger(__name__)

TICK_KIMG = 4
_UNNAMED = object()
# What shapes a run beside its TrainConfig and seed, and is kept in snapshots.
SETTINGS = ('cfg', 'aug', 'augpipe', 'p', 'target', 'mirror', 'subset')

# Headings of the flags.
_REQUIRED, _GENERAL, _DATA = 'required, except with --resume RUN', 'general', 'data'
_TRAINING, _AUGMENTATION = 'training', 'augmentation'
_CONTINUING, _PERFORMANCE = 'continuing', 'performance'


@dataclasses.dataclass(frozen=True)
class GeneratorOptions:
    """All options of a generator training; None: what the configuration, or the run that is gone
    on in, says.

    Free to change when a run goes on is what does not touch what is learnt, or says how long.
    """

    outdir: Path | None = option(
        None, path, 'where the numbered run folders go', group=_REQUIRED, metavar='DIR'
    )
    data: Path | None = option(
        None,
        path,
        'archive made by scripts/dataset_tool.py',
        group=_REQUIRED,
        metavar='ZIP|DIR',
        free=True,
    )
    gpus: int = option(
        1,
        positive_int,
        'processes on this machine, one per GPU (gloo processes on the CPU)',
        group=_GENERAL,
        metavar='INT',
        free=True,
    )
    snap: float | None = option(
        None,
        positive_float,
        f'ticks of {TICK_KIMG} kimg between snapshots, fractions allowed (default: 50, in '
        '--cfg=small 4)',
        group=_GENERAL,
        metavar='TICKS',
        free=True,
    )
    metrics: str = option(
        'none',
        text,
        'none, or fd_fundus, kid_fundus (need --metric_network) and fid, kid (need '
        '--inception_weights), comma separated, at every snapshot',
        group=_GENERAL,
        metavar='LIST',
        free=True,
    )
    metric_network: Path | None = option(
        None,
        path,
        'content encoder file for fd_fundus (scripts/train_content_encoder.py)',
        group=_GENERAL,
        metavar='FILE',
        free=True,
    )
    inception_weights: Path | None = option(
        None,
        path,
        'Inception weights for fid and kid (pt_inception-2015-12-05-6726825d.pth, from the '
        'pytorch-fid releases)',
        group=_GENERAL,
        metavar='FILE',
        free=True,
    )
    metric_images: int = option(
        2000, positive_int, 'generated images per metric', group=_GENERAL, metavar='INT', free=True
    )
    seed: int = option(0, nonnegative_int, 'random seed', group=_GENERAL, metavar='INT')
    device: str = option('auto', text, 'cpu, cuda, cuda:N or auto', group=_GENERAL)
    dry_run: bool = option(
        False,
        boolean,
        'print the resolved options and exit',
        group=_GENERAL,
        flag='dry-run',
        also=['-n'],
        free=True,
    )
    cond: bool = option(
        False,
        boolean,
        'class-conditional training: not available, the weight format has no class input',
        group=_DATA,
        metavar='BOOL',
    )
    subset: int | None = option(
        None, positive_int, 'train on that many images', group=_DATA, metavar='INT'
    )
    mirror: bool = option(
        False,
        boolean,
        'double the set by mirroring (mixes left and right eyes)',
        group=_DATA,
        metavar='BOOL',
    )
    cfg: str = option('auto', choice(*PRESETS), 'base configuration', group=_TRAINING)
    gamma: float | None = option(
        None,
        nonnegative_float,
        "R1 weight (default: the configuration's, as of the next four)",
        group=_TRAINING,
        metavar='FLOAT',
    )
    kimg: float | None = option(
        None, positive_float, 'length of the training', group=_TRAINING, metavar='KIMG', free=True
    )
    batch: int | None = option(
        None, positive_int, 'images per step', group=_TRAINING, metavar='INT'
    )
    batch_gpu: int | None = option(
        None,
        positive_int,
        'images per pass and process; lower to save memory',
        group=_TRAINING,
        metavar='INT',
        flag='batch-gpu',
        free=True,
    )
    pl_weight: float | None = option(
        None, nonnegative_float, 'path length weight', group=_TRAINING, metavar='FLOAT'
    )
    use_noise: bool | None = option(
        None,
        boolean,
        'noise injection in the generator (default: on, off in --cfg=small)',
        group=_TRAINING,
        metavar='BOOL',
    )
    map_depth: int | None = option(
        None,
        whole(lambda v: 2 <= v <= 8, 'between 2 and 8'),
        'layers of the mapping network',
        group=_TRAINING,
        metavar='2..8',
        flag='map-depth',
    )
    cbase: int | None = option(
        None,
        positive_int,
        'width of the networks: --cbase / R channels at R px (default: the '
        "configuration's; 16384 in auto to 256 px, 2048 in small at 64 px)",
        group=_TRAINING,
        metavar='INT',
    )
    cmax: int | None = option(
        None,
        positive_int,
        "most channels of a layer (default: the configuration's; 512, 128 in small)",
        group=_TRAINING,
        metavar='INT',
    )
    discriminator: str = option(
        'stylegan2',
        choice(*tuple(LOSSES)),
        "StyleGAN2's, or projected: heads on frozen EfficientNet-Lite0 features, hinge "
        'loss, from 64 px on',
        group=_TRAINING,
    )
    d_lr: float | None = option(
        None,
        positive_float,
        "learning rate of the discriminator (default: the generator's)",
        group=_TRAINING,
        metavar='RATE',
    )
    max_minutes: float | None = option(
        None,
        positive_float,
        'stop in good order after that time, as Ctrl-C and SIGTERM do; resume later',
        group=_TRAINING,
        metavar='MIN',
    )
    aug: str | None = option(
        None,
        choice('ada', 'noaug', 'fixed'),
        'adaptive, none, or fixed strength (default: ada; with --discriminator=projected '
        'fixed, --p=0.8 --augpipe=diff)',
        group=_AUGMENTATION,
    )
    p: float | None = option(
        None, fraction, 'strength for --aug=fixed', group=_AUGMENTATION, metavar='FLOAT'
    )
    target: float | None = option(
        None, fraction, 'ADA target (default 0.6)', group=_AUGMENTATION, metavar='FLOAT'
    )
    augpipe: str | None = option(
        None, choice(*sorted(PIPES)), 'augmentations used (default: bgc)', group=_AUGMENTATION
    )
    resume: Path | None = option(
        None,
        path,
        'a run folder: go on in it from its newest snapshot; a snapshot file: go on from '
        'it in a new folder; a generator file: transfer learning',
        group=_CONTINUING,
        metavar='RUN|FILE',
    )
    transfer: bool = option(
        False,
        boolean,
        'with --resume FILE, a snapshot: take its networks only and begin anew, as for other data',
        group=_CONTINUING,
        metavar='BOOL',
    )
    grow: Path | None = option(
        None,
        path,
        'begin with the networks of half the resolution, of a snapshot, generator file or '
        'ReStyle checkpoint; the pictures start as its own, enlarged',
        group=_CONTINUING,
        metavar='FILE',
    )
    freezed: int = option(
        0,
        nonnegative_int,
        'with --resume FILE that holds a discriminator (a snapshot, or a converted .pkl): '
        'its layers kept frozen (FreezeD), from the image side',
        group=_CONTINUING,
        metavar='INT',
    )
    precision: str | None = option(
        None,
        choice('fp32', 'fp16', 'bf16'),
        'of the four highest resolutions (default: fp16 on a GPU, fp32 on a CPU; bf16 is '
        'faster on CPUs that have it)',
        group=_PERFORMANCE,
        free=True,
    )
    fp32: bool = option(
        False,
        boolean,
        'the same as --precision=fp32',
        group=_PERFORMANCE,
        metavar='BOOL',
        free=True,
    )
    nhwc: bool = option(
        True,
        boolean,
        'channels-last layout; always on in the mixed-precision resolutions',
        group=_PERFORMANCE,
        metavar='BOOL',
        free=True,
    )
    nobench: bool = option(
        False, boolean, 'no cuDNN autotuning', group=_PERFORMANCE, metavar='BOOL', free=True
    )
    allow_tf32: bool = option(
        False,
        boolean,
        'TF32 matrix products in the fp32 parts',
        group=_PERFORMANCE,
        metavar='BOOL',
        flag='allow-tf32',
        free=True,
    )
    workers: int = option(
        3,
        nonnegative_int,
        'image loading processes (0 on the CPU, where the cache is faster)',
        group=_PERFORMANCE,
        metavar='INT',
    )


# Beside what may differ in every training.
FREE = {*FREE_OPTIONS, *options.free(GeneratorOptions)}


def add_options(p: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds all flags of the training to a parser and returns it."""
    add_flags(p, GeneratorOptions)
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
            '`cond`=1: the weight format has no class input, so training is '
            'unconditional; train one generator per class with `data` per class'
        )
    if opts.aug == 'fixed' and opts.p is None:
        raise UserError('`aug`=fixed needs `p`')
    if opts.aug != 'fixed' and opts.p is not None:
        raise UserError('`p` goes with `aug`=fixed')
    if opts.aug != 'ada' and opts.target is not None:
        raise UserError('`target` goes with `aug`=ada')
    if opts.aug == 'noaug' and opts.augpipe is not None:
        raise UserError('`augpipe` goes with `aug`=ada or `aug`=fixed')
    if opts.fp32 and opts.precision not in (None, 'fp32'):
        raise UserError(f'`fp32`=1 and `precision`={opts.precision} contradict each other')
    if opts.aug == 'fixed' and opts.p > MAX_STRENGTH:
        log.warning(
            'augmentations of strength %.2f: above %.1f they leak into the images',
            opts.p,
            MAX_STRENGTH,
        )
    if opts.resume and not opts.resume.exists():
        raise UserError(
            f'`resume` {opts.resume}: no such file or run folder (nothing is '
            'downloaded; convert a .pkl with scripts/convert_stylegan2_ada.py)'
        )
    folder = opts.resume is not None and opts.resume.is_dir()
    missing = [f'`{name}`' for name in ('outdir', 'data') if getattr(opts, name) is None]
    if missing and not folder:
        raise UserError(f'{" and ".join(missing)} must be given, except with `resume` RUN')
    if folder and opts.outdir and opts.outdir.resolve() != opts.resume.resolve().parent:
        raise UserError(f'`resume` {opts.resume} goes on in that folder; leave `outdir` out')
    if opts.transfer and (folder or opts.resume is None):
        raise UserError('`transfer`=1 goes with `resume` FILE')
    if opts.grow and opts.resume and not folder:
        raise UserError('`grow` begins a new run, `resume` FILE goes on from another: choose one')
    if opts.freezed and opts.resume is None:
        raise UserError(
            '`freezed` would freeze an untrained discriminator; give a trained one '
            'with `resume` FILE'
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
        raise UserError(f'`resume` {opts.resume}: not a run folder (no {RECORD_NAME})')
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
        resolved, wanted = record['options'], record['inputs'].get('data')
        resolved['map_depth'] = resolved.get('n_mlp')
        saved = p.parse_args(resolved['flags'])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{path} is damaged; begin a new run from the newest snapshot beside it: '
            '`resume` FILE `outdir` DIR `data` ZIP'
        ) from error
    given = p.parse_args([*resolved['flags'], *argv])
    changes = [
        f'`{name}`: was {resolved.get(name, getattr(saved, name))}, now {value}'
        for name, value in given_flags(p, argv).items()
        if name not in FREE and value != resolved.get(name, getattr(saved, name))
    ]
    if not given.data.exists():
        raise UserError(f'`data` {given.data}: not there any more; say where it is now')
    if wanted and (not given.data.is_file() or sha256_file(given.data) != wanted):
        changes.append(f'`data` {given.data}: not the archive the run began with')
    elif not wanted and given.data.resolve() != saved.data.resolve():
        changes.append(f'`data`: was {saved.data}, now {given.data}')
    if changes:
        raise UserError(
            f'`resume` {opts.resume} holds a run with other settings '
            f'({"; ".join(changes)}); leave those flags out, or begin a new run from '
            'its snapshot: `resume` FILE `transfer`=1'
        )
    given.resume, given.max_minutes = opts.resume, opts.max_minutes
    return given
