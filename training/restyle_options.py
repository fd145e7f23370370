"""The options of an encoder training beside its settings, and what goes together."""

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from training.coach_config import DATA, LOSSES, NETWORKS, RECORDS, TRAINING, CoachConfig
from utils import cli, options
from utils.errors import UserError
from utils.kinds import (
    boolean,
    integer,
    nonnegative_float,
    nonnegative_int,
    path,
    positive_float,
    positive_int,
    power_of_two,
    text,
)
from utils.options import add_flags, heading, option

_REQUIRED = 'required'


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The run folder, and the photographs."""

    exp_dir: Path = option(
        kind=path, help='run folder', group=_REQUIRED, metavar='DIR', also=['--out_dir']
    )
    stylegan_weights: Path | None = option(
        None,
        path,
        'generator file (required unless --checkpoint_path is given)',
        group=_REQUIRED,
        metavar='FILE',
        free=True,
    )
    dataset_type: str = option(
        'my_data_encode', text, 'entry of configs/data_configs.py', group=DATA
    )
    train_path: Path | None = option(
        None,
        path,
        "training photographs, in place of the entry's",
        group=DATA,
        metavar='DIR|ZIP',
        free=True,
    )
    test_path: Path | None = option(
        None,
        path,
        "validation photographs, in place of the entry's",
        group=DATA,
        metavar='DIR|ZIP',
        free=True,
    )
    workers: int = option(
        4,
        nonnegative_int,
        'loading processes (sets that fit 2 GB are kept in memory instead)',
        group=DATA,
        metavar='N',
    )
    test_workers: int = option(
        2, nonnegative_int, 'the same for validation', group=DATA, metavar='N'
    )


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """The encoder, and where it and the generator start."""

    encoder_type: str | None = option(None, text, 'encoder class', group=NETWORKS)
    encoder_size: int | None = option(
        None,
        positive_int,
        "side of the encoder's input and of the losses (default: 256)",
        group=NETWORKS,
        metavar='PX',
    )
    light_width: int = option(
        64,
        positive_int,
        'channels of the first feature map of a Light encoder',
        group=NETWORKS,
        metavar='N',
    )
    input_nc: int = option(
        6,
        integer,
        'encoder input channels: photograph and reconstruction, always 6',
        group=NETWORKS,
        metavar='N',
    )
    output_size: int | None = option(
        None,
        power_of_two,
        'generator size; checked against the weights',
        group=NETWORKS,
        metavar='PX',
    )
    checkpoint_path: Path | None = option(
        None,
        path,
        'start from encoder, generator and latent average of this checkpoint '
        '(a warm start, not a resume)',
        group=NETWORKS,
        metavar='FILE',
        free=True,
    )
    resnet34_weights: Path | None = option(
        None,
        path,
        'torchvision ImageNet ResNet-34 to start ResNet encoders from (default: '
        "model_paths['resnet34'] when that file exists, else a random start)",
        group=NETWORKS,
        metavar='FILE',
        free=True,
    )


def _weight(of: str) -> float:
    """The option of a loss's weight."""
    return option(0.0, nonnegative_float, f'weight of the {of}', group=LOSSES, metavar='WEIGHT')


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Weights of the losses, and their networks."""

    l2_lambda: float = _weight('mean squared error')
    lpips_lambda: float = _weight('LPIPS (needs AlexNet weights)')
    moco_lambda: float = _weight('content loss (needs MoCo v2 or content encoder weights)')
    w_norm_lambda: float = _weight('latent norm')
    id_lambda: float = _weight('face identity; retinas have none, so only 0 is possible')
    start_from_latent_avg: bool = option(
        False, boolean, 'the latent norm counts from the average latent', group=LOSSES
    )
    content_weights: Path | None = option(
        None,
        path,
        'MoCo v2 ResNet-50 file, an encoder made by '
        'scripts/train_content_encoder.py, or an installed network: lite0, lite1, '
        "lite2 (default: model_paths['moco'])",
        group=LOSSES,
        metavar='FILE|lite0',
        free=True,
        also=['--moco_weights'],
    )
    lpips_weights: Path | None = option(
        None,
        path,
        'torchvision AlexNet file, or an installed network, lite0 and its kin, '
        "with a distance like LPIPS (default: model_paths['alexnet'])",
        group=LOSSES,
        metavar='FILE|lite0',
        free=True,
    )


@dataclasses.dataclass(frozen=True)
class RestyleOptions:
    """All options of an encoder training."""

    data: DataOptions
    networks: NetworkOptions
    losses: LossOptions
    coach: CoachConfig
    n_clusters: int | None = option(
        None, integer, 'accepted for old command lines; has no effect', group=TRAINING, metavar='N'
    )
    keep_states: int = option(2, positive_int, 'resumable states kept', group=RECORDS, metavar='N')
    resume: str | None = option(
        None,
        text,
        'go on from the newest state in --exp_dir, or from a state file',
        group=RECORDS,
        metavar='FILE',
        bare='newest',
    )
    max_minutes: float | None = option(
        None,
        positive_float,
        'stop in good order after that time; go on with --resume',
        group=RECORDS,
        metavar='MIN',
    )


# Options that may differ when a run goes on, beside those of every training (training.run): they
# do not change what is computed, or the content of the files they name is compared instead.
FREE = options.free(RestyleOptions)
# What says where things are, and is not kept in checkpoints.
PLACES = (*options.paths(RestyleOptions), 'resume')


def add_options(
    p: argparse.ArgumentParser,
    encoders: Iterable[str],
    default_encoder: str,
    dataset_types: Iterable[str],
) -> None:
    """Adds all flags of an encoder training to a parser.

    encoders: the classes to choose from. dataset_types: entries of configs/data_configs.py.
    """
    encoder: dict[str, Any] = {
        'choices': sorted(encoders),
        'help': f'encoder class (default: {default_encoder})',
    }
    chosen = {'encoder_type': encoder, 'dataset_type': {'choices': dataset_types}}
    add_flags(p, RestyleOptions, details=chosen)
    p.set_defaults(mirror=None)
    cli.add_device(heading(p, TRAINING))


def check_options(opts: argparse.Namespace) -> None:
    """UserError for flags that contradict each other, or ask for what cannot be."""
    if opts.id_lambda > 0 and opts.moco_lambda > 0:
        raise UserError('`id_lambda` and `moco_lambda` exclude each other; set one of them to 0')
    if opts.id_lambda > 0:
        raise UserError(
            '`id_lambda`: the identity loss compares faces, and photographs of the '
            'retina have none; set it to 0 and use `moco_lambda`'
        )
    if not opts.l2_lambda and not opts.lpips_lambda and not opts.moco_lambda:
        raise UserError(
            'no reconstruction loss: set `l2_lambda`, `lpips_lambda` or '
            '`moco_lambda` (published: 1, 0.8 and 0.5)'
        )
    if opts.input_nc != 6:
        raise UserError(
            f'`input_nc` {opts.input_nc}: the encoder sees the photograph and the '
            'current reconstruction, 6 channels'
        )
    if not opts.stylegan_weights and not opts.checkpoint_path:
        raise UserError('`stylegan_weights` or `checkpoint_path` is required')


def coach_config(opts: argparse.Namespace) -> CoachConfig:
    """The settings that the flags ask for."""
    return options.build(CoachConfig, vars(opts))
