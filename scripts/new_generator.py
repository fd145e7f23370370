"""Writes an untrained generator, for trainings that begin with none.

    python scripts/new_generator.py --channels 256 256 256 96 48 16 --dest=untrained128.pt

The channels of 4 px, 8 px and so on say its size too. It adds no noise to its pictures, and begins
with pale ones.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models.stylegan2 import Generator
from utils import cli
from utils.errors import UserError
from utils.io import save_torch
from utils.seeds import seed_everything

_FIRST_COLOUR = 0.1  # of the usual to-RGB weights, whose pictures leave [-1, 1] by far


def untrained(channels: Sequence[int], *, n_mlp: int, style_dim: int, seed: int) -> Generator:
    """A generator with `channels` at 4 px, 8 px and so on; ValueError when there are too few."""
    table = {4 * 2**i: c for i, c in enumerate(channels)}
    seed_everything(seed, 'init')
    generator = Generator(max(table, default=0), style_dim=style_dim, n_mlp=n_mlp, channels=table)
    with torch.no_grad():
        for layer in (generator.to_rgb1, *generator.to_rgbs):
            layer.conv.weight.mul_(_FIRST_COLOUR)
    return generator


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
    p.add_argument(
        '--channels',
        type=cli.positive_int,
        nargs='+',
        required=True,
        metavar='N',
        help='channels at 4 px, 8 px and so on to the size of the pictures',
    )
    p.add_argument('--dest', type=Path, required=True, metavar='FILE', help='written whole')
    p.add_argument(
        '--map-depth',
        dest='n_mlp',
        type=cli.positive_int,
        default=2,
        metavar='N',
        help='layers of the mapping network',
    )
    p.add_argument(
        '--style_dim', type=cli.positive_int, default=512, metavar='N', help='length of a latent'
    )
    p.add_argument(
        '--seed', type=cli.nonnegative_int, default=0, metavar='N', help='of the weights'
    )
    return p


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    try:
        net = untrained(opts.channels, n_mlp=opts.n_mlp, style_dim=opts.style_dim, seed=opts.seed)
    except ValueError as error:
        raise UserError(f'--channels: {error}') from error
    save_torch(opts.dest, {'g_ema': net.state_dict(), 'latent_avg': net.mean_latent()})
    return 0


if __name__ == '__main__':
    cli.run(main)
