"""Makes a ReStyle checkpoint of twice the resolution, to train on from where the smaller one ended.

    python scripts/grow_restyle.py --checkpoint_path=pretrained_models/demo/restyle128.pt \\
        --dest=grown256.pt
    python scripts/train_restyle_joint.py --checkpoint_path=grown256.pt --encoder_size=256 ...

What it inverts and draws at first is what the smaller one does, enlarged. For encoders that read
patches: LightEncoder, LightProgressiveEncoder, LightPooledEncoder.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.psp import load_psp, psp_checkpoint
from training.restyle_growing import grow_psp
from utils import cli
from utils.errors import UserError
from utils.io import save_torch
from utils.logs import setup_logging
from utils.seeds import seed_everything

log = logging.getLogger(__name__)

_LEAST = 8  # channels of the new layers


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
    p.add_argument(
        '--checkpoint_path', type=Path, required=True, metavar='FILE', help='ReStyle checkpoint'
    )
    p.add_argument('--dest', type=Path, required=True, metavar='FILE', help='written whole')
    p.add_argument(
        '--channels',
        type=cli.positive_int,
        metavar='N',
        help='of the new layers (default: half of those of the largest, at least 8)',
    )
    p.add_argument(
        '--seed', type=cli.nonnegative_int, default=0, metavar='N', help='of the new layers'
    )
    return p


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    if opts.dest.exists():
        raise UserError(f'`dest` {opts.dest} already exists; remove it or choose another name')
    psp = load_psp(opts.checkpoint_path)
    seed_everything(opts.seed, 'init')
    last = psp.decoder.channels[psp.decoder.size]
    channels = opts.channels or max(_LEAST, last // 2)
    grown = grow_psp(psp, channels=channels, source=f'`checkpoint_path` {opts.checkpoint_path}')
    save_torch(opts.dest, psp_checkpoint(grown, {}))
    log.info(
        '%s of %d px grown to %d px, %d channels, in %s',
        type(grown.encoder).__name__,
        psp.input_size,
        grown.input_size,
        channels,
        opts.dest,
    )
    return 0


if __name__ == '__main__':
    cli.run(main)
