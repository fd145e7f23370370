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

from models.encoders import PROGRESSIVE_ENCODERS
from models.psp import PSP
from scripts import train_restyle_psp
from training.coach_restyle_e4e import E4ECoach, E4EConfig, E4EOptions, progressive_steps
from utils import cli, options
from utils.options import add_flags

DEFAULT_ENCODER = 'ProgressiveBackboneEncoder'


def build_parser(
    doc: str = __doc__, default_encoder: str = DEFAULT_ENCODER
) -> argparse.ArgumentParser:
    """The flags of an e4e training; doc: what its script says of itself."""
    p = train_restyle_psp.build_parser(doc, PROGRESSIVE_ENCODERS, default_encoder)
    add_flags(p, E4EOptions)
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


def e4e_config(opts: argparse.Namespace, psp: PSP) -> E4EConfig:
    """The settings of e4e that the flags ask for; UserError when they do not fit the networks."""
    steps = progressive_steps(
        psp.decoder.n_latent,
        given=opts.progressive_steps,
        start=opts.progressive_start,
        every=opts.progressive_step_every,
    )
    return options.build(E4EConfig, {**vars(opts), 'progressive_steps': steps})


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)

    def make_coach(psp: PSP, *arguments: Any, **options: Any) -> E4ECoach:
        return E4ECoach(psp, *arguments, e4e=e4e_config(opts, psp), **options)

    return train_restyle_psp.train(opts, make_coach, DEFAULT_ENCODER)


if __name__ == '__main__':
    cli.run(main)
