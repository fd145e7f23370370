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


def fine_bands(x: Tensor, n: int = 2) -> Tensor:
    """The n finest bands of pictures [N, C, S, S], all at full size: [N, n C, S, S].

    S: a multiple of 2^n.
    """
    levels, small = [x], x
    for i in range(n):
        small = _halve(small)
        smooth = small
        for _ in range(i + 1):
            smooth = F.interpolate(smooth, scale_factor=2, mode='bilinear', align_corners=False)
        levels.append(smooth)
    return torch.cat([a - b for a, b in zip(levels, levels[1:])], 1)


def fine_deviations(x: Tensor) -> list[float]:
    """Standard deviations of the `fine_bands` in the middle quarter of pictures [N, C, S, S].

    Away from the rim of the field of view, whose edge is stronger than anything in it.
    """
    middle = slice(x.shape[-1] // 4, 3 * x.shape[-1] // 4)
    return [float(b.std()) for b in fine_bands(x)[..., middle, middle].chunk(2, 1)]


def texture(x: Tensor) -> Tensor:
    """Mean energies of each picture's green channel in its three finest bands, [N, 12].

    x: [N, 3, S, S]. What is darker than its surroundings (vessels, haemorrhages) and what is
    brighter count apart; each under a Hann window over the whole picture, which hides the rim of
    the field of view, and under one over its central half, where the disc's bright edge is not.
    """
    side = x.shape[-1]
    windows = []
    for part in (side, side // 2):
        line = torch.hann_window(part, periodic=False, device=x.device, dtype=x.dtype)
        windows.append(F.pad(line[:, None] * line, [(side - part) // 2] * 4))
    fine = fine_bands(x[:, 1:2], 3)
    parts = torch.stack([fine, -fine], 2).clamp_min(0).flatten(1, 2)
    return (parts[:, :, None] * torch.stack(windows)).square().mean((3, 4)).flatten(1)


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
