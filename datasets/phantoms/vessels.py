"""The vessel tree of one eye: trunks from the disc, branches by Murray's law, new vessels."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.interpolate import CubicSpline

from datasets.phantoms.traits import FIELD, REACH, STEP, Traits, Vessel

_MIN_WIDTH = 0.085  # degrees; finer twigs are not drawn
_CELL = 0.5  # degrees; two vessels of one kind do not share a cell


class VesselTree:
    """Grows the vessels of one right eye; every random number comes from `rng`."""

    def __init__(
        self, rng: np.random.Generator, patient: Traits, disc: tuple[float, float]
    ) -> None:
        self.rng, self.patient, self.disc = rng, patient, disc
        self.vessels: list[Vessel] = []
        self._cells: dict[bool, dict[tuple[int, int], int]] = {True: {}, False: {}}
        self._count = 0
        self._normals, self._uniforms = iter(()), iter(())
        self.foveal_radius = rng.uniform(1.5, 2.1)
        self._grow_all()

    def _normal(self) -> float:
        value = next(self._normals, None)
        if value is None:
            self._normals = iter(self.rng.standard_normal(4096).tolist())
            value = next(self._normals)
        return value

    def _uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        value = next(self._uniforms, None)
        if value is None:
            self._uniforms = iter(self.rng.random(4096).tolist())
            value = next(self._uniforms)
        return low + (high - low) * value

    def _grow_all(self) -> None:
        vein = 0.60 * self.patient.calibre
        artery = vein * self.patient.artery_ratio
        for up in (1, -1):
            first = self._uniform() < 0.5
            for is_vein in (True, False):
                outer = 1 if is_vein == first else -1
                width = (vein if is_vein else artery) * self._uniform(0.9, 1.1)
                self._trunk(self._temporal_path(up, outer), width, is_vein, up, temporal=True)
                nasal = (vein if is_vein else artery) * self._uniform(0.55, 0.78)
                self._trunk(self._nasal_path(up, outer), nasal, is_vein, up, temporal=False)
        for is_vein in (True, False):
            for _ in range(2):
                self._disc_twig(is_vein, towards=math.pi, spread=0.6)
            self._disc_twig(is_vein, towards=0.0, spread=0.5)

    def _temporal_path(self, up: int, outer: int) -> list[tuple[float, float]]:
        """Control points of an arcade: out of the disc, around the macula, off the field."""
        x, y = self.disc
        height = self._uniform(9.3, 13.2) + 0.7 * outer
        end = height - self._uniform(0.0, 5.5)
        lean = self._uniform(-0.8, 1.2)
        return [
            (x + 0.5 + 0.2 * outer, y + 0.15 * up),
            (x + 0.5 * lean, up * 2.6 + y),
            (x - 0.8 + lean + 0.3 * outer, up * (height * 0.52) + 0.6 * y),
            (x - 4.2 + lean + self._normal() * 0.5, up * (height * 0.82) + 0.3 * y),
            (x - 11.0 + self._normal(), up * (height + self._normal() * 0.4)),
            (x - 20.0, up * (height * 0.55 + end * 0.45)),
            (x - 34.0, up * (end - 3.0)),
        ]

    def _nasal_path(self, up: int, outer: int) -> list[tuple[float, float]]:
        x, y = self.disc
        reach = self._uniform(8.0, 13.5) - 0.8 * outer
        return [
            (x + 0.6 - 0.2 * outer, y + 0.1 * up),
            (x + 1.7 + 0.3 * outer, y + up * 1.7),
            (x + 4.5 + self._normal() * 0.3, y + up * (reach * 0.42)),
            (x + 8.5 + self._normal() * 0.5, y + up * (reach * 0.72)),
            (x + 16.0, y + up * (reach + self._normal())),
        ]

    def _trunk(
        self,
        controls: Sequence[tuple[float, float]],
        width: float,
        is_vein: bool,
        up: int,
        *,
        temporal: bool,
    ) -> None:
        controls = np.array(controls)
        chord = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(controls, axis=0).T))])
        spline = CubicSpline(chord, controls)
        t = np.arange(0, chord[-1], STEP)
        points, tangent = spline(t), spline(t, 1)
        tangent /= np.hypot(tangent[:, 0], tangent[:, 1])[:, None]
        sway = np.zeros(len(t))
        for wavelength, size in ((11.0, 0.26), (5.5, 0.15), (2.8, 0.07)):
            period = wavelength * self._uniform(0.8, 1.25)
            sway += size * self._normal() * np.sin(2 * np.pi * (t / period + self._uniform()))
        sway *= self.patient.tortuosity * np.clip(t / 6, 0, 1)
        points = points + sway[:, None] * np.stack([-tangent[:, 1], tangent[:, 0]], 1)
        out = np.hypot(points[:, 0] - FIELD[0], points[:, 1] - FIELD[1]) > REACH
        n = int(out.argmax()) if out.any() else len(t)
        if n < 4:
            return
        points, t, tangent = points[:n], t[:n], tangent[:n]
        widths, name = np.empty(n), self._name()
        children, due = [], self._uniform(2.2, 4.0)
        side = 1 if self._uniform() < 0.5 else -1
        for i in range(n):
            widths[i] = width
            self._claim(points[i, 0], points[i, 1], is_vein, name)
            width *= 0.9985
            if t[i] > due and width > 0.2:
                due = t[i] + self._uniform(0.7, 2.4)
                side = -side if self._uniform() < 0.7 else side
                ratio = self._uniform(0.34, 0.62)
                if temporal and self._uniform() < 0.12:
                    ratio = self._uniform(0.66, 0.8)
                child = ratio * width
                width = (width**3 - child**3) ** (1 / 3)  # Murray's law
                heading = math.atan2(tangent[i, 1], tangent[i, 0])
                turn = side * self._uniform(0.55, 1.15)
                inward = temporal and side * up > 0
                children.append((points[i, 0], points[i, 1], heading + turn, child, inward))
        self._keep(points, widths, is_vein)
        for x, y, heading, child, inward in children:
            self._branch(x, y, heading, child, is_vein, name, inward=inward)

    def _disc_twig(self, is_vein: bool, towards: float, spread: float) -> None:
        """A small vessel that leaves the disc's margin towards the macula or the nose."""
        angle = towards + spread * self._normal()
        x = self.disc[0] + 1.3 * math.cos(angle)
        y = self.disc[1] + 1.3 * math.sin(angle)
        width = self._uniform(0.14, 0.22) * (1.0 if is_vein else 0.9)
        self._branch(x, y, angle, width, is_vein, self._name(), inward=math.cos(angle) < 0)

    def _name(self) -> int:
        self._count += 1
        return self._count

    def _claim(self, x: float, y: float, is_vein: bool, name: int) -> None:
        self._cells[is_vein][int((x + 64) / _CELL), int((y + 64) / _CELL)] = name

    def _keep(
        self,
        points: Sequence | Float[np.ndarray, 'n 2'],
        widths: Sequence | Float[np.ndarray, ' n'],
        is_vein: bool,
    ) -> None:
        self.vessels.append(Vessel(np.asarray(points), np.asarray(widths), is_vein))

    def _branch(
        self,
        x: float,
        y: float,
        heading: float,
        width: float,
        is_vein: bool,
        parent: int,
        *,
        inward: bool,
        depth: int = 0,
    ) -> None:
        """Walks a branch from a parent's axis, forking on the way, until it is too fine."""
        cells, name = self._cells[is_vein], self._name()
        wander, bend = 0.075 * self.patient.tortuosity, 0.0
        fade = 0.982 if width < 0.25 else 0.99
        points, widths, forks = [(x, y)], [width], []
        travelled, due = 0.0, self._uniform(1.2, 3.5)
        fovea = self.foveal_radius * self._uniform(0.9, 1.3)
        while True:
            distance = math.hypot(x, y)
            wanted, pull = _attraction(x, y, inward=inward, near=distance < fovea + 0.8)
            gap = (wanted - heading + math.pi) % (2 * math.pi) - math.pi
            bend = 0.8 * bend + wander * self._normal()
            heading += pull * gap + bend
            x += STEP * math.cos(heading)
            y += STEP * math.sin(heading)
            travelled += STEP
            width *= fade
            owner = cells.get((int((x + 64) / _CELL), int((y + 64) / _CELL)))
            blocked = owner not in (None, name) and (owner != parent or travelled > 1.6)
            if (
                width < _MIN_WIDTH
                or blocked
                or distance < fovea
                or math.hypot(x - FIELD[0], y - FIELD[1]) > REACH
            ):
                break
            points.append((x, y))
            widths.append(width)
            cells[int((x + 64) / _CELL), int((y + 64) / _CELL)] = name
            if travelled > due and width > 0.11 and depth < 4:
                due = travelled + self._uniform(1.5, 4.5)
                fork, heading, width = self._fork(x, y, heading, width)
                forks.append(fork)
        n = len(points)
        if n < 4:
            return
        taper = np.minimum(1, (np.arange(n)[::-1] + 1) / 5)
        self._keep(np.array(points), np.array(widths) * (0.45 + 0.55 * taper), is_vein)
        for fx, fy, turn, child in forks:
            self._branch(fx, fy, turn, child, is_vein, name, inward=inward, depth=depth + 1)

    def _fork(
        self, x: float, y: float, heading: float, width: float
    ) -> tuple[tuple[float, float, float, float], float, float]:
        """A child (x, y, heading, width), and heading and width of its parent from there on."""
        ratio = self._uniform(0.5, 0.85)
        child = ratio * width
        width = (width**3 - child**3) ** (1 / 3)
        side = 1 if self._uniform() < 0.5 else -1
        turn = heading + side * self._uniform(0.5, 1.0)
        return (x, y, turn, child), heading - side * 0.25 * ratio**2, width

    def bead(self, amount: float) -> None:
        """Venous beading: sausage-like calibre changes along stretches of the larger veins."""
        for i, vessel in enumerate(self.vessels):
            if vessel.vein and vessel.width[0] > 0.3:
                along = np.arange(len(vessel.width)) * STEP
                where = np.clip(np.sin(2 * np.pi * (along / 15 + self._uniform())) * 3, 0, 1)
                wave = np.sin(2 * np.pi * (along / self._uniform(1.1, 1.6) + self._uniform()))
                self.vessels[i] = Vessel(
                    vessel.points, vessel.width * (1 + amount * where * wave), True
                )

    def new_vessels(self, x: float, y: float, reach: float) -> None:
        """Neovascularisation: a frond of fine, looping vessels around (x, y)."""
        for _ in range(int(self._uniform(9, 16))):
            heading = self._uniform(0, 2 * math.pi)
            turn = self._uniform(-0.5, 0.5)
            px, py = x + 0.25 * reach * self._normal(), y + 0.25 * reach * self._normal()
            points = []
            for _ in range(int(self._uniform(10, 22))):
                points.append((px, py))
                turn += 0.22 * self._normal()
                back = math.atan2(y - py, x - px)
                gap = (back - heading + math.pi) % (2 * math.pi) - math.pi
                far = math.hypot(px - x, py - y) / reach
                heading += 0.7 * turn + 0.35 * far * gap
                px += 0.55 * STEP * math.cos(heading)
                py += 0.55 * STEP * math.sin(heading)
            self._keep(np.array(points), np.full(len(points), self._uniform(0.11, 0.17)), True)


def _attraction(x: float, y: float, *, inward: bool, near: bool) -> tuple[float, float]:
    """The direction a branch at (x, y) is drawn to, and how strongly; away from a near fovea."""
    if near:
        return math.atan2(y, x), 0.2
    if inward and math.hypot(x, y) > 2.2:
        return math.atan2(-y, -x), 0.05
    return math.atan2(y, x - 7.0), 0.06
