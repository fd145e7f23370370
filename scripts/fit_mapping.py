"""Gives a generator that was trained with its encoder a mapping network for the latents it knows.

    python scripts/fit_mapping.py --checkpoint_path=runs/joint/checkpoints/iteration_9000.pt \\
        --data=right128.zip --dest=restyle.pt

Inverts photographs and trains the mapping network to give latents of the same distribution;
encoder and synthesis stay as they are. The main job takes its automatic rate from the spread of the
mapping's latents, and scripts/generate.py draws from them.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import logging

import torch
from jaxtyping import Float
from torch import Tensor

from datasets.pictures import Pictures
from models.psp import PSP, FrozenPSP, invert, psp_checkpoint, psp_from_checkpoint
from training.mapping import fit_mapping
from utils import cli
from utils.images import from_uint8
from utils.io import load_weights, save_torch
from utils.kinds import boolean, nonnegative_int, path, positive_int
from utils.logs import setup_logging
from utils.options import add_flags, build, option

log = logging.getLogger(__name__)
_BATCH = 20


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks for."""

    checkpoint: Path = option(
        kind=path, help='ReStyle checkpoint', metavar='FILE', flag='checkpoint_path'
    )
    data: Path = option(kind=path, help='photographs of the training', metavar='DIR|ZIP')
    dest: Path = option(kind=path, help='written whole', metavar='FILE')
    n_images: int = option(
        2000, positive_int, 'how many photographs are inverted at most, the first ones', metavar='N'
    )
    steps: int = option(2000, positive_int, 'training steps', metavar='N')
    n_iters: int = option(
        1, positive_int, 'refinements by the encoder', metavar='N', flag='n_iters_per_batch'
    )
    half_export: bool = option(
        False, boolean, 'store matrices and kernels of both networks as float16'
    )
    seed: int = option(0, nonnegative_int, 'random seed', metavar='INT')


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
    add_flags(p, Request)
    cli.add_device(p)
    return p


def latents_of(
    psp: PSP, pictures: Pictures, n: int, n_iters: int, device: torch.device
) -> Float[Tensor, 'n D']:
    """The latents of the first n photographs, mean over the styles."""
    frozen, found = FrozenPSP(psp.to(device)), []
    for start in range(0, min(n, len(pictures)), _BATCH):
        rows = range(start, min(start + _BATCH, n, len(pictures)))
        u8 = torch.stack([torch.as_tensor(pictures[i]) for i in rows])
        found.append(invert(frozen, from_uint8(u8.to(device)), n_iters=n_iters).ws.mean(1))
    return torch.cat(found)


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = vars(build_parser().parse_args(argv))
    setup_logging()
    request, device = build(Request, opts), cli.resolve_device(opts['device'])
    checkpoint = load_weights(request.checkpoint, what='ReStyle checkpoint')
    psp = psp_from_checkpoint(checkpoint, source=str(request.checkpoint)).eval()
    pictures = Pictures(request.data, psp.input_size)
    with torch.no_grad():
        ws = latents_of(psp, pictures, request.n_images, request.n_iters, device)
    found = fit_mapping(psp.decoder, ws, steps=request.steps, seed=request.seed)
    log.info(
        'energy distance %.3f at first, %.3f at last; deviation of the latents %.3f',
        found[0],
        sum(found[-20:]) / len(found[-20:]),
        ws.std(0).mean(),
    )
    half = request.half_export
    half_encoder = half or any(v.dtype == torch.float16 for v in checkpoint['state_dict'].values())
    given = checkpoint.get('opts') or {}
    exported = psp_checkpoint(psp, given, half_encoder=half_encoder, half_decoder=half)
    save_torch(request.dest, exported)
    return 0


if __name__ == '__main__':
    cli.run(main)
