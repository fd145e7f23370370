"""How much vessel there is: area and length of the vessel map, release against photographs.

The vessel filter is that of the vessel attack. A vessel is where its response passes a
threshold, with all that hangs together with it above half of that; on phantoms of 64 to 256 px
these thresholds agree best with the vessels drawn (Dice 0.6). Elongated lesions count too.

Pictures are uint8 [n, 3, S, S].
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from skimage.filters import apply_hysteresis_threshold
from skimage.morphology import skeletonize

from evaluation.attacks.vessels import vessel_ridges
from evaluation.bootstrap import ratio_of_means

WEAK, STRONG = 0.03, 0.06  # of `vessel_ridges`; a thin line of 20 % contrast has about 0.06


class VesselAmount(NamedTuple):
    """area [n]: share of the field of view. length [n]: of the centre lines, in picture sides."""

    area: np.ndarray
    length: np.ndarray


def vessel_amount(pictures: UInt8[np.ndarray, 'n 3 S S']) -> VesselAmount:
    """Area and total length of the vessels of each picture; 0 where there is no field of view."""
    ridges = vessel_ridges(pictures)
    maps = np.stack([apply_hysteresis_threshold(r, WEAK, STRONG) for r in ridges.strength])
    field = ridges.field.sum((1, 2))
    area = np.divide(maps.sum((1, 2)), field, out=np.zeros(len(maps)), where=field > 0)
    length = [skeletonize(m).sum() / pictures.shape[-1] for m in maps]
    return VesselAmount(area, np.array(length))


def vessel_ratios(
    photographs: UInt8[np.ndarray, 'n 3 S S'],
    release: UInt8[np.ndarray, 'm 3 S S'],
    *,
    people: list[str] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """{'area', 'length'}: mean of a release over mean of photographs, each {value, low, high}.

    Both of one size S. people: whom each photograph shows, the unit of the interval.
    """
    if photographs.shape[-1] != release.shape[-1]:
        raise ValueError(
            f'pictures of {photographs.shape[-1]} and {release.shape[-1]} px cannot be compared'
        )
    amounts = vessel_amount(release), vessel_amount(photographs)
    return {
        name: ratio_of_means(*(getattr(a, name) for a in amounts), people=people, seed=seed)
        for name in VesselAmount._fields
    }
