"""Trains the ReStyle-e4e encoder, whose latents stay near the generator's own.

    python scripts/train_restyle_e4e.py --dataset_type=aptos_encode \\
        --encoder_type=ResNetProgressiveBackboneEncoder --exp_dir=runs/e4e --output_size=512 \\
        --workers=8 --batch_size=8 --test_batch_size=8 --test_workers=8 \\
        --start_from_latent_avg --lpips_lambda=0.8 --l2_lambda=1 --moco_lambda=0.5 \\
        --delta_norm_lambda=0.0002 --use_w_pool --w_discriminator_lambda=0.1 \\
        --progressive_start=20000 --progressive_step_every=2000 --input_nc=6 \\
        --n_iters_per_batch=5 --stylegan_weights=runs/gan/generator.pt

A small run on a CPU: --encoder_type=LightProgressiveEncoder --encoder_size=64 and the flags of
scripts/train_restyle_psp.py, whose run folder, resuming and processes are the same. Checkpoints are
used by the other scripts like those of pSp.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dataclasses

from models.encoders import PROGRESSIVE_ENCODERS
from models.psp import PSP
from scripts import train_restyle_psp
from training.coach_restyle_e4e import E4ECoach, E4EConfig, progressive_steps
from utils import cli

DEFAULT_ENCODER = 'ProgressiveBackboneEncoder'


def build_parser(
    doc: str = __doc__, default_encoder: str = DEFAULT_ENCODER
) -> argparse.ArgumentParser:
    """The flags of an e4e training; doc: what its script says of itself."""
    p = train_restyle_psp.build_parser(doc, PROGRESSIVE_ENCODERS, default_encoder)
    _add_discriminator(p)
    _add_deltas(p)
    g = p.add_argument_group('old command lines')
    g.add_argument(
        '--resume_training_from_ckpt',
        dest='resume',
        metavar='FILE',
        help='the same as --resume FILE',
    )
    for name in ('save_training_data', 'keep_optimizer'):
        g.add_argument(
            f'--{name}', action='store_true', help='accepted; states to go on from are always kept'
        )
    return p


def _add_discriminator(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group('latent discriminator')
    g.add_argument(
        '--w_discriminator_lambda',
        type=cli.nonnegative_float,
        default=0.0,
        metavar='WEIGHT',
        help='weight of its loss; 0: there is none (published: 0.1)',
    )
    g.add_argument(
        '--w_discriminator_lr',
        type=cli.positive_float,
        default=2e-5,
        metavar='RATE',
        help='its learning rate',
    )
    g.add_argument(
        '--r1',
        type=cli.nonnegative_float,
        default=10.0,
        metavar='WEIGHT',
        help='weight of its gradient penalty',
    )
    g.add_argument(
        '--d_reg_every',
        type=cli.positive_int,
        default=16,
        metavar='STEPS',
        help='steps between two penalties',
    )
    g.add_argument('--use_w_pool', action='store_true', help='show it latents of earlier steps too')
    g.add_argument(
        '--w_pool_size',
        type=cli.positive_int,
        default=50,
        metavar='N',
        help='how many of them are kept',
    )


def _add_deltas(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group('deltas')
    g.add_argument(
        '--delta_norm',
        type=cli.positive_int,
        default=2,
        metavar='P',
        help='which norm of the deltas is held small',
    )
    g.add_argument(
        '--delta_norm_lambda',
        type=cli.nonnegative_float,
        default=2e-4,
        metavar='WEIGHT',
        help='weight of that norm',
    )
    g.add_argument(
        '--progressive_start',
        type=cli.nonnegative_int,
        metavar='STEP',
        help='step at which the second style gets its delta (default: all have theirs '
        'from the start, and their norm is free)',
    )
    g.add_argument(
        '--progressive_step_every',
        type=cli.positive_int,
        default=2000,
        metavar='STEPS',
        help='steps from one delta to the next',
    )
    g.add_argument(
        '--progressive_steps',
        type=cli.nonnegative_int,
        nargs='+',
        metavar='STEP',
        help='in place of the last two, the step of every style, the first 0',
    )


def e4e_config(opts: argparse.Namespace, psp: PSP) -> E4EConfig:
    """The settings of e4e that the flags ask for; UserError when they do not fit the networks."""
    steps = progressive_steps(
        psp.decoder.n_latent,
        given=opts.progressive_steps,
        start=opts.progressive_start,
        every=opts.progressive_step_every,
    )
    fields = {f.name: getattr(opts, f.name) for f in dataclasses.fields(E4EConfig)}
    return E4EConfig(**fields | {'progressive_steps': steps})


def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)

    def make_coach(psp: PSP, *arguments: Any, **options: Any) -> E4ECoach:
        return E4ECoach(psp, *arguments, e4e=e4e_config(opts, psp), **options)

    return train_restyle_psp.train(opts, make_coach, DEFAULT_ENCODER)


if __name__ == '__main__':
    cli.run(main)
