"""Measures of the retina, and what the two eyes of a patient share."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from utils.seeds import numpy_generator

EXTENT = 34.0  # textures cover [-EXTENT, EXTENT] degrees
REACH = 30.0  # vessels end at this distance from the middle of the field
FIELD = (5.5, 0.0)  # the middle of a macula- and disc-showing field
STEP = 0.4  # degrees between two points of a vessel
FIELD_FRACTION = 0.492  # radius of the field of view as a part of the picture's side

# Median colours of fundus photographs: their mean in log RGB and two main directions.
_COLOUR_MEAN = np.log([0.61, 0.37, 0.225])
_COLOUR_AXES = np.array([[0.26, 0.43, 0.866], [-0.78, -0.44, 0.45]])


@dataclass(frozen=True)
class Vessel:
    points: np.ndarray  # [n, 2] degrees
    width: np.ndarray  # [n] degrees
    vein: bool


@dataclass(frozen=True)
class Mark:
    """A lesion on the retina: position and half-axes in degrees, and what it looks like."""

    kind: str
    x: float
    y: float
    a: float
    b: float
    angle: float
    strength: float
    wobble: tuple


def smoothstep(low: float, high: float, value: Float[np.ndarray, '*s']) -> Float[np.ndarray, '*s']:
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


class Traits:
    """Traits that both eyes share."""

    def __init__(self, seed: int, patient: int) -> None:
        rng = numpy_generator(seed, 'phantom-patient', patient)
        pale, dark = np.clip(rng.standard_normal(2), -1.8, 1.3)
        self.log_colour = (
            _COLOUR_MEAN
            + 0.48 * pale * _COLOUR_AXES[0]
            + 0.20 * dark * _COLOUR_AXES[1]
            + 0.04 * rng.standard_normal(3)
        )
        self.tessellation = 0.9 * rng.random() ** 2
        self.tortuosity = rng.uniform(0.6, 1.5)
        self.calibre = rng.uniform(0.88, 1.15)
        self.artery_ratio = rng.uniform(0.66, 0.8)
        self.disc_width = rng.uniform(4.7, 5.7)
        self.disc_height = self.disc_width * rng.uniform(1.03, 1.2)
        self.cup = rng.uniform(0.25, 0.62)
        self.disc_distance = rng.normal(15.4, 0.5)
        self.disc_rise = rng.normal(1.0, 0.6)
        self.macula = rng.uniform(0.18, 0.42)
        self.sheen = max(0.0, rng.normal(0.03, 0.06))
        self.field_radius = rng.uniform(22.0, 24.0)
        self.vignette = rng.uniform(0.12, 0.42)
        self.haze = rng.uniform(0.05, 0.28) * (rng.random() < 0.35)
