"""The options of a content encoder training: its settings, its photographs, its records."""

import dataclasses
from pathlib import Path

from models.resnet import ARCHS
from training.moco_views import ViewConfig
from utils import options
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
)
from utils.options import option

_REQUIRED, _DATA, _NETWORK, RECORDS, TRAINING = 'required', 'data', 'network', 'records', 'training'


@dataclasses.dataclass(frozen=True)
class MocoConfig:
    """What shapes a content encoder training; intervals in optimiser steps.

    batch_size counts the images of one step over all processes. learning_rate is for batches of
    256 and scaled with the batch; it follows half a cosine to 0 at max_steps after
    `warmup_steps` of linear rise. queue_size None: half of the training images, at most 65536
    (an image's own earlier keys would be wrong negatives).
    """

    arch: str = option('resnet50', choice(*ARCHS), 'network', group=_NETWORK)
    input_size: int = option(
        224, positive_int, 'side of the pictures the network sees', group=_NETWORK, metavar='PX'
    )
    small_stem: bool = option(
        False,
        boolean,
        'for inputs below about 100 px: one 3x3 convolution of '
        'stride 2 in place of the 7x7 convolution and the max-pool (4x slower)',
        group=_NETWORK,
        metavar='BOOL',
        bare=True,
    )
    views: ViewConfig = ViewConfig()
    max_steps: int = option(
        20_000, positive_int, 'optimiser steps', group=TRAINING, metavar='STEPS'
    )
    warmup_steps: int = option(
        0, nonnegative_int, 'linear rise of the learning rate', group=TRAINING, metavar='STEPS'
    )
    batch_size: int = option(
        256, positive_int, 'images per step, all processes together', group=TRAINING, metavar='N'
    )
    queue_size: int | None = option(
        None,
        positive_int,
        'remembered keys, a multiple of the batch (default: half of the images, at most 65536)',
        group=TRAINING,
        metavar='N',
    )
    learning_rate: float = option(
        0.03,
        positive_float,
        'for batches of 256; scaled with the batch',
        group=TRAINING,
        metavar='RATE',
    )
    sgd_momentum: float = 0.9
    weight_decay: float = option(
        1e-4, nonnegative_float, 'weight decay', group=TRAINING, metavar='NUMBER'
    )
    key_momentum: float = option(
        0.999,
        fraction,
        'how slowly the key network follows; 0.99 suits runs below 5000 steps',
        group=TRAINING,
        metavar='NUMBER',
    )
    temperature: float = option(
        0.2, positive_float, 'of the InfoNCE loss', group=TRAINING, metavar='NUMBER'
    )
    amp: str = option('no', choice('no', 'bf16'), 'mixed precision', group=TRAINING)
    seed: int = option(0, nonnegative_int, 'random seed', group=TRAINING, metavar='INT')
    log_interval: int = option(
        50, positive_int, 'progress lines and stats.jsonl', group=RECORDS, metavar='STEPS'
    )
    save_interval: int = option(
        1000,
        positive_int,
        'resumable states and content_encoder.pt',
        group=RECORDS,
        metavar='STEPS',
    )


@dataclasses.dataclass(frozen=True)
class ContentOptions:
    """All options of a content encoder training; a run that goes on compares photographs by
    their content.
    """

    data: Path = option(
        kind=path, help='training photographs', group=_REQUIRED, metavar='DIR|ZIP|CSV', free=True
    )
    out_dir: Path = option(kind=path, help='run folder', group=_REQUIRED, metavar='DIR')
    image_dir: Path | None = option(
        None,
        path,
        'where the files of a table given as --data are (default: images/ '
        'beside it, or its folder)',
        group=_DATA,
        metavar='DIR',
        free=True,
    )
    split: str | None = option(
        None, text, 'only rows of that split of the table', group=_DATA, metavar='NAME'
    )
    labels: Path | None = option(
        None,
        path,
        'table of photographs for the quality report (default: --data when that is a table)',
        group=_DATA,
        metavar='CSV',
        free=True,
    )
    labels_image_dir: Path | None = option(
        None, path, 'where the files of --labels are', group=_DATA, metavar='DIR', free=True
    )
    quality_split: str | None = option(
        None,
        text,
        'only rows of that split in the quality report',
        group=_DATA,
        metavar='NAME',
        free=True,
    )
    quality_images: int = option(
        5000,
        positive_int,
        'most images in the quality report, whole patients drawn at random',
        group=_DATA,
        metavar='N',
        free=True,
    )
    workers: int = option(
        4,
        nonnegative_int,
        'loading processes (sets that fit 2 GB are kept in memory instead)',
        group=_DATA,
        metavar='N',
    )
    moco: MocoConfig = MocoConfig()
    keep_states: int = option(2, positive_int, 'resumable states kept', group=RECORDS, metavar='N')
    resume: bool = option(False, boolean, 'go on from the newest state', group=RECORDS)
    max_minutes: float | None = option(
        None,
        positive_float,
        'stop in good order after that time; go on with --resume',
        group=RECORDS,
        metavar='MIN',
    )


# Options that may differ when a run goes on, beside those of every training (training.run).
FREE = options.free(ContentOptions)
