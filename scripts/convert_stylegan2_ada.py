"""Converts a StyleGAN2 generator to this project's .pt format, with its discriminator if present.

Takes NVIDIA's StyleGAN2-ADA .pkl (no code in it is run) and .pt files of PyTorch ports that hold
a "g_ema" entry, trainer checkpoints included.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.stylegan2 import Generator
from models.stylegan2.checkpoint import (
    discriminator_from_state,
    generator_from_state,
    latent_average,
)
from models.stylegan2.nvidia_pickle import convert, read_pickle
from utils import cli
from utils.errors import UserError
from utils.io import load_weights, save_torch
from utils.leftovers import remove_leftovers
from utils.logs import setup_logging
from utils.seeds import seed_everything, torch_generator

_REMEDY = 'Give a .pt file that holds the weights of a StyleGAN2 under the usual key names.'

EPILOG = """examples:
  python scripts/convert_stylegan2_ada.py --source network-snapshot.pkl --dest generator.pt
  python scripts/convert_stylegan2_ada.py --source 550000.pt --dest generator.pt --no_discriminator
"""


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__, EPILOG)
    p.add_argument('--source', '--network', required=True, metavar='FILE', help='.pkl or .pt')
    p.add_argument('--dest', required=True, metavar='FILE', help='the .pt file to write')
    p.add_argument(
        '--no_discriminator',
        action='store_true',
        help='leave out what only further training needs ("d" and "g")',
    )
    p.add_argument(
        '--latent_samples',
        type=cli.positive_int,
        default=100_000,
        metavar='N',
        help='samples for the mean latent when the source stores none',
    )
    p.add_argument('--overwrite', action='store_true', help='replace an existing --dest')
    return cli.add_common(p)


def read_port(path: str | Path) -> dict[str, Any]:
    """A .pt file of a PyTorch port -> {'g_ema', 'latent_avg'?, 'g'?, 'd'?}."""
    # Trainer checkpoints carry their command line, a bare attribute holder; nothing else is let in.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = load_weights(path, what='generator file')
    if not isinstance(content, dict) or 'g_ema' not in content:
        raise UserError(f'{path} has no "g_ema" entry, so it is not a StyleGAN2 generator file')

    def generator(key: str) -> dict[str, Tensor]:
        net = generator_from_state(content[key], source=f'{path} ({key})', remedy=_REMEDY)
        return net.state_dict()

    weights: dict[str, Any] = {'g_ema': generator('g_ema')}
    width = weights['g_ema']['conv1.conv.modulation.weight'].shape[1]
    latent_avg = latent_average(content.get('latent_avg'), width, source=path)
    if latent_avg is not None:
        weights['latent_avg'] = latent_avg
    if 'g' in content:
        weights['g'] = generator('g')
    if 'd' in content:
        weights['d'] = discriminator_from_state(
            content['d'], source=f'{path} (d)', remedy=_REMEDY
        ).state_dict()
    return weights


@torch.no_grad()
def self_check(weights: dict[str, Any], device: torch.device, seed: int) -> Generator:
    """Runs every converted network; UserError when a value is not finite."""
    net = generator_from_state(weights['g_ema']).to(device).eval()
    draw = torch_generator(seed, 'self-check')
    z = torch.randn(2, net.style_dim, generator=draw).to(device)
    images = net(z)
    outputs = {'g_ema': images}
    if 'g' in weights:
        outputs['g'] = generator_from_state(weights['g']).to(device).eval()(z)
    if 'd' in weights:
        outputs['d'] = discriminator_from_state(weights['d']).to(device).eval()(images)
    bad = [name for name, values in outputs.items() if not torch.isfinite(values).all()]
    if bad:
        raise UserError(
            f'the converted networks give values that are not finite '
            f'({", ".join(bad)}); the source is damaged'
        )
    return net


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_logging()
    device = cli.resolve_device(args.device)
    dest = Path(args.dest)
    if dest.is_dir() or dest.suffix.lower() not in ('.pt', '.pth'):
        raise UserError(f'--dest {dest}: give the name of a file that ends in .pt')
    if dest.exists() and not args.overwrite:
        raise UserError(f'--dest {dest} already exists; give --overwrite or another name')
    remove_leftovers(dest.parent, dest.stem)
    seed_everything(args.seed, 'convert')  # ports without stored noise get fixed maps
    if Path(args.source).suffix.lower() in ('.pkl', '.pickle'):
        weights = convert(read_pickle(args.source), source=args.source)
    else:
        weights = read_port(args.source)
    if args.no_discriminator:
        weights = {k: v for k, v in weights.items() if k not in ('g', 'd')}
    net = self_check(weights, device, args.seed)
    estimated = 'latent_avg' not in weights
    if estimated:
        weights['latent_avg'] = net.mean_latent(args.latent_samples, seed=args.seed).cpu()
    save_torch(dest, weights)
    channels = ', '.join(f'{r}: {c}' for r, c in net.channels.items())
    print(
        f'{dest}: {net.size} px, {net.n_mlp} mapping layers, style width {net.style_dim}, '
        f'channels {{{channels}}}; holds {", ".join(sorted(weights))}'
        + (' (mean latent estimated)' if estimated else '')
    )
    return 0


if __name__ == '__main__':
    cli.run(main)
