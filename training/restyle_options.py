"""The options of an encoder training: flags, what goes together, and the settings they make."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from training.coach_config import AMP_DTYPES, CoachConfig
from utils import cli
from utils.errors import UserError


def add_options(
    p: argparse.ArgumentParser,
    encoders: Iterable[str],
    default_encoder: str,
    dataset_types: Iterable[str],
) -> None:
    """Adds all flags of an encoder training to a parser.

    encoders: the classes to choose from. dataset_types: entries of configs/data_configs.py.
    """
    _add_data(p, dataset_types)
    _add_networks(p, encoders, default_encoder)
    _add_losses(p)
    _add_training(p)
    _add_records(p)


def _add_data(p: argparse.ArgumentParser, dataset_types: Iterable[str]) -> None:
    g = p.add_argument_group('required')
    g.add_argument(
        '--exp_dir', '--out_dir', type=Path, required=True, metavar='DIR', help='run folder'
    )
    g.add_argument(
        '--stylegan_weights',
        type=Path,
        metavar='FILE',
        help='generator file (required unless --checkpoint_path is given)',
    )
    g = p.add_argument_group('data')
    g.add_argument(
        '--dataset_type',
        default='my_data_encode',
        choices=dataset_types,
        help='entry of configs/data_configs.py',
    )
    g.add_argument(
        '--train_path',
        type=Path,
        metavar='DIR|ZIP',
        help="training photographs, in place of the entry's",
    )
    g.add_argument(
        '--test_path',
        type=Path,
        metavar='DIR|ZIP',
        help="validation photographs, in place of the entry's",
    )
    g.add_argument(
        '--mirror',
        action=argparse.BooleanOptionalAction,
        default=None,
        help='mirror half of the training photographs (default: as the entry says)',
    )
    g.add_argument(
        '--workers',
        type=cli.nonnegative_int,
        default=4,
        metavar='N',
        help='loading processes (sets that fit 2 GB are kept in memory instead)',
    )
    g.add_argument(
        '--test_workers',
        type=cli.nonnegative_int,
        default=2,
        metavar='N',
        help='the same for validation',
    )


def _add_networks(
    p: argparse.ArgumentParser, encoders: Iterable[str], default_encoder: str
) -> None:
    g = p.add_argument_group('networks')
    g.add_argument(
        '--encoder_type',
        choices=sorted(encoders),
        help=f'encoder class (default: {default_encoder})',
    )
    g.add_argument(
        '--encoder_size',
        type=cli.positive_int,
        metavar='PX',
        help="side of the encoder's input and of the losses (default: 256)",
    )
    g.add_argument(
        '--light_width',
        type=cli.positive_int,
        default=64,
        metavar='N',
        help='channels of the first feature map of a Light encoder',
    )
    g.add_argument(
        '--input_nc',
        type=int,
        default=6,
        metavar='N',
        help='encoder input channels: photograph and reconstruction, always 6',
    )
    g.add_argument(
        '--output_size',
        type=cli.power_of_two,
        metavar='PX',
        help='generator size; checked against the weights',
    )
    _add_starts(g)


def _add_starts(g: argparse._ArgumentGroup) -> None:
    g.add_argument(
        '--checkpoint_path',
        type=Path,
        metavar='FILE',
        help='start from encoder, generator and latent average of this checkpoint '
        '(a warm start, not a resume)',
    )
    g.add_argument(
        '--resnet34_weights',
        type=Path,
        metavar='FILE',
        help='torchvision ImageNet ResNet-34 to start ResNet encoders from (default: '
        "model_paths['resnet34'] when that file exists, else a random start)",
    )
    g.add_argument(
        '--train_decoder',
        type=cli.boolean,
        nargs='?',
        const=True,
        default=False,
        metavar='BOOL',
        help='train the generator too',
    )
    g.add_argument(
        '--synthetic',
        type=cli.fraction,
        default=0.0,
        metavar='SHARE',
        help='share of every batch that the generator draws, with known latents: 1 to '
        'pretrain, then 0.5 with --checkpoint_path',
    )


def _add_losses(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group('losses')
    for name, text in (
        ('l2', 'mean squared error'),
        ('lpips', 'LPIPS (needs AlexNet weights)'),
        ('moco', 'content loss (needs MoCo v2 or content encoder weights)'),
        ('w_norm', 'latent norm'),
        ('id', 'face identity; retinas have none, so only 0 is possible'),
    ):
        g.add_argument(
            f'--{name}_lambda',
            type=cli.nonnegative_float,
            default=0.0,
            metavar='WEIGHT',
            help=f'weight of the {text}',
        )
    g.add_argument(
        '--latent_lambda',
        type=cli.nonnegative_float,
        default=0.1,
        metavar='WEIGHT',
        help='weight of the distance from the known latents of --synthetic',
    )
    g.add_argument(
        '--start_from_latent_avg',
        action='store_true',
        help='the latent norm counts from the average latent',
    )
    g.add_argument(
        '--content_weights',
        '--moco_weights',
        dest='content_weights',
        type=Path,
        metavar='FILE|lite0',
        help='MoCo v2 ResNet-50 file, an encoder made by '
        'scripts/train_content_encoder.py, or an installed network: lite0, lite1, '
        "lite2 (default: model_paths['moco'])",
    )
    g.add_argument(
        '--lpips_weights',
        type=Path,
        metavar='FILE|lite0',
        help='torchvision AlexNet file, or an installed network, lite0 and its kin, '
        "with a distance like LPIPS (default: model_paths['alexnet'])",
    )


def _add_training(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group('training')
    g.add_argument(
        '--max_steps',
        type=cli.positive_int,
        default=100_000,
        metavar='STEPS',
        help='optimiser steps',
    )
    g.add_argument(
        '--batch_size',
        type=cli.positive_int,
        default=8,
        metavar='N',
        help='images per optimiser step, all processes together',
    )
    g.add_argument(
        '--test_batch_size',
        type=cli.positive_int,
        default=8,
        metavar='N',
        help='images per validation batch and process',
    )
    g.add_argument(
        '--accumulate',
        type=cli.positive_int,
        default=1,
        metavar='PASSES',
        help="split each process's share of a batch to save memory",
    )
    _add_optimisation(g)
    cli.add_common(g)


def _add_optimisation(g: argparse._ArgumentGroup) -> None:
    g.add_argument(
        '--n_iters_per_batch',
        type=cli.positive_int,
        default=5,
        metavar='N',
        help='refinements per batch',
    )
    g.add_argument(
        '--learning_rate',
        type=cli.positive_float,
        default=1e-4,
        metavar='RATE',
        help='constant learning rate',
    )
    g.add_argument('--optim_name', choices=('ranger', 'adam'), default='ranger', help='optimiser')
    g.add_argument(
        '--amp',
        choices=sorted(AMP_DTYPES),
        default='no',
        help='mixed precision: bf16 (CPU or GPU) or fp16 (GPU)',
    )
    g.add_argument(
        '--n_clusters', type=int, metavar='N', help='accepted for old command lines; has no effect'
    )


def _add_records(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group('records')
    g.add_argument(
        '--image_interval',
        type=cli.positive_int,
        default=100,
        metavar='STEPS',
        help='training sample sheets',
    )
    g.add_argument(
        '--board_interval',
        type=cli.positive_int,
        default=50,
        metavar='STEPS',
        help='training losses',
    )
    g.add_argument(
        '--val_interval',
        type=cli.positive_int,
        default=1000,
        metavar='STEPS',
        help='validation, best_model.pt and resumable state',
    )
    g.add_argument(
        '--save_interval',
        type=cli.positive_int,
        metavar='STEPS',
        help='iteration_<step>.pt (default: only the last step)',
    )
    g.add_argument(
        '--half_export',
        action='store_true',
        help="store the encoder's weights in best_model.pt and iteration_<step>.pt as float16",
    )
    g.add_argument(
        '--keep_states', type=cli.positive_int, default=2, metavar='N', help='resumable states kept'
    )
    g.add_argument(
        '--resume',
        nargs='?',
        const='newest',
        metavar='FILE',
        help='go on from the newest state in --exp_dir, or from a state file',
    )
    g.add_argument(
        '--max_minutes',
        type=cli.positive_float,
        metavar='MIN',
        help='stop in good order after that time; go on with --resume',
    )


def check_options(opts: argparse.Namespace) -> None:
    """UserError for flags that contradict each other, or ask for what cannot be."""
    if opts.id_lambda > 0 and opts.moco_lambda > 0:
        raise UserError('--id_lambda and --moco_lambda exclude each other; set one of them to 0')
    if opts.id_lambda > 0:
        raise UserError(
            '--id_lambda: the identity loss compares faces, and photographs of the '
            'retina have none; set it to 0 and use --moco_lambda'
        )
    if not opts.l2_lambda and not opts.lpips_lambda and not opts.moco_lambda:
        raise UserError(
            'no reconstruction loss: set --l2_lambda, --lpips_lambda or '
            '--moco_lambda (published: 1, 0.8 and 0.5)'
        )
    if opts.input_nc != 6:
        raise UserError(
            f'--input_nc {opts.input_nc}: the encoder sees the photograph and the '
            'current reconstruction, 6 channels'
        )
    if not opts.stylegan_weights and not opts.checkpoint_path:
        raise UserError('--stylegan_weights or --checkpoint_path is required')


def coach_config(opts: argparse.Namespace) -> CoachConfig:
    """The settings that the flags ask for."""
    return CoachConfig(
        batch_size=opts.batch_size,
        test_batch_size=opts.test_batch_size,
        learning_rate=opts.learning_rate,
        optim_name=opts.optim_name,
        train_decoder=opts.train_decoder,
        n_iters=opts.n_iters_per_batch,
        max_steps=opts.max_steps,
        image_interval=opts.image_interval,
        board_interval=opts.board_interval,
        val_interval=opts.val_interval,
        save_interval=opts.save_interval,
        accumulate=opts.accumulate,
        amp=opts.amp,
        mirror=opts.mirror,
        half_export=opts.half_export,
        seed=opts.seed,
        synthetic=opts.synthetic,
        latent_lambda=opts.latent_lambda,
    )
