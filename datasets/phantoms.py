"""Fundus phantoms: procedural colour fundus photographs whose vessels and lesions are known.

A phantom is a function of (seed, patient, eye, visit, grade, size). The patient gives traits that
both eyes share (pigment, vessel calibre, tortuosity, disc, camera), the eye gives its own vessel
tree, disc, texture and lesions, and the visit gives gaze, illumination, focus and noise.

Geometry is in degrees of visual angle on the retina, the fovea at the origin, x towards the nose
and y up; a left eye is mirrored when it is drawn. One degree is about 0.29 mm. Pictures show a
field of about 45 degrees. Optical densities are integrated over each pixel's area, so
every size is rendered directly, without supersampling.

Sources of the measures: disc 1.8 mm wide, 15.5 degrees nasal of the fovea; large veins
0.12-0.18 mm, arteries 2/3 to 3/4 of the veins' calibre; Murray's law (1926) for branching;
the international clinical diabetic retinopathy scale (Wilkinson et al. 2003) for the lesions.
"""
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter

from utils.errors import UserError
from utils.images import save_png
from utils.io import write_csv
from utils.logs import progress
from utils.seeds import numpy_generator

EYES = ('left', 'right')
GRADES = (0, 1, 2, 3, 4)
GRADE_SHARES = (0.5, 0.12, 0.22, 0.08, 0.08)    # towards a screening population, rare grades kept
MIN_SIZE, MAX_SIZE = 32, 1024

_EXTENT = 34.0            # textures cover [-_EXTENT, _EXTENT] degrees
_REACH = 30.0             # vessels end at this distance from the middle of the field
_FIELD = (5.5, 0.0)       # the middle of a macula- and disc-showing field
_STEP = 0.4               # degrees between two points of a vessel
_MIN_WIDTH = 0.085        # degrees; finer twigs are not drawn
_CELL = 0.5               # degrees; two vessels of one kind do not share a cell
_FIELD_FRACTION = 0.492   # radius of the field of view as a part of the picture's side

# Absorption in R, G, B at the axis of a large vessel.
_VEIN_ABSORPTION = np.array([0.36, 0.80, 0.55], np.float32)
_ARTERY_ABSORPTION = np.array([0.15, 0.58, 0.46], np.float32)
_BLOOD_ABSORPTION = np.array([0.42, 1.25, 0.95], np.float32)

# Median colours of fundus photographs: their mean in log RGB and two main directions.
_COLOUR_MEAN = np.log([0.61, 0.37, 0.225])
_COLOUR_AXES = np.array([[0.26, 0.43, 0.866], [-0.78, -0.44, 0.45]])


@dataclass(frozen=True)
class Lesion:
    """One lesion in picture coordinates (pixels); `radius` is half its mean diameter."""

    kind: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Phantom:
    """A rendered phantom.

    image: uint8 [size, size, 3]; vessel_mask: bool [size, size]; lesions inside the field of
    view; disc and fovea: (x, y) in pixels.
    """

    image: np.ndarray
    vessel_mask: np.ndarray
    lesions: tuple
    grade: int
    disc: tuple
    fovea: tuple


@dataclass(frozen=True)
class _Vessel:
    points: np.ndarray    # [n, 2] degrees
    width: np.ndarray     # [n] degrees
    vein: bool


@dataclass(frozen=True)
class _Mark:
    """A lesion on the retina: position and half-axes in degrees, and what it looks like."""

    kind: str
    x: float
    y: float
    a: float
    b: float
    angle: float
    strength: float
    wobble: tuple


def _smoothstep(low, high, value):
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


# Patients -----------------------------------------------------------------------------------------

class _Patient:
    """Traits that both eyes share."""

    def __init__(self, seed, patient):
        rng = numpy_generator(seed, 'phantom-patient', patient)
        pale, dark = np.clip(rng.standard_normal(2), -1.8, 1.3)
        self.log_colour = (_COLOUR_MEAN + 0.48 * pale * _COLOUR_AXES[0]
                           + 0.20 * dark * _COLOUR_AXES[1] + 0.04 * rng.standard_normal(3))
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


# Vessels ------------------------------------------------------------------------------------------

class _Tree:
    """Grows the vessels of one right eye; every random number comes from `rng`."""

    def __init__(self, rng, patient, disc):
        self.rng, self.patient, self.disc = rng, patient, disc
        self.vessels = []
        self._cells = {True: {}, False: {}}
        self._count = 0
        self._normals, self._uniforms = iter(()), iter(())
        self.foveal_radius = rng.uniform(1.5, 2.1)
        self._grow_all()

    def _normal(self):
        value = next(self._normals, None)
        if value is None:
            self._normals = iter(self.rng.standard_normal(4096).tolist())
            value = next(self._normals)
        return value

    def _uniform(self, low=0.0, high=1.0):
        value = next(self._uniforms, None)
        if value is None:
            self._uniforms = iter(self.rng.random(4096).tolist())
            value = next(self._uniforms)
        return low + (high - low) * value

    def _grow_all(self):
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

    def _temporal_path(self, up, outer):
        """Control points of an arcade: out of the disc, around the macula, off the field."""
        x, y = self.disc
        height = self._uniform(9.3, 13.2) + 0.7 * outer
        end = height - self._uniform(0.0, 5.5)
        lean = self._uniform(-0.8, 1.2)
        return [(x + 0.5 + 0.2 * outer, y + 0.15 * up),
                (x + 0.5 * lean, up * 2.6 + y),
                (x - 0.8 + lean + 0.3 * outer, up * (height * 0.52) + 0.6 * y),
                (x - 4.2 + lean + self._normal() * 0.5, up * (height * 0.82) + 0.3 * y),
                (x - 11.0 + self._normal(), up * (height + self._normal() * 0.4)),
                (x - 20.0, up * (height * 0.55 + end * 0.45)),
                (x - 34.0, up * (end - 3.0))]

    def _nasal_path(self, up, outer):
        x, y = self.disc
        reach = self._uniform(8.0, 13.5) - 0.8 * outer
        return [(x + 0.6 - 0.2 * outer, y + 0.1 * up),
                (x + 1.7 + 0.3 * outer, y + up * 1.7),
                (x + 4.5 + self._normal() * 0.3, y + up * (reach * 0.42)),
                (x + 8.5 + self._normal() * 0.5, y + up * (reach * 0.72)),
                (x + 16.0, y + up * (reach + self._normal()))]

    def _trunk(self, controls, width, is_vein, up, *, temporal):
        controls = np.array(controls)
        chord = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(controls, axis=0).T))])
        spline = CubicSpline(chord, controls)
        t = np.arange(0, chord[-1], _STEP)
        points, tangent = spline(t), spline(t, 1)
        tangent /= np.hypot(tangent[:, 0], tangent[:, 1])[:, None]
        sway = np.zeros(len(t))
        for wavelength, size in ((11.0, 0.26), (5.5, 0.15), (2.8, 0.07)):
            period = wavelength * self._uniform(0.8, 1.25)
            sway += size * self._normal() * np.sin(2 * np.pi * (t / period + self._uniform()))
        sway *= self.patient.tortuosity * np.clip(t / 6, 0, 1)
        points = points + sway[:, None] * np.stack([-tangent[:, 1], tangent[:, 0]], 1)
        out = np.hypot(points[:, 0] - _FIELD[0], points[:, 1] - _FIELD[1]) > _REACH
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
                width = (width ** 3 - child ** 3) ** (1 / 3)    # Murray's law
                heading = math.atan2(tangent[i, 1], tangent[i, 0])
                turn = side * self._uniform(0.55, 1.15)
                inward = temporal and side * up > 0
                children.append((points[i, 0], points[i, 1], heading + turn, child, inward))
        self._keep(points, widths, is_vein)
        for x, y, heading, child, inward in children:
            self._branch(x, y, heading, child, is_vein, name, inward=inward)

    def _disc_twig(self, is_vein, towards, spread):
        """A small vessel that leaves the disc's margin towards the macula or the nose."""
        angle = towards + spread * self._normal()
        x = self.disc[0] + 1.3 * math.cos(angle)
        y = self.disc[1] + 1.3 * math.sin(angle)
        width = self._uniform(0.14, 0.22) * (1.0 if is_vein else 0.9)
        self._branch(x, y, angle, width, is_vein, self._name(), inward=math.cos(angle) < 0)

    def _name(self):
        self._count += 1
        return self._count

    def _claim(self, x, y, is_vein, name):
        self._cells[is_vein][int((x + 64) / _CELL), int((y + 64) / _CELL)] = name

    def _keep(self, points, widths, is_vein):
        self.vessels.append(_Vessel(np.asarray(points), np.asarray(widths), is_vein))

    def _branch(self, x, y, heading, width, is_vein, parent, *, inward, depth=0):
        """Walks a branch from a parent's axis, forking on the way, until it is too fine."""
        cells, name = self._cells[is_vein], self._name()
        wander, bend = 0.075 * self.patient.tortuosity, 0.0
        fade = 0.982 if width < 0.25 else 0.99
        points, widths, forks = [(x, y)], [width], []
        travelled, due = 0.0, self._uniform(1.2, 3.5)
        fovea = self.foveal_radius * self._uniform(0.9, 1.3)
        while True:
            distance = math.hypot(x, y)
            if inward and distance > 2.2:
                wanted = math.atan2(-y, -x)
                pull = 0.05
            else:
                wanted = math.atan2(y, x - 7.0)
                pull = 0.06
            if distance < fovea + 0.8:
                pull, wanted = 0.2, math.atan2(y, x)
            gap = (wanted - heading + math.pi) % (2 * math.pi) - math.pi
            bend = 0.8 * bend + wander * self._normal()
            heading += pull * gap + bend
            x += _STEP * math.cos(heading)
            y += _STEP * math.sin(heading)
            travelled += _STEP
            width *= fade
            owner = cells.get((int((x + 64) / _CELL), int((y + 64) / _CELL)))
            blocked = owner not in (None, name) and (owner != parent or travelled > 1.6)
            if (width < _MIN_WIDTH or blocked or distance < fovea
                    or math.hypot(x - _FIELD[0], y - _FIELD[1]) > _REACH):
                break
            points.append((x, y))
            widths.append(width)
            cells[int((x + 64) / _CELL), int((y + 64) / _CELL)] = name
            if travelled > due and width > 0.11 and depth < 4:
                due = travelled + self._uniform(1.5, 4.5)
                ratio = self._uniform(0.5, 0.85)
                child = ratio * width
                width = (width ** 3 - child ** 3) ** (1 / 3)
                side = 1 if self._uniform() < 0.5 else -1
                forks.append((x, y, heading + side * self._uniform(0.5, 1.0), child))
                heading -= side * 0.25 * ratio ** 2
        n = len(points)
        if n < 4:
            return
        taper = np.minimum(1, (np.arange(n)[::-1] + 1) / 5)
        self._keep(np.array(points), np.array(widths) * (0.45 + 0.55 * taper), is_vein)
        for fx, fy, turn, child in forks:
            self._branch(fx, fy, turn, child, is_vein, name, inward=inward, depth=depth + 1)

    def bead(self, amount):
        """Venous beading: sausage-like calibre changes along stretches of the larger veins."""
        for i, vessel in enumerate(self.vessels):
            if vessel.vein and vessel.width[0] > 0.3:
                along = np.arange(len(vessel.width)) * _STEP
                where = np.clip(np.sin(2 * np.pi * (along / 15 + self._uniform())) * 3, 0, 1)
                wave = np.sin(2 * np.pi * (along / self._uniform(1.1, 1.6) + self._uniform()))
                self.vessels[i] = _Vessel(vessel.points, vessel.width * (1 + amount * where * wave),
                                          True)

    def new_vessels(self, x, y, reach):
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
                px += 0.55 * _STEP * math.cos(heading)
                py += 0.55 * _STEP * math.sin(heading)
            self._keep(np.array(points), np.full(len(points), self._uniform(0.11, 0.17)), True)


# Lesions ------------------------------------------------------------------------------------------

class _Lesions:
    """Draws the lesions of one eye (right-eye coordinates) for a DR grade."""

    def __init__(self, rng, grade, disc, tree):
        self.rng, self.disc, self.tree = rng, disc, tree
        self.marks = []
        self.beading = 0.0
        u, count = rng.uniform, rng.integers
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

    def _place(self, low=2.2, high=19.0, near=(2.5, 0.0)):
        """A point of the field off the disc, between two distances from `near`."""
        while True:
            r = math.sqrt(self.rng.uniform(low ** 2, high ** 2))
            t = self.rng.uniform(0, 2 * math.pi)
            x, y = near[0] + r * math.cos(t), near[1] + r * math.sin(t)
            if math.hypot(x - self.disc[0], y - self.disc[1]) > 3.6:
                return x, y

    def _add(self, kind, x, y, a, b=None, angle=0.0, strength=1.0, roughness=0.0):
        wobble = tuple((roughness * self.rng.standard_normal() / (k - 0.6),
                        self.rng.uniform(0, 2 * math.pi)) for k in (2, 3, 4, 5))
        self.marks.append(_Mark(kind, x, y, a, a if b is None else b, angle, strength, wobble))

    def _microaneurysms(self, n):
        for _ in range(n):
            x, y = self._place(1.2, 15.0)
            self._add('microaneurysm', x, y, self.rng.uniform(0.12, 0.21),
                      strength=self.rng.uniform(0.7, 1.1))

    def _haemorrhages(self, n, quadrants=False):
        for i in range(n):
            x, y = self._place(2.5, 18.5)
            if quadrants:    # spread over all four, around the fovea
                x = math.copysign(x, (-1, 1)[i % 2]) if abs(x) < 11 else x
                y = math.copysign(y, (-1, 1)[i // 2 % 2])
            kind = self.rng.random()
            if kind < 0.5:
                self._add('dot_haemorrhage', x, y, self.rng.uniform(0.2, 0.36), roughness=0.15,
                          strength=self.rng.uniform(0.7, 1.0))
            elif kind < 0.85:
                a = self.rng.uniform(0.4, 0.95)
                self._add('blot_haemorrhage', x, y, a, a * self.rng.uniform(0.6, 1.0),
                          self.rng.uniform(0, math.pi), self.rng.uniform(0.55, 0.95), 0.12)
            else:
                # Flames follow the nerve fibres, which run from the disc around the macula.
                angle = math.atan2(y - self.disc[1], x - self.disc[0]) + self.rng.normal(0, 0.25)
                a = self.rng.uniform(0.7, 1.5)
                self._add('flame_haemorrhage', x, y, a, a * self.rng.uniform(0.22, 0.38), angle,
                          self.rng.uniform(0.5, 0.85), 0.15)

    def _exudates(self, n_clusters):
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
                    self._add('hard_exudate', x, y, 0.09 + 0.14 * self.rng.random() ** 2,
                              strength=self.rng.uniform(0.6, 1.0))

    def _cotton_wool(self, n):
        for _ in range(n):
            x, y = self._place(3.8, 11.0, self.disc)
            angle = math.atan2(y - self.disc[1], x - self.disc[0]) + math.pi / 2
            a = self.rng.uniform(0.5, 1.05)
            self._add('cotton_wool_spot', x, y, a, a * self.rng.uniform(0.5, 0.8), angle,
                      self.rng.uniform(0.45, 0.85), 0.3)

    def _proliferation(self):
        """New vessels at the disc or elsewhere, often with preretinal blood."""
        at_disc = self.rng.random() < 0.45
        for i in range(self.rng.integers(1, 4)):
            if at_disc and i == 0:
                x, y = self.disc
                x, y = x - self.rng.uniform(-1, 1.8), y + self.rng.uniform(-1.5, 1.5)
            else:
                trunks = [v for v in self.tree.vessels if v.vein and v.width[0] > 0.3]
                trunk = trunks[self.rng.integers(len(trunks))].points
                x, y = trunk[self.rng.integers(8, max(9, min(len(trunk), 40)))
                             if len(trunk) > 9 else -1]
            reach = self.rng.uniform(1.2, 2.6)
            self.tree.new_vessels(x, y, reach)
            self._add('new_vessels', x, y, reach)
        if self.rng.random() < 0.6:
            x, y = self._place(4.0, 13.0)
            a = self.rng.uniform(1.6, 3.8)
            self._add('preretinal_haemorrhage', x, y, a, a * self.rng.uniform(0.45, 0.8), 0.0,
                      self.rng.uniform(0.8, 1.0), 0.08)
        if self.rng.random() < 0.35:
            x, y = self._place(4.0, 12.0, self.disc)
            self._add('fibrous_tissue', x, y, self.rng.uniform(1.2, 2.6),
                      self.rng.uniform(0.25, 0.6), self.rng.uniform(0, math.pi),
                      self.rng.uniform(0.4, 0.7), 0.5)


class _Eye:
    """Everything of one eye that its visits have in common."""

    def __init__(self, seed, patient, eye, grade):
        self.traits = traits = _Patient(seed, patient)
        self.side = 1 if eye == 'right' else -1
        self.grade = grade
        keys = patient, eye
        rng = numpy_generator(seed, 'phantom-eye', *keys)
        self.disc = (traits.disc_distance + rng.normal(0, 0.2),
                     traits.disc_rise + rng.normal(0, 0.2))
        self.disc_axes = (traits.disc_width / 2 * rng.uniform(0.97, 1.03),
                          traits.disc_height / 2 * rng.uniform(0.97, 1.03))
        self.disc_tilt = rng.normal(0, 0.12)
        self.cup = float(np.clip(traits.cup + rng.normal(0, 0.03), 0.2, 0.7))
        self.crescent = rng.uniform(0.1, 0.7) * (rng.random() < 0.3)
        self.reflex = rng.uniform(0.05, 0.2) * (rng.random() < 0.4)
        self.ring = rng.uniform(0.02, 0.07) * (rng.random() < 0.25)
        tree_rng = numpy_generator(seed, 'phantom-vessels', *keys)
        tree = _Tree(tree_rng, traits, self.disc)
        lesions = _Lesions(numpy_generator(seed, 'phantom-lesions', *keys, grade), grade,
                           self.disc, tree)
        self.marks = lesions.marks
        if lesions.beading:
            tree.bead(lesions.beading)
        self.vessels = tree.vessels
        texture_rng = numpy_generator(seed, 'phantom-texture', *keys)
        self.octaves = [(cell, texture_rng.standard_normal((int(2 * _EXTENT / cell) + 1,) * 2)
                         .astype(np.float32)) for cell in (9.0, 4.0, 1.8, 0.8, 0.35)]
        self.choroid = [(cell, texture_rng.standard_normal((int(2 * _EXTENT / cell) + 1,) * 2)
                         .astype(np.float32)) for cell in (3.2, 1.7)]


# Rendering ----------------------------------------------------------------------------------------

class _View:
    """One visit: the camera's view of an eye, and the maps between retina and picture."""

    def __init__(self, seed, patient, eye_name, visit, eye, size):
        self.rng = rng = numpy_generator(seed, 'phantom-visit', patient, eye_name, visit)
        self.size, self.side = size, eye.side
        self.gaze = (eye.side * (_FIELD[0] + rng.normal(0, 1.3)), rng.normal(0, 1.2))
        self.roll = rng.normal(0, 0.05)
        self.pixels = (size * _FIELD_FRACTION / eye.traits.field_radius) * rng.uniform(0.97, 1.03)
        self.exposure = rng.normal(0, 0.10)
        self.balance = rng.normal(0, 0.025, 3)
        self.tilt = rng.normal(0, 0.09, 2)
        self.vignette = eye.traits.vignette * rng.uniform(0.8, 1.2)
        self.blur = rng.gamma(2.2, 0.018) * self.pixels          # sigma in pixels
        self.noise = rng.uniform(0.004, 0.014)
        self.veil = rng.uniform(0.02, 0.13) * (rng.random() < 0.3)
        self.veil_angle = rng.uniform(0, 2 * math.pi)

    def to_pixels(self, points):
        """[n, 2] right-eye degrees -> [n, 2] pixel coordinates (x right, y down)."""
        x = self.side * points[:, 0] - self.gaze[0]
        y = points[:, 1] - self.gaze[1]
        c, s = math.cos(self.roll), math.sin(self.roll)
        half = self.size / 2
        return np.stack([half + self.pixels * (c * x - s * y),
                         half - self.pixels * (s * x + c * y)], 1)

    def retina_grid(self):
        """Right-eye degrees (x, y) of every pixel's centre, float32 [size, size] each."""
        offset = ((np.arange(self.size) + 0.5 - self.size / 2) / self.pixels).astype(np.float32)
        u, v = offset[None, :], -offset[:, None]
        c, s = math.cos(self.roll), math.sin(self.roll)
        return self.side * (c * u + s * v + self.gaze[0]), -s * u + c * v + self.gaze[1]

    def sample(self, cell, values):
        """A random field given on a retina grid with `cell` degrees spacing, at every pixel."""
        if cell * self.pixels < 0.8:      # finer than the pixels: it averages out
            return np.zeros((self.size, self.size), np.float32)
        k = 1 / (cell * self.pixels)
        c, s = math.cos(self.roll), math.sin(self.roll)
        half, centre = self.size / 2, _EXTENT / cell + 0.5
        matrix = (k * c, -k * s, centre + self.gaze[0] / cell - half * k * (c - s),
                  k * s, k * c, centre - self.gaze[1] / cell - half * k * (s + c))
        return np.asarray(Image.fromarray(values).transform(
            (self.size, self.size), Image.Transform.AFFINE, matrix,
            Image.Resampling.BICUBIC))


def _splat(size, x, y, weight):
    """Adds point weights to the four nearest pixels of a [size, size] picture (bilinear)."""
    x, y = x - 0.5, y - 0.5
    column, row = np.floor(x), np.floor(y)
    fx, fy = x - column, y - row
    column, row = column.astype(np.int64) + 1, row.astype(np.int64) + 1
    inside = (column >= 0) & (column <= size) & (row >= 0) & (row <= size)
    column, row, fx, fy, weight = (a[inside] for a in (column, row, fx, fy, weight))
    side = size + 2
    index = np.concatenate([row * side + column, row * side + column + 1,
                            (row + 1) * side + column, (row + 1) * side + column + 1])
    values = np.concatenate([(1 - fx) * (1 - fy) * weight, fx * (1 - fy) * weight,
                             (1 - fx) * fy * weight, fx * fy * weight])
    full = np.bincount(index, values, minlength=side * side).reshape(side, side)
    return full[1:-1, 1:-1].astype(np.float32)


def _vessel_maps(vessels, view):
    """Optical density and covered area of vessels, each [size, size]; 1 = axis of a large vein.

    Every segment is sampled along and across; a sample carries the area that it stands for.
    """
    starts, ends, w0, w1, veins = [], [], [], [], []
    for vessel in vessels:
        points = view.to_pixels(vessel.points)
        width = vessel.width * view.pixels
        starts.append(points[:-1])
        ends.append(points[1:])
        w0.append(width[:-1])
        w1.append(width[1:])
        veins.append(np.full(len(points) - 1, vessel.vein))
    starts, ends = np.concatenate(starts), np.concatenate(ends)
    w0, w1, veins = np.concatenate(w0), np.concatenate(w1), np.concatenate(veins)
    near = np.abs(starts - view.size / 2).max(1) < view.size * 0.56
    starts, ends, w0, w1, veins = (a[near] for a in (starts, ends, w0, w1, veins))
    step = ends - starts
    length = np.hypot(step[:, 0], step[:, 1]) + 1e-9
    normal = np.stack([-step[:, 1], step[:, 0]], 1) / length[:, None]
    maps = {}
    for vein in (True, False):
        density = np.zeros((view.size, view.size), np.float32)
        area = density.copy()
        thin = w0 < 0.45 * w0.max()
        for chosen in (thin & (veins == vein), ~thin & (veins == vein)):
            if not chosen.any():
                continue
            m = max(2, math.ceil(length[chosen].max() / 0.55))
            n = max(3, math.ceil(w0[chosen].max() * 1.4 / 0.55))
            along = ((np.arange(m) + 0.5) / m)[None, :, None]
            across = (2 * (np.arange(n) + 0.5) / n - 1)[None, None, :]
            width = (w0[chosen][:, None] * (1 - along[..., 0])
                     + w1[chosen][:, None] * along[..., 0])[..., None]
            x, y = (starts[chosen][:, None, None, i] + step[chosen][:, None, None, i] * along
                    + normal[chosen][:, None, None, i] * across * width / 2 for i in (0, 1))
            patch = np.broadcast_to(width * (length[chosen] / (m * n))[:, None, None], x.shape)
            profile = np.sqrt(1 - across ** 2) * (0.62 if vein else 0.72)
            if not vein:      # the arteriolar light reflex
                profile = profile * (1 - 0.45 * np.exp(-(across / 0.35) ** 2))
            # Thin vessels absorb less, though more than in proportion to their thickness.
            depth = np.sqrt(width / (0.5 * view.pixels)) * 1.6
            density += _splat(view.size, x.ravel(), y.ravel(), (patch * profile * depth).ravel())
            area += _splat(view.size, x.ravel(), y.ravel(), patch.ravel())
        maps[vein] = density, area
    return maps


def _dots(size, x, y, radius, strength):
    """Round soft dots of given pixel radii; dots below the pixel size keep their total weight."""
    canvas = np.zeros((size, size), np.float32)
    if len(x) == 0:
        return canvas
    sigma = np.sqrt((0.72 * radius) ** 2 + 0.3 ** 2)
    peak = strength * np.minimum(1, 1.5 * (0.72 * radius / sigma) ** 2)
    reach = math.ceil(3 * sigma.max())
    window = np.arange(-reach, reach + 1)
    columns = np.floor(x).astype(int)[:, None] + window
    rows = np.floor(y).astype(int)[:, None] + window
    scale = (-0.5 / sigma ** 2)[:, None]
    gx = np.exp(scale * (columns + 0.5 - x[:, None]) ** 2)
    gy = np.exp(scale * (rows + 0.5 - y[:, None]) ** 2)
    for i in range(len(x)):
        r0, c0 = rows[i, 0], columns[i, 0]
        r1, c1 = max(r0, 0), max(c0, 0)
        r2, c2 = min(rows[i, -1] + 1, size), min(columns[i, -1] + 1, size)
        if r1 < r2 and c1 < c2:
            canvas[r1:r2, c1:c2] += (peak[i] * gy[i, r1 - r0:r2 - r0, None]
                                     * gx[i, None, c1 - c0:c2 - c0])
    return canvas


def _patch(canvas, mark, x, y, view, *, soft, flat_top=False):
    """Adds an irregular ellipse with a soft edge to `canvas`; x, y in pixels."""
    size = canvas.shape[0]
    a, b = mark.a * view.pixels, mark.b * view.pixels
    reach = 1.6 * max(a, b) + 2
    c0, c1 = max(0, int(x - reach)), min(size, int(x + reach) + 1)
    r0, r1 = max(0, int(y - reach)), min(size, int(y + reach) + 1)
    if c0 >= c1 or r0 >= r1:
        return
    dx = np.arange(c0, c1)[None, :] + 0.5 - x
    dy = -(np.arange(r0, r1)[:, None] + 0.5 - y)
    turn = mark.angle if view.side > 0 else math.pi - mark.angle
    turn += view.roll
    c, s = math.cos(turn), math.sin(turn)
    # Shapes thinner than a pixel are widened and weakened alike.
    wide_a, wide_b = math.hypot(a, 0.45), math.hypot(b, 0.45)
    p, q = (dx * c + dy * s) / wide_a, (-dx * s + dy * c) / wide_b
    distance, angle = np.hypot(p, q), np.arctan2(q, p)
    edge = 1 + sum(size_ * np.cos(k * angle + phase)
                   for k, (size_, phase) in enumerate(mark.wobble, 2))
    soft = max(soft, 0.7 / max(wide_b, 0.7))
    value = 1 - _smoothstep(1 - soft / 2, 1 + soft / 2, distance / np.maximum(edge, 0.3))
    if flat_top:
        value = value * (1 - _smoothstep(-0.06, 0.06, dy / wide_b - 0.12))
    canvas[r0:r1, c0:c1] += (mark.strength * a * b / (wide_a * wide_b) * value)


_DOT_KINDS = ('microaneurysm', 'hard_exudate')
_EDGES = {'dot_haemorrhage': 0.5, 'blot_haemorrhage': 0.7, 'flame_haemorrhage': 0.7,
          'preretinal_haemorrhage': 0.12, 'cotton_wool_spot': 1.1, 'fibrous_tissue': 0.9}


def _lesion_maps(eye, view):
    """Maps of blood, exudate and white tissue [size, size], and the list of Lesions in view."""
    size = view.size
    maps = {name: np.zeros((size, size), np.float32) for name in ('blood', 'exudate', 'white')}
    found = []
    if not eye.marks:
        return maps, found
    centres = view.to_pixels(np.array([(m.x, m.y) for m in eye.marks]))
    for mark, (x, y) in zip(eye.marks, centres):
        if math.hypot(x - size / 2, y - size / 2) < _FIELD_FRACTION * size:
            found.append(Lesion(mark.kind, float(x), float(y),
                                math.sqrt(mark.a * mark.b) * view.pixels))
        if mark.kind in _EDGES:
            name = 'blood' if 'haemorrhage' in mark.kind else 'white'
            _patch(maps[name], mark, x, y, view, soft=_EDGES[mark.kind],
                   flat_top=mark.kind == 'preretinal_haemorrhage')
    for kind, name in zip(_DOT_KINDS, ('blood', 'exudate')):
        chosen = [i for i, m in enumerate(eye.marks) if m.kind == kind]
        maps[name] += _dots(size, centres[chosen, 0], centres[chosen, 1],
                            np.array([eye.marks[i].a for i in chosen]) * view.pixels,
                            np.array([eye.marks[i].strength for i in chosen]))
    return maps, found


def _background(eye, view, x, y):
    """Retina and choroid without disc, vessels and lesions: float32 [3, size, size]."""
    traits = eye.traits
    colour = np.exp(traits.log_colour + view.exposure + view.balance).astype(np.float32)
    fine = sum(weight * view.sample(cell, values) for weight, (cell, values)
               in zip((0.05, 0.03, 0.014, 0.011, 0.013), eye.octaves))
    ridges = sum(weight * np.clip(1 - np.abs(view.sample(cell, values)) * 1.7, 0, 1)
                 for weight, (cell, values) in zip((0.6, 0.4), eye.choroid))
    eccentricity = np.hypot(x, y)
    # The choroid shows least where the macular pigment is densest.
    shows = traits.tessellation * _smoothstep(3.0, 14.0, eccentricity)
    choroid = shows * (ridges - 0.25)
    macula = (traits.macula * np.exp(-(eccentricity / 3.6) ** 2)
              + 0.55 * traits.macula * np.exp(-(eccentricity / 1.05) ** 2))
    sheen = traits.sheen * np.exp(-((np.abs(y) - 6.5) / 3.2) ** 2 - ((x - 11) / 8.0) ** 2)
    ring = eye.ring * np.exp(-((eccentricity - 3.4) / 0.5) ** 2)
    planes = []
    for channel, (grain, vessel, dark) in enumerate(((0.7, 0.10, 0.55), (1.0, 0.26, 1.0),
                                                     (1.2, 0.32, 0.9))):
        log = grain * fine - vessel * choroid - dark * macula + sheen + ring
        planes.append(colour[channel] * np.exp(log))
    image = np.stack(planes)
    reflex = eye.reflex * np.exp(-((x - 0.15) ** 2 + (y - 0.1) ** 2) / 0.16)
    return image + reflex, colour


def _add_disc(image, eye, x, y, colour):
    """Blends the optic disc (rim, cup, halo, crescent) into `image` [3, size, size]."""
    dx, dy = x - eye.disc[0], y - eye.disc[1]
    c, s = math.cos(eye.disc_tilt), math.sin(eye.disc_tilt)
    p, q = (c * dx + s * dy) / eye.disc_axes[0], (-s * dx + c * dy) / eye.disc_axes[1]
    e = np.hypot(p, q)
    disc = 1 - _smoothstep(0.90, 1.08, e)
    cup = 1 - _smoothstep(0.4, 1.5, np.hypot(p + 0.10, q) / eye.cup)
    halo = 0.22 * np.exp(-np.clip(e - 1, 0, None) / 0.45)
    crescent = eye.crescent * (1 - _smoothstep(1.0, 1.2, np.hypot(p + 0.16, q * 0.96)))
    nasal = _smoothstep(-0.6, 1.0, p)
    for channel, (rim_power, cup_power, pink) in enumerate(((0.22, 0.12, 0.02),
                                                            (0.48, 0.30, 0.10),
                                                            (0.68, 0.46, 0.06))):
        rim = colour[channel] ** rim_power * (1 - pink * nasal)
        white = colour[channel] ** cup_power
        plane = image[channel] * (1 + halo)
        plane = plane + crescent * (0.75 * rim - plane) * (1 - disc)
        own = rim + cup * (white - rim)
        image[channel] = plane + disc * (own * (0.5 + 0.5 * plane / colour[channel]) - plane)
    return image


def _photograph(image, view, traits):
    """Camera: illumination, haze, blur, noise, field of view. float [3, S, S] -> uint8 [S, S, 3]"""
    size = view.size
    offset = ((np.arange(size) + 0.5) / size - 0.5) / _FIELD_FRACTION
    u, v = offset[None, :].astype(np.float32), offset[:, None].astype(np.float32)
    r = np.hypot(u, v)
    light = (1 - view.vignette * np.clip(r, 0, 1.2) ** 2.6) * (1 + view.tilt[0] * u
                                                              + view.tilt[1] * v)
    if view.blur > 0.15:
        image = np.stack([gaussian_filter(p, view.blur, truncate=3) for p in image])
    image = image * light
    across = u * math.cos(view.veil_angle) + v * math.sin(view.veil_angle)
    veil = (view.veil * _smoothstep(0.1, 1.2, across)
            + traits.haze * np.clip(r, 0, 1) ** 14)
    image = image + veil * (np.array([0.55, 0.80, 0.80], np.float32)[:, None, None] - image)
    grain = view.rng.standard_normal((3, size, size), dtype=np.float32)
    shared = view.rng.standard_normal((size, size), dtype=np.float32)
    image = image + view.noise * (0.6 * grain + shared) * np.sqrt(np.clip(image, 0.05, 1))
    # A soft shoulder, as sensors and their gamma have, instead of clipped highlights.
    image = np.where(image > 0.8, 0.8 + 0.2 * np.tanh((image - 0.8) / 0.2), image)
    field = np.clip((1 - r) * size * _FIELD_FRACTION / 1.2 + 0.5, 0, 1)
    pixels = np.rint(np.clip(image, 0.012, 1) * field * 255)
    return np.ascontiguousarray(pixels.astype(np.uint8).transpose(1, 2, 0)), field


def _render(eye, view):
    x, y = view.retina_grid()
    image, colour = _background(eye, view, x, y)
    image = _add_disc(image, eye, x, y, colour)
    lesions, found = _lesion_maps(eye, view)
    exudate = np.clip(lesions['exudate'], 0, 1)
    white = np.clip(lesions['white'], 0, 1)
    vessels = _vessel_maps(eye.vessels, view)
    blood = np.clip(lesions['blood'], 0, 1.1)
    light = [min(1.0, 1.18 * c ** p) for c, p in zip(colour, (0.22, 0.35, 0.75))]
    pale = [min(1.0, 1.05 * c ** p) for c, p in zip(colour, (0.35, 0.40, 0.45))]
    vein, artery = (np.minimum(vessels[kind][0], 1.25) for kind in (True, False))
    for channel in range(3):
        plane = image[channel]
        plane = plane + exudate * (light[channel] - plane)
        absorbed = (_VEIN_ABSORPTION[channel] * vein + _ARTERY_ABSORPTION[channel] * artery
                    + _BLOOD_ABSORPTION[channel] * blood)
        plane = plane * np.exp(-absorbed)
        image[channel] = plane + 0.85 * white * (pale[channel] - plane)
    pixels, field = _photograph(image, view, eye.traits)
    mask = ((vessels[True][1] + vessels[False][1]) > 0.4) & (field > 0.5)
    marks = view.to_pixels(np.array([eye.disc, (0.0, 0.0)]))
    return Phantom(pixels, mask, tuple(found), eye.grade,
                   tuple(marks[0].tolist()), tuple(marks[1].tolist()))


def _check(eye, grade, size):
    if eye not in EYES:
        raise ValueError(f'eye must be one of {EYES}, not {eye!r}')
    if grade not in GRADES:
        raise ValueError(f'grade must be one of {GRADES}, not {grade!r}')
    if size < 16:
        raise ValueError(f'size must be at least 16, not {size}')


def render_phantom(*, seed, patient, eye, visit, grade, size):
    """Renders one fundus phantom.

    seed, patient, visit: whole numbers from 0; eye: 'left' or 'right'; grade: DR grade 0-4;
    size: side in pixels. The picture is a function of these alone. Visits share vessels, disc
    and lesions; grades of one eye share everything but the lesions.
    ValueError for other values.
    """
    _check(eye, grade, size)
    model = _Eye(seed, patient, eye, grade)
    return _render(model, _View(seed, patient, eye, visit, model, size))


# -- data sets ------------------------------------------------------------------------------


def draw_grades(n_patients, shares, seed):
    """A grade per patient and eye, [n, 2]; fellow eyes differ by at most one grade."""
    rng = numpy_generator(seed, 'grades')
    shares = np.asarray(shares, dtype=float)
    first = rng.choice(len(shares), n_patients, p=shares / shares.sum())
    other = np.clip(first + rng.choice([-1, 0, 1], n_patients, p=[0.15, 0.7, 0.15]), 0, 4)
    other = np.where(first == 0, np.where(rng.random(n_patients) < 0.93, 0, 1), other)
    return np.stack([first, other], 1)


def make_dataset(out_dir, *, n_patients, size, seed=0, eyes=EYES, visits=1,
                 grade_shares=GRADE_SHARES, masks=False, workers=1):
    """Writes images/<id_code>.png, labels.csv and, on request, masks/<id_code>.png.

    labels.csv: id_code, diagnosis (0-4), patient_id, eye, visit. Returns it as a DataFrame.
    UserError when out_dir already holds a data set.
    """
    out_dir = Path(out_dir)
    if (out_dir / 'labels.csv').exists() or (out_dir / 'images').exists():
        raise UserError(f'{out_dir} already holds a data set; choose another folder')
    grades = draw_grades(n_patients, grade_shares, seed)
    jobs = [(out_dir, seed, p, e, v, int(grades[p, EYES.index(e)]), size, masks)
            for p in range(n_patients) for e in eyes for v in range(visits)]
    (out_dir / 'images').mkdir(parents=True)
    bar = progress(total=len(jobs), desc='phantoms', unit='img')
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            for _ in pool.map(_write_one, jobs, chunksize=16):
                bar.update()
    else:
        for job in jobs:
            _write_one(job)
            bar.update()
    bar.close()
    rows = [{'id_code': _id_code(p, e, v), 'diagnosis': g, 'patient_id': f'p{p:05d}', 'eye': e,
             'visit': v} for _, _, p, e, v, g, _, _ in jobs]
    table = pd.DataFrame(rows)
    write_csv(out_dir / 'labels.csv', table)
    return table


def _id_code(patient, side, visit):
    return f'p{patient:05d}_{side}_{visit}'


def _write_one(job):
    out_dir, seed, patient, side, visit, grade, size, masks = job
    phantom = render_phantom(seed=seed, patient=patient, eye=side, visit=visit, grade=grade,
                             size=size)
    name = f'{_id_code(patient, side, visit)}.png'
    save_png(Image.fromarray(phantom.image), out_dir / 'images' / name)
    if masks:
        save_png(Image.fromarray(phantom.vessel_mask.astype(np.uint8) * 255),
                 out_dir / 'masks' / name)
