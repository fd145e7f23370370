"""Lesions of one eye by the international clinical diabetic retinopathy scale."""

import math

import numpy as np

from datasets.phantoms.traits import Mark
from datasets.phantoms.vessels import VesselTree


class LesionPlan:
    """Draws the lesions of one eye (right-eye coordinates) for a DR grade."""

    def __init__(
        self, rng: np.random.Generator, grade: int, disc: tuple[float, float], tree: VesselTree
    ) -> None:
        self.rng, self.disc, self.tree = rng, disc, tree
        self.marks: list[Mark] = []
        self.beading = 0.0
        u = rng.uniform

        def count(low: int, high: int) -> int:
            return int(rng.integers(low, high))

        if grade == 1:
            self._microaneurysms(count(3, 9))
        elif grade == 2:
            self._microaneurysms(count(8, 26))
            self._haemorrhages(count(3, 14))
            if u() < 0.6:
                self._exudates(count(1, 4))
            if u() < 0.35:
                self._cotton_wool(count(1, 4))
        elif grade == 3:
            self._microaneurysms(count(20, 50))
            self._haemorrhages(count(32, 70), quadrants=True)
            self.beading = u(0.22, 0.4)
            if u() < 0.6:
                self._exudates(count(1, 5))
            if u() < 0.75:
                self._cotton_wool(count(2, 7))
        elif grade == 4:
            self._microaneurysms(count(15, 40))
            self._haemorrhages(count(15, 50))
            self.beading = u(0.0, 0.35)
            if u() < 0.5:
                self._exudates(count(1, 4))
            if u() < 0.5:
                self._cotton_wool(count(1, 5))
            self._proliferation()

    def _place(
        self, low: float = 2.2, high: float = 19.0, near: tuple[float, float] = (2.5, 0.0)
    ) -> tuple[float, float]:
        """A point of the field off the disc, between two distances from `near`."""
        while True:
            r = math.sqrt(self.rng.uniform(low**2, high**2))
            t = self.rng.uniform(0, 2 * math.pi)
            x, y = near[0] + r * math.cos(t), near[1] + r * math.sin(t)
            if math.hypot(x - self.disc[0], y - self.disc[1]) > 3.6:
                return x, y

    def _add(
        self,
        kind: str,
        x: float,
        y: float,
        a: float,
        b: float | None = None,
        angle: float = 0.0,
        strength: float = 1.0,
        roughness: float = 0.0,
    ) -> None:
        wobble = tuple(
            (roughness * self.rng.standard_normal() / (k - 0.6), self.rng.uniform(0, 2 * math.pi))
            for k in (2, 3, 4, 5)
        )
        self.marks.append(Mark(kind, x, y, a, a if b is None else b, angle, strength, wobble))

    def _microaneurysms(self, n: int) -> None:
        for _ in range(n):
            x, y = self._place(1.2, 15.0)
            self._add(
                'microaneurysm',
                x,
                y,
                self.rng.uniform(0.12, 0.21),
                strength=self.rng.uniform(0.7, 1.1),
            )

    def _haemorrhages(self, n: int, quadrants: bool = False) -> None:
        for i in range(n):
            x, y = self._place(2.5, 18.5)
            if quadrants:  # spread over all four, around the fovea
                x = math.copysign(x, (-1, 1)[i % 2]) if abs(x) < 11 else x
                y = math.copysign(y, (-1, 1)[i // 2 % 2])
            kind = self.rng.random()
            if kind < 0.5:
                self._add(
                    'dot_haemorrhage',
                    x,
                    y,
                    self.rng.uniform(0.2, 0.36),
                    roughness=0.15,
                    strength=self.rng.uniform(0.7, 1.0),
                )
            elif kind < 0.85:
                a = self.rng.uniform(0.4, 0.95)
                self._add(
                    'blot_haemorrhage',
                    x,
                    y,
                    a,
                    a * self.rng.uniform(0.6, 1.0),
                    self.rng.uniform(0, math.pi),
                    self.rng.uniform(0.55, 0.95),
                    0.12,
                )
            else:
                # Flames follow the nerve fibres, which run from the disc around the macula.
                angle = math.atan2(y - self.disc[1], x - self.disc[0]) + self.rng.normal(0, 0.25)
                a = self.rng.uniform(0.7, 1.5)
                self._add(
                    'flame_haemorrhage',
                    x,
                    y,
                    a,
                    a * self.rng.uniform(0.22, 0.38),
                    angle,
                    self.rng.uniform(0.5, 0.85),
                    0.15,
                )

    def _exudates(self, n_clusters: int) -> None:
        for _ in range(n_clusters):
            cx, cy = self._place(2.0, 9.0, (0.0, 0.0))
            ring = self.rng.random() < 0.5
            radius = self.rng.uniform(0.9, 2.4)
            start, arc = self.rng.uniform(0, 2 * math.pi), self.rng.uniform(2.5, 6.3)
            for _ in range(self.rng.integers(7, 34)):
                if ring:
                    t = start + arc * self.rng.random()
                    r = radius * self.rng.normal(1, 0.1)
                    x, y = cx + r * math.cos(t), cy + r * math.sin(t)
                else:
                    x = cx + 0.4 * radius * self.rng.standard_normal()
                    y = cy + 0.4 * radius * self.rng.standard_normal()
                if math.hypot(x - self.disc[0], y - self.disc[1]) > 3.2:
                    self._add(
                        'hard_exudate',
                        x,
                        y,
                        0.09 + 0.14 * self.rng.random() ** 2,
                        strength=self.rng.uniform(0.6, 1.0),
                    )

    def _cotton_wool(self, n: int) -> None:
        for _ in range(n):
            x, y = self._place(3.8, 11.0, self.disc)
            angle = math.atan2(y - self.disc[1], x - self.disc[0]) + math.pi / 2
            a = self.rng.uniform(0.5, 1.05)
            self._add(
                'cotton_wool_spot',
                x,
                y,
                a,
                a * self.rng.uniform(0.5, 0.8),
                angle,
                self.rng.uniform(0.45, 0.85),
                0.3,
            )

    def _proliferation(self) -> None:
        """New vessels at the disc or elsewhere, often with preretinal blood."""
        at_disc = self.rng.random() < 0.45
        for i in range(self.rng.integers(1, 4)):
            if at_disc and i == 0:
                x, y = self.disc
                x, y = x - self.rng.uniform(-1, 1.8), y + self.rng.uniform(-1.5, 1.5)
            else:
                trunks = [v for v in self.tree.vessels if v.vein and v.width[0] > 0.3]
                trunk = trunks[self.rng.integers(len(trunks))].points
                x, y = trunk[
                    self.rng.integers(8, max(9, min(len(trunk), 40))) if len(trunk) > 9 else -1
                ]
            reach = self.rng.uniform(1.2, 2.6)
            self.tree.new_vessels(x, y, reach)
            self._add('new_vessels', x, y, reach)
        if self.rng.random() < 0.6:
            x, y = self._place(4.0, 13.0)
            a = self.rng.uniform(1.6, 3.8)
            self._add(
                'preretinal_haemorrhage',
                x,
                y,
                a,
                a * self.rng.uniform(0.45, 0.8),
                0.0,
                self.rng.uniform(0.8, 1.0),
                0.08,
            )
        if self.rng.random() < 0.35:
            x, y = self._place(4.0, 12.0, self.disc)
            self._add(
                'fibrous_tissue',
                x,
                y,
                self.rng.uniform(1.2, 2.6),
                self.rng.uniform(0.25, 0.6),
                self.rng.uniform(0, math.pi),
                self.rng.uniform(0.4, 0.7),
                0.5,
            )
