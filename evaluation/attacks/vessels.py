"""The vessel attack: is somebody's vascular tree to be seen in a release picture?

Vessel maps (multi-scale ridges of the green channel, Sato's filter) are compared by normalised
cross-correlation over all small shifts and a few rotations, which registers two photographs of
the same eye that differ in gaze. Pictures are uint8 [n, 3, S, S].
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from scipy.fft import next_fast_len
from skimage.filters import gaussian, sato
from torch import Tensor

from evaluation.attacks.nearest import not_empty
from evaluation.registry import Scorer, attack
from evaluation.study import Study

ROTATIONS = (-6.0, -3.0, 0.0, 3.0, 6.0)  # degrees that a head tilts between photographs
MAX_SHIFT = 0.12  # of the side: how far gaze moves the picture
_BATCH = 64


class Ridges(NamedTuple):
    """strength: how dark a ridge a pixel lies on, relative to the brightness around it, float32
    [n, S, S], 0 outside `field`. field: bool [n, S, S], the field of view without its rim.
    """

    strength: np.ndarray
    field: np.ndarray


def vessel_ridges(pictures: UInt8[np.ndarray, 'n 3 S S']) -> Ridges:
    """Ridges of the green channel of uint8 pictures [n, 3, S, S], black outside the eye."""
    side = pictures.shape[-1]
    shape = (len(pictures), *pictures.shape[2:])
    found = Ridges(np.empty(shape, np.float32), np.empty(shape, bool))
    sigmas = np.array([1 / 160, 1 / 80]) * side
    for i, picture in enumerate(pictures):
        green = picture[1].astype(np.float64) / 255
        inside = picture.max(0) > 12
        # Illumination differs between visits: divide by the local brightness.
        weight = gaussian(inside.astype(np.float64), side / 16) + 1e-3
        green = np.where(inside, green, 0)
        level = gaussian(green, side / 16) / weight
        flat = np.where(inside, green / (level + 1e-3), 1.0)
        ridges = sato(flat, sigmas=np.maximum(sigmas, 0.6), black_ridges=True, mode='nearest')
        # The rim of the field of view is an edge of its own.
        found.field[i] = gaussian(inside.astype(np.float64), side / 32) > 0.98
        found.strength[i] = ridges * found.field[i]
    return found


def vessel_maps(pictures: UInt8[np.ndarray, 'n 3 S S']) -> Float32[np.ndarray, 'n S S']:
    """Vessel strength, float32 [n, S, S], each with mean 0 and unit norm.

    A picture without any structure gives zeros.
    """
    maps = vessel_ridges(pictures).strength.astype(np.float64)
    maps -= maps.mean((1, 2), keepdims=True)
    norm = np.linalg.norm(maps, axis=(1, 2), keepdims=True)
    return np.divide(maps, norm, out=np.zeros_like(maps), where=norm > 0).astype(np.float32)


def best_correlations(
    queries: Float[np.ndarray, 'n S S'],
    pool: Float[np.ndarray, 'm S S'],
    *,
    device: torch.device | str = 'cpu',
) -> Float[np.ndarray, 'n m']:
    """Highest correlation of maps [n, S, S] with maps [m, S, S] over shifts and rotations: [n, m].

    Computed with FFTs; zero padding keeps shifts from wrapping round.
    """
    side = queries.shape[-1]
    reach = int(MAX_SHIFT * side)
    size = next_fast_len(side + reach, real=True)  # wide enough for shifts up to `reach`
    near = torch.tensor([*range(reach + 1), *range(size - reach, size)], device=device)
    pool = torch.fft.rfft2(torch.from_numpy(pool).to(device), s=(size, size)).conj()
    found = torch.full((len(queries), len(pool)), -1.0, device=device)
    for start in range(0, len(queries), _BATCH):
        part = torch.from_numpy(queries[start : start + _BATCH]).to(device)
        for angle in ROTATIONS:
            spectra = torch.fft.rfft2(_rotated(part, angle), s=(size, size))
            for i, spectrum in enumerate(spectra):
                surface = torch.fft.irfft2(spectrum * pool, s=(size, size))
                best = surface[:, near[:, None], near].amax((1, 2))
                row = found[start + i]
                torch.maximum(row, best, out=row)
    return found.cpu().numpy()


def _rotated(maps: Float[Tensor, 'n S S'], degrees: float) -> Float[Tensor, 'n S S']:
    """maps [n, S, S] turned about their centre; what comes from outside is 0."""
    angle = np.deg2rad(degrees)
    grid = torch.tensor(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]],
        dtype=torch.float32,
        device=maps.device,
    )
    where = torch.nn.functional.affine_grid(
        grid.expand(len(maps), 2, 3), [len(maps), 1, *maps.shape[1:]], align_corners=False
    )
    return torch.nn.functional.grid_sample(maps[:, None], where, align_corners=False)[:, 0]


class VesselAttack:
    """The attack on any number of releases of the same people.

    members, nonmembers, reference: pictures of members, of people who are in no release, and of
    people the attacker knows not to be. UserError when a set is empty.
    """

    def __init__(
        self,
        members: UInt8[np.ndarray, 'm 3 S S'],
        nonmembers: UInt8[np.ndarray, 'n 3 S S'],
        reference: UInt8[np.ndarray, 'r 3 S S'],
        *,
        device: torch.device | str = 'cpu',
    ) -> None:
        self.device = device
        not_empty(members=members, nonmembers=nonmembers, reference=reference)
        self.people = [vessel_maps(p) for p in (members, nonmembers)]
        reference = vessel_maps(reference)
        self.usual = [self._best(p, reference) for p in self.people]

    def _best(
        self, people: Float[np.ndarray, 'n S S'], pool: Float[np.ndarray, 'm S S']
    ) -> Float[np.ndarray, ' n']:
        return best_correlations(people, pool, device=self.device).max(1)

    def scores(
        self, release: UInt8[np.ndarray, 'c 3 S S']
    ) -> tuple[Float[np.ndarray, ' m'], Float[np.ndarray, ' n']]:
        """Of members [m] and others [n]: best match in the release minus that in the reference."""
        not_empty(release=release)
        pool = vessel_maps(release)
        return tuple(self._best(p, pool) - usual for p, usual in zip(self.people, self.usual))


@attack('vessel', 'vessel maps after registration')
def vessel(study: Study) -> Scorer:
    """Sees a person's vascular tree."""
    return VesselAttack(study.members, study.nonmembers, study.reference).scores
