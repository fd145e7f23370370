"""One eye (what its visits share) and one visit (the camera's view of it)."""

import math

import numpy as np
from jaxtyping import Float
from PIL import Image

from datasets.phantoms.lesions import LesionPlan
from datasets.phantoms.traits import EXTENT, FIELD, FIELD_FRACTION, Traits
from datasets.phantoms.vessels import VesselTree
from utils.seeds import numpy_generator


class EyeModel:
    """Everything of one eye that its visits have in common."""

    def __init__(self, seed: int, patient: int, eye: str, grade: int) -> None:
        self.traits = traits = Traits(seed, patient)
        self.side = 1 if eye == 'right' else -1
        self.grade = grade
        keys = patient, eye
        rng = numpy_generator(seed, 'phantom-eye', *keys)
        self.disc = (
            traits.disc_distance + rng.normal(0, 0.2),
            traits.disc_rise + rng.normal(0, 0.2),
        )
        self.disc_axes = (
            traits.disc_width / 2 * rng.uniform(0.97, 1.03),
            traits.disc_height / 2 * rng.uniform(0.97, 1.03),
        )
        self.disc_tilt = rng.normal(0, 0.12)
        self.cup = float(np.clip(traits.cup + rng.normal(0, 0.03), 0.2, 0.7))
        self.crescent = rng.uniform(0.1, 0.7) * (rng.random() < 0.3)
        self.reflex = rng.uniform(0.05, 0.2) * (rng.random() < 0.4)
        self.ring = rng.uniform(0.02, 0.07) * (rng.random() < 0.25)
        tree_rng = numpy_generator(seed, 'phantom-vessels', *keys)
        tree = VesselTree(tree_rng, traits, self.disc)
        lesions = LesionPlan(
            numpy_generator(seed, 'phantom-lesions', *keys, grade), grade, self.disc, tree
        )
        self.marks = lesions.marks
        if lesions.beading:
            tree.bead(lesions.beading)
        self.vessels = tree.vessels
        texture_rng = numpy_generator(seed, 'phantom-texture', *keys)
        self.octaves = [
            (
                cell,
                texture_rng.standard_normal((int(2 * EXTENT / cell) + 1,) * 2).astype(np.float32),
            )
            for cell in (9.0, 4.0, 1.8, 0.8, 0.35)
        ]
        self.choroid = [
            (
                cell,
                texture_rng.standard_normal((int(2 * EXTENT / cell) + 1,) * 2).astype(np.float32),
            )
            for cell in (3.2, 1.7)
        ]


class View:
    """One visit: the camera's view of an eye, and the maps between retina and picture."""

    def __init__(
        self, seed: int, patient: int, eye_name: str, visit: int, eye: EyeModel, size: int
    ) -> None:
        self.rng = rng = numpy_generator(seed, 'phantom-visit', patient, eye_name, visit)
        self.size, self.side = size, eye.side
        self.gaze = (eye.side * (FIELD[0] + rng.normal(0, 1.3)), rng.normal(0, 1.2))
        self.roll = rng.normal(0, 0.05)
        self.pixels = (size * FIELD_FRACTION / eye.traits.field_radius) * rng.uniform(0.97, 1.03)
        self.exposure = rng.normal(0, 0.10)
        self.balance = rng.normal(0, 0.025, 3)
        self.tilt = rng.normal(0, 0.09, 2)
        self.vignette = eye.traits.vignette * rng.uniform(0.8, 1.2)
        self.blur = rng.gamma(2.2, 0.018) * self.pixels  # sigma in pixels
        self.noise = rng.uniform(0.004, 0.014)
        self.veil = rng.uniform(0.02, 0.13) * (rng.random() < 0.3)
        self.veil_angle = rng.uniform(0, 2 * math.pi)

    def to_pixels(self, points: Float[np.ndarray, 'n 2']) -> Float[np.ndarray, 'n 2']:
        """[n, 2] right-eye degrees -> [n, 2] pixel coordinates (x right, y down)."""
        x = self.side * points[:, 0] - self.gaze[0]
        y = points[:, 1] - self.gaze[1]
        c, s = math.cos(self.roll), math.sin(self.roll)
        half = self.size / 2
        return np.stack(
            [half + self.pixels * (c * x - s * y), half - self.pixels * (s * x + c * y)], 1
        )

    def retina_grid(self) -> tuple[Float[np.ndarray, 'S S'], Float[np.ndarray, 'S S']]:
        """Right-eye degrees (x, y) of every pixel's centre, float32 [size, size] each."""
        offset = ((np.arange(self.size) + 0.5 - self.size / 2) / self.pixels).astype(np.float32)
        u, v = offset[None, :], -offset[:, None]
        c, s = math.cos(self.roll), math.sin(self.roll)
        return self.side * (c * u + s * v + self.gaze[0]), -s * u + c * v + self.gaze[1]

    def sample(self, cell: float, values: Float[np.ndarray, 'h w']) -> Float[np.ndarray, 'S S']:
        """A random field given on a retina grid with `cell` degrees spacing, at every pixel."""
        if cell * self.pixels < 0.8:  # finer than the pixels: it averages out
            return np.zeros((self.size, self.size), np.float32)
        k = 1 / (cell * self.pixels)
        c, s = math.cos(self.roll), math.sin(self.roll)
        half, centre = self.size / 2, EXTENT / cell + 0.5
        matrix = (
            k * c,
            -k * s,
            centre + self.gaze[0] / cell - half * k * (c - s),
            k * s,
            k * c,
            centre - self.gaze[1] / cell - half * k * (s + c),
        )
        return np.asarray(
            Image.fromarray(values).transform(
                (self.size, self.size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
            )
        )
