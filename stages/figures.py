"""What is measured behind the stages, and the sheets of pictures that the page shows.

Pictures are uint8 [n, 3, S, S] unless said otherwise.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from evaluation.fidelity import feature_statistics, frechet_distance
from models.psp import PSP, FrozenPSP, redraw
from utils.images import from_uint8, grid, save_png, to_uint8
from utils.seeds import numpy_generator

JUDGE = 'lite1'  # Lite0 makes pictures here, so another network judges them
_BATCH = 16
_SHOWN = 24


def distance_ratio(
    photographs: Float[np.ndarray, 'n F'], pictures: Float[np.ndarray, 'm F'], seed: int
) -> float:
    """Fréchet distance of pictures from photographs over that of photographs among themselves.

    As many pictures as photographs on each side, because the distance grows as samples shrink.
    UserError where fewer than 2 are left.
    """
    order = numpy_generator(seed, 'halves').permutation(len(photographs))
    n = min(len(photographs) // 2, len(pictures))
    first, second = photographs[order[:n]], photographs[order[n : 2 * n]]
    drawn = numpy_generator(seed, 'drawn').permutation(len(pictures))[:n]
    near = frechet_distance(*feature_statistics(first), *feature_statistics(second))
    far = frechet_distance(*feature_statistics(first), *feature_statistics(pictures[drawn]))
    return far / near


class Reconstructions(NamedTuple):
    """drawn: the photographs as the networks draw them. latents: float32 [n, L, D].

    error: mean square over that of the photographs' average picture.
    """

    drawn: UInt8[np.ndarray, 'n 3 S S']
    latents: Float[Tensor, 'n L D']
    error: float


def reconstruct(
    psp: PSP, photographs: UInt8[np.ndarray, 'n 3 S S'], n_iters: int, device: torch.device
) -> Reconstructions:
    """Photographs of the encoder's size through encoder and generator."""
    u8, latents = redraw(psp.eval().to(device), photographs, n_iters=n_iters)
    real = photographs.astype(np.float32)
    missed = np.square(u8.astype(np.float32) - real).mean()
    average = np.square(real.mean(0) - real).mean()
    return Reconstructions(u8, latents, float(missed / average))


@torch.no_grad()
def means(
    psp: PSP, latents: Float[Tensor, 'n L D'], k: int, device: torch.device, seed: int
) -> UInt8[np.ndarray, 'm 3 S S']:
    """As many pictures as latents, each of the mean of k of them by chance (of all, if fewer)."""
    rng, frozen, drawn = numpy_generator(seed, 'means'), FrozenPSP(psp.eval().to(device)), []
    k = min(k, len(latents))
    rows = np.stack([rng.permutation(len(latents))[:k] for _ in range(len(latents))])
    for i in range(0, len(rows), _BATCH):
        ws = latents[torch.from_numpy(rows[i : i + _BATCH])].mean(1).to(device)
        drawn.append(to_uint8(psp.pool(frozen.decode(ws)).clamp(-1, 1)).cpu())
    return torch.cat(drawn).numpy()


def sheet(rows: list[UInt8[np.ndarray, 'n 3 S S']], path: Path) -> None:
    """Writes pictures as a PNG, six across: row by row of each set in turn."""
    across, lines = 6, []
    n = min(_SHOWN, *(len(row) for row in rows))
    for start in range(0, n, across):
        for row in rows:
            line = from_uint8(torch.from_numpy(row[start : min(start + across, n)]))
            blank = line.new_full((across - len(line), *line.shape[1:]), 1.0)
            lines.append(torch.cat([line, blank]))
    save_png(grid(torch.cat(lines), across, fill=1.0), path)
