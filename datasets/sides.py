"""On which side of a fundus photograph the optic disc lies, found in the picture.

In an upright photograph of a right eye the disc lies right of the centre, in one of a left eye
left of it; of an inverted photograph the eye's name does not say where it is, the picture does.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter

_SIDE = 96  # working side in pixels
_INSIDE = 12  # brightest channel of a pixel of the field of view, of 255
_DISC, _AROUND = 0.03, 0.10  # widths of the blurs, in sides: of a disc and of what is round it
_VESSEL, _TRUNK = 0.008, 0.045  # of a vessel, and of the bundle of them on the disc
_VESSEL_WEIGHT = 0.5
_HEIGHT, _NEAR, _FAR = 0.30, 0.08, 0.42  # where a disc can be, from the centre, in sides


class DiscPlace(NamedTuple):
    """x, y: from the centre, in sides, -0.5 to 0.5, y downwards. margin: how much more like a
    disc the place is than the best one on the other side, in standard deviations of the picture.
    """

    x: float
    y: float
    margin: float


def find_disc(image: Image.Image) -> DiscPlace:
    """The most likely place of the optic disc in a photograph cropped to its field of view.

    A disc is brighter than what is round it, and vertical vessels run over it. There is always
    an answer; of pictures centred on the disc it says nothing.
    """
    pixels = np.asarray(image.convert('RGB').resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))
    inside = pixels.max(2) > _INSIDE
    field = _blur(inside, _DISC) > 0.98  # without the rim, an edge of its own
    colours = pixels.astype(np.float64) / 255
    bright = _blur(_flat((colours[..., 0] + colours[..., 1]) / 2, inside), _DISC)
    curvature = gaussian_filter(
        _flat(colours[..., 1], inside, _AROUND / 2), _VESSEL * _SIDE, order=(0, 2)
    )
    trunk = _blur(np.clip(curvature, 0, None), _TRUNK)
    score = _standardised(bright, field) + _VESSEL_WEIGHT * _standardised(trunk, field)
    at = (np.arange(_SIDE) + 0.5) / _SIDE - 0.5
    away = np.abs(at)
    possible = field & (away[:, None] < _HEIGHT) & (away > _NEAR) & (away < _FAR)
    score = np.where(possible, score, score.min() - 1)
    best = score.max(0)  # of each column
    half = _SIDE // 2
    left, right = best[:half].max(), best[half:].max()
    row, column = np.unravel_index(score.argmax(), score.shape)
    return DiscPlace(float(at[column]), float(at[row]), float(abs(right - left)))


def _blur(values: Shaped[np.ndarray, 'H W'], width: float) -> Float[np.ndarray, 'H W']:
    return gaussian_filter(values.astype(np.float64), width * _SIDE)


def _flat(
    values: Float[np.ndarray, 'H W'], inside: Shaped[np.ndarray, 'H W'], width: float = _AROUND
) -> Float[np.ndarray, 'H W']:
    """Values relative to those around them in the field of view, 1 outside it."""
    level = _blur(values * inside, width) / (_blur(inside, width) + 1e-3)
    return np.where(inside, values / (level + 0.02), 1.0)


def _standardised(
    values: Float[np.ndarray, 'H W'], field: Bool[np.ndarray, 'H W']
) -> Float[np.ndarray, '...']:
    seen = values[field]
    return (values - seen.mean()) / (seen.std() + 1e-6) if seen.size else np.zeros_like(values)


def disc_to_the_right(image: Image.Image) -> tuple[Image.Image, bool]:
    """The photograph, mirrored when its disc lies left of the centre, and whether it was."""
    turned = find_disc(image).x < 0
    return (ImageOps.mirror(image) if turned else image), turned


def shown_sides(pictures: UInt8[np.ndarray, 'n 3 S S']) -> list[str]:
    """'left' or 'right' [n]: the eye that each picture looks like, by the place of its disc."""
    images = (Image.fromarray(np.ascontiguousarray(p.transpose(1, 2, 0))) for p in pictures)
    return ['left' if find_disc(image).x < 0 else 'right' for image in images]


def as_right_eyes(
    pictures: UInt8[np.ndarray, 'n 3 S S'], eyes: Sequence[str] | None
) -> UInt8[np.ndarray, 'n 3 S S']:
    """Photographs with left eyes mirrored, as the main job mirrors them.

    eyes [n]: 'left', 'right' or '', where the place of the optic disc tells; None: everywhere.
    """
    turned = np.array(pictures)
    for i, picture in enumerate(pictures):
        eye = (eyes[i] if eyes else '') or shown_sides(picture[None])[0]
        if eye == 'left':
            turned[i] = picture[..., ::-1]
    return turned
