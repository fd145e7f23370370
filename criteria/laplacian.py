"""Distances of pictures band by band of their frequencies.

Squared errors of whole pictures are almost all colour and shade; vessels and small lesions weigh
next to nothing. Here each band counts by how much of its variance over photographs is missed.
Source of the bands: Burt and Adelson 1983; as a loss of generators: Bojanowski et al. 2018.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

N_BANDS = 4
_TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def _halve(x: Tensor) -> Tensor:
    taps = torch.tensor(_TAPS, device=x.device, dtype=x.dtype)
    kernel = (taps[:, None] * taps).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, [2] * 4, mode='replicate'), kernel, stride=2, groups=x.shape[1])


def bands(x: Tensor) -> list[Tensor]:
    """Pictures [N, C, S, S] -> bands [N, C, S / 2^i, S / 2^i], fine to coarse, and the rest.

    S: a multiple of 16.
    """
    found = []
    for _ in range(N_BANDS):
        low = _halve(x)
        found.append(x - F.interpolate(low, scale_factor=2, mode='bilinear', align_corners=False))
        x = low
    return [*found, x]


def rest(x: Tensor) -> Tensor:
    """The last of the `bands`, [N, C, S / 16, S / 16]: colours and shades."""
    for _ in range(N_BANDS):
        x = _halve(x)
    return x


def band_variances(x: Tensor) -> list[float]:
    """The variance over pictures [N, C, S, S] of each of their bands, mean over positions."""
    return [float((b - b.mean(0)).square().mean()) for b in bands(x)]


def band_errors(y: Tensor, wanted: Sequence[Tensor], variances: Sequence[float]) -> list[Tensor]:
    """The share of its variance that each band of y [N, C, S, S] misses: [N] each, 0 the best.

    wanted: `bands` of the pictures y is to be.
    """
    return [(a - b).square().mean((1, 2, 3)) / v for a, b, v in zip(bands(y), wanted, variances)]
