"""Two small maps of a picture, in which copies are looked for: tone and detail."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Num, UInt8
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_matrix
from scipy.stats import rankdata

SIDE = 32
_STEP = 4  # grey levels that count as equal, so that noise in black gets no ranks

Features = np.ndarray  # float32 [F, S, S]


def features(pixels: UInt8[np.ndarray, 'H W 3']) -> Features:
    """Tone and detail of a picture uint8 [H, W, 3], float32 [2, 32, 32] in [-0.5, 0.5]."""
    small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=np.float64).mean(2)
    detail = grey - gaussian_filter(grey, 2.0, mode='nearest')
    return np.stack([_ranks(grey, _STEP), _ranks(detail, _STEP / 4)]).astype(np.float32)


def _ranks(values: Num[np.ndarray, '*s'], step: float) -> Num[np.ndarray, '*s']:
    ranks = rankdata(np.round(values / step)).reshape(values.shape)
    return ranks / values.size - 0.5


def bilinear(
    u: Float[np.ndarray, '*s'], v: Float[np.ndarray, '*s'], side: int
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """(rows, columns, weights) that read a map at u, v in [-0.5, 0.5], and where it is there."""
    px, py = (u + 0.5) * side - 0.5, (v + 0.5) * side - 0.5
    inside = (np.abs(u) <= 0.5) & (np.abs(v) <= 0.5)
    px, py = np.clip(px, 0, side - 1), np.clip(py, 0, side - 1)
    x0, y0 = (np.minimum(np.floor(p).astype(int), side - 2) for p in (px, py))
    fx, fy = px - x0, py - y0
    rows = np.tile(np.arange(len(u)), 4)
    columns = np.concatenate([(y0 + j) * side + x0 + i for j in (0, 1) for i in (0, 1)])
    weights = np.concatenate(
        [(fy if j else 1 - fy) * (fx if i else 1 - fx) for j in (0, 1) for i in (0, 1)]
    )
    return (rows, columns, weights), inside


def sampling_matrix(
    readings: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], points: int, side: int
) -> csr_matrix:
    """Several readings of `points` places each (`bilinear`) as [readings * points, side * side]."""
    rows, columns, values = (
        np.concatenate(parts)
        for parts in zip(*((r + i * points, c, w) for i, (r, c, w) in enumerate(readings)))
    )
    shape = (len(readings) * points, side * side)
    return csr_matrix((values, (rows, columns)), shape=shape, dtype=np.float32)


def stacked(maps: Sequence[Float[np.ndarray, 'S S']]) -> Float32[np.ndarray, 'n P']:
    """Maps [S, S], one under the other: [n, S * S]."""
    return np.stack(maps).reshape(len(maps), -1).astype(np.float32)
