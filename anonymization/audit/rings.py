"""A first look through all photographs for those that a picture may be a copy of.

A map is read on rings around its middle, and each ring is split into waves. Their amplitudes are
the same however the map is turned, mirrored or inverted, so one short vector stands for all these
views; shifts and sizes are tried one by one. Two maps that are correlated by c on the disc of the
rings, in whatever turn, have vectors at most sqrt(2 - 2 |c|) apart (up to interpolation): a copy
is likely among the nearest, which a product of matrices finds among very many. That is a rank and
no bound: what nothing but the full search of all views would find can be missed.
"""

import functools
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32
from scipy.sparse import csr_matrix

from anonymization.audit.maps import SIDE, bilinear, sampling_matrix, stacked

_RADII = np.arange(1.5, 13, 1.5) / SIDE  # the disc lies within every view
_ANGLES, _WAVES = 48, 6
_STEPS = (0.0, -4 / 3, 4 / 3)  # a shift of at most 2 pixels is at most 2/3 from one of them
# Size and shift of the views, the first the picture as it is.
_VIEWS = [(1.0, dx, dy) for dx, dy in itertools.product(_STEPS, repeat=2)] + [
    (size, 0.0, 0.0) for size in (0.8, 0.9, 0.95, 1.1, 1.2)
]
_BLOCK = 1024


class Rings:
    """Amplitudes of the sources in one map."""

    def __init__(self, maps: Sequence[Float[np.ndarray, 'S S']]) -> None:
        """maps: one of each source."""
        parts = [stacked(maps[i : i + _BLOCK]) for i in range(0, len(maps), _BLOCK)]
        self.own = np.concatenate([_amplitudes(part, 1)[:, 0].T for part in parts], 1)  # [A, n]
        self.squares = (self.own**2).sum(0)

    def distances(self, query: Float32[np.ndarray, ' P']) -> Float32[np.ndarray, ' n']:
        """Squared distance [n] of each source to the nearest view of the map [S * S]."""
        views = -2 * _amplitudes(query[None], len(_VIEWS))[0]
        products = views @ self.own
        products += (views**2).sum(1, keepdims=True) / 4
        return self.squares + products.min(0)


@functools.lru_cache(maxsize=2)
def _sampling(views: int) -> csr_matrix:
    """Reads the rings of the first views of a map: [views * rings * angles, S * S]."""
    angles = 2 * np.pi * np.arange(_ANGLES) / _ANGLES
    x, y = (np.outer(_RADII, wave(angles)).ravel() for wave in (np.cos, np.sin))
    parts = [
        bilinear(x / size + dx / SIDE, y / size + dy / SIDE, SIDE)[0]
        for size, dx, dy in _VIEWS[:views]
    ]
    return sampling_matrix(parts, len(x), SIDE)


def _amplitudes(maps: Float32[np.ndarray, 'n P'], views: int) -> Float32[np.ndarray, 'n V A']:
    """[n, S * S] -> [n, views, rings * waves], of maps of mean 0 and norm 1 on the disc."""
    seen = (_sampling(views) @ maps.T).T.reshape(len(maps), views, len(_RADII), _ANGLES)
    share = (_RADII / _RADII.sum() / _ANGLES)[:, None].astype(np.float32)  # of the disc
    seen = (seen - (seen * share).sum((2, 3), keepdims=True)) * np.sqrt(share)
    seen /= np.maximum(np.sqrt((seen**2).sum((2, 3), keepdims=True)), 1e-6)
    waves = np.abs(np.fft.rfft(seen, axis=3, norm='ortho')[..., :_WAVES])
    waves[..., 1:] *= np.sqrt(2)  # each stands for a wave and its conjugate
    return waves.reshape(len(maps), views, -1).astype(np.float32)
