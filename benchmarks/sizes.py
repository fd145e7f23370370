"""Sizes of the random networks that the benchmarks time."""

import argparse

from models.stylegan2.model import channel_table
from utils.cli import positive_int, power_of_two

ENCODER_SIZE = 256


def add_sizes(p: argparse.ArgumentParser) -> None:
    """Adds --size, --encoder_size and --channels."""
    p.add_argument(
        '--size',
        type=power_of_two,
        default=256,
        metavar='PX',
        help='side of the generated pictures',
    )
    p.add_argument(
        '--encoder_size',
        type=power_of_two,
        default=ENCODER_SIZE,
        metavar='PX',
        help='side of the pictures encoder and losses see',
    )
    p.add_argument(
        '--channels',
        type=positive_int,
        default=512,
        metavar='INT',
        help="most channels of the generator's maps; fewer only to try the command",
    )


def channels_up_to(size: int, most: int) -> dict[int, int]:
    """The standard {resolution: channels} of a generator of side `size`, none above `most`."""
    return {side: min(n, most) for side, n in channel_table(size).items()}
