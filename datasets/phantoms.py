"""Fundus phantoms: colour fundus photographs drawn by the project itself, from a seed.

An eye is a set of facts (vessel tree, disc, fovea, pigmentation, lesions) that depends on
(seed, patient, eye) alone; a visit photographs it with its own gaze, light, blur and noise. So
identity (vessels) and disease (lesions) are known exactly, which no public set of photographs
allows. Grades follow the International Clinical Diabetic Retinopathy scale (Wilkinson et al.
2003).

Coordinates: the field of view is the unit disc, x to the right, y down; one unit is about
6.5 mm on the retina (a 45 degree camera). Eyes are built as right eyes (disc on the right) and
mirrored for the left.
"""
import dataclasses
import logging
import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from scipy import ndimage

from utils.errors import UserError
from utils.images import save_png
from utils.io import write_csv
from utils.logs import progress
from utils.seeds import numpy_generator

log = logging.getLogger(__name__)

EYES = ('left', 'right')
GRADES = (0, 1, 2, 3, 4)
GRADE_SHARES = (0.5, 0.12, 0.22, 0.08, 0.08)    # towards a screening population, rare grades kept
MIN_SIZE, MAX_SIZE = 32, 1024

_FOV = 0.97                # radius of the field of view over half the picture's width
_DISC_RADIUS = 0.135       # 1.75 mm across
_AVASCULAR = 0.10          # the foveal avascular zone and its vessel-poor rim
_TRUNK = {'artery': 0.0125, 'vein': 0.0165}    # half calibre at the disc
_THINNEST = 0.0028


@dataclasses.dataclass
class Vessel:
    """A centre line [P, 2] with the half calibre [P] at each point."""

    kind: str              # 'artery' or 'vein'
    points: np.ndarray
    radius: np.ndarray
    depth: int


@dataclasses.dataclass
class Lesion:
    """One lesion: kind, centre [2], radius, and an outline factor per direction [A]."""

    kind: str
    centre: np.ndarray
    radius: float
    outline: np.ndarray


@dataclasses.dataclass
class Eye:
    """Everything about an eye that all its photographs share."""

    side: str
    grade: int
    disc: np.ndarray
    fovea: np.ndarray
    disc_axes: np.ndarray
    cup: float
    base: np.ndarray       # fundus colour, RGB in [0, 1]
    tessellation: float
    texture_key: int
    vessels: list
    lesions: list


@dataclasses.dataclass
class Phantom:
    """A photograph: image uint8 [S, S, 3], vessel mask bool [S, S], and the eye it shows."""

    image: np.ndarray
    vessel_mask: np.ndarray
    eye: Eye


# -- anatomy --------------------------------------------------------------------------------


def make_eye(seed, patient, side, grade):
    """Draws the anatomy and the lesions of one eye; `side` is 'left' or 'right'.

    The two eyes of a patient share pigmentation and disc shape, not vessels.
    """
    shared = numpy_generator(seed, 'patient', patient)
    own = numpy_generator(seed, 'patient', patient, 'eye', side)
    pigment = shared.beta(2.2, 2.2)      # 0: blond fundus, 1: dark
    base = (1 - pigment) * np.array([0.80, 0.44, 0.22]) + pigment * np.array([0.60, 0.26, 0.10])
    base = base * shared.normal(1, 0.04, 3)
    tessellation = max(0.0, shared.normal(0.55 - 0.5 * pigment, 0.15))
    cup = shared.uniform(0.25, 0.6)
    disc_scale = shared.normal(1, 0.07)
    disc = np.array([0.52, -0.02]) + own.normal(0, [0.03, 0.02])
    fovea = disc + np.array([-0.68, 0.09]) + own.normal(0, [0.02, 0.02])
    eye = Eye(side=side, grade=grade, disc=disc, fovea=fovea,
              disc_axes=_DISC_RADIUS * disc_scale * np.array([0.93, 1.06]) * own.normal(1, .03, 2),
              cup=cup, base=base, tessellation=tessellation,
              texture_key=int(own.integers(2 ** 31)), vessels=[], lesions=[])
    beading = grade >= 3
    eye.vessels = _vessel_tree(eye, own, beading)
    _add_lesions(eye, numpy_generator(seed, 'patient', patient, 'lesions', side))
    return eye


def _bezier(p0, p1, p2, p3, n):
    t = np.linspace(0, 1, n)[:, None]
    return ((1 - t) ** 3 * p0 + 3 * (1 - t) ** 2 * t * p1 + 3 * (1 - t) * t ** 2 * p2
            + t ** 3 * p3)


def _unit(vector):
    return vector / (np.linalg.norm(vector) + 1e-9)


def _wander(points, rng, amplitude, waves):
    """Displaces a line sideways by a smooth random curve (tortuosity)."""
    s = np.linspace(0, 1, len(points))
    order = np.arange(1, 4)[:, None]
    sizes, phases = rng.normal(0, amplitude, (3, 1)) / order, rng.uniform(0, 2 * np.pi, (3, 1))
    shift = (sizes * np.sin(2 * np.pi * waves * order * s + phases)).sum(0)
    tangent = np.gradient(points, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], 1)
    normal /= np.hypot(normal[:, :1], normal[:, 1:]) + 1e-9
    return points + normal * (shift * np.minimum(1, 6 * s))[:, None]


def _vessel_tree(eye, rng, beading):
    vessels = []
    tortuosity = abs(rng.normal(0.012, 0.004))
    for kind in ('vein', 'artery'):
        apart = 0.05 if kind == 'vein' else -0.03
        for up in (-1, 1):
            reach = rng.normal(0, 0.05, 6)
            start = eye.disc + np.array([rng.normal(0, 0.012), up * 0.015])
            temporal = _bezier(
                start, eye.disc + np.array([0.04 + reach[0], up * (0.44 + reach[1] + apart)]),
                eye.fovea + np.array([0.30 + reach[2], up * (0.66 + apart + reach[3])]),
                eye.fovea + np.array([-0.72 + reach[4], up * (0.40 + reach[5] + 2 * apart)]), 70)
            bend = rng.normal(0, 0.07, 4)
            nasal = _bezier(
                start, eye.disc + np.array([0.06 + bend[0], up * 0.16]),
                eye.disc + np.array([0.22 + bend[1], up * (0.40 + apart)]),
                eye.disc + np.array([0.42 + bend[2], up * (0.86 + bend[3])]), 45)
            trunk = _TRUNK[kind] * rng.normal(1, 0.08)
            for line, radius in ((temporal, trunk), (nasal, trunk * 0.78)):
                line = _wander(line, rng, tortuosity, rng.uniform(1.0, 2.2))
                _grow(vessels, kind, line, radius, 0, eye, rng, tortuosity)
            # Macular twigs leave the arcade and stop at the avascular zone.
            for _ in range(int(rng.integers(2, 4))):
                origin = temporal[int(rng.integers(18, 46))]
                ring = eye.fovea + 0.13 * _unit(origin - eye.fovea + rng.normal(0, 0.2, 2))
                bend = (origin + ring) / 2 + rng.normal(0, 0.07, 2)
                line = _wander(_bezier(origin, bend, bend, ring, 26), rng, tortuosity, 1.5)
                _grow(vessels, kind, line, trunk * rng.uniform(0.3, 0.42), 2, eye, rng, tortuosity)
        # One or two short vessels straight from the disc towards the macula or the nose.
        for toward in (-1, 1):
            aim = eye.disc + np.array([toward * rng.uniform(0.3, 0.45), rng.normal(0, 0.14)])
            middle = (eye.disc + aim) / 2 + rng.normal(0, 0.05, 2)
            line = _wander(_bezier(eye.disc, middle, middle, aim, 24), rng, tortuosity, 1.5)
            _grow(vessels, kind, line, _TRUNK[kind] * 0.38, 2, eye, rng, tortuosity)
    if beading:
        for vessel in vessels:
            if vessel.kind == 'vein' and vessel.depth <= 1:
                phase = np.cumsum(np.full(len(vessel.radius), rng.uniform(0.7, 1.0)))
                vessel.radius = vessel.radius * (1 + 0.38 * np.sin(phase))
    return vessels


def _grow(vessels, kind, line, radius, depth, eye, rng, tortuosity):
    """Adds a vessel along `line` and lets branches leave it (Murray's law for the calibres)."""
    n = len(line)
    steps = np.hypot(*np.diff(line, axis=0).T)
    length = np.concatenate([[0], np.cumsum(steps)])
    spacing = (0.13, 0.11, 0.10, 0.09)[min(depth, 3)]
    next_branch = rng.uniform(0.5, 1.2) * spacing + (0.14 if depth == 0 else 0.02)
    outside = (line * line).sum(1) > 1.1
    if depth > 0:
        outside |= ((line - eye.fovea) ** 2).sum(1) < _AVASCULAR ** 2
    radii = np.empty(n)
    side = rng.choice([-1, 1])
    current, end = radius, n
    children = []
    for i in range(n):
        if current < _THINNEST or outside[i]:
            end = i
            break
        radii[i] = current
        if length[i] >= next_branch and i < n - 3 and depth < 4:
            share = rng.uniform(0.35, 0.75)              # child over parent calibre
            child = current * share
            current = (current ** 3 - child ** 3) ** (1 / 3)
            tangent = line[min(i + 1, n - 1)] - line[max(i - 1, 0)]
            children.append((line[i].copy(), math.atan2(tangent[1], tangent[0]), child, side))
            side = -side if rng.random() < 0.75 else side
            next_branch = length[i] + spacing * rng.uniform(0.6, 1.6)
    if end < 2:
        return
    taper = np.linspace(1, 0.72, end)
    vessels.append(Vessel(kind, line[:end], radii[:end] * taper, depth))
    for where, heading, child, turn in children:
        if child < _THINNEST:
            continue
        angle = heading + turn * rng.uniform(0.45, 1.05)
        total = rng.uniform(0.20, 0.42) * (child / 0.008) ** 0.45
        count = max(8, int(total / 0.02))
        curl = rng.normal(0, 0.9)
        angles = angle + np.cumsum((curl - 0.9 * turn) * total / count
                                   + rng.normal(0, 0.05, count))
        steps = total / count * np.stack([np.cos(angles), np.sin(angles)], 1)
        points = where + np.cumsum(steps, axis=0) - steps[0]
        points = _wander(points, rng, tortuosity * 0.5, 2)
        _grow(vessels, kind, points, child, depth + 1, eye, rng, tortuosity)


# -- lesions --------------------------------------------------------------------------------

# kind -> (fewest, most) per grade 0..4
_COUNTS = {
    'microaneurysm': ((0, 0), (3, 9), (10, 26), (20, 42), (14, 34)),
    'dot': ((0, 0), (0, 0), (4, 14), (18, 36), (10, 26)),
    'blot': ((0, 0), (0, 0), (1, 5), (6, 14), (3, 9)),
    'exudates': ((0, 0), (0, 0), (1, 4), (2, 5), (1, 5)),
    'cotton': ((0, 0), (0, 0), (0, 2), (2, 6), (1, 5)),
    'new_vessels': ((0, 0), (0, 0), (0, 0), (0, 0), (1, 3)),
    'preretinal': ((0, 0), (0, 0), (0, 0), (0, 0), (0, 1)),
}
_RADII = {'microaneurysm': (0.007, 0.011), 'dot': (0.011, 0.018), 'blot': (0.022, 0.045),
          'cotton': (0.024, 0.045), 'exudate': (0.005, 0.014), 'preretinal': (0.12, 0.2)}


def _place(eye, rng, spread):
    """A point in the posterior pole, off the disc."""
    while True:
        where = (eye.fovea + eye.disc) / 2 * np.array([0.6, 1]) + rng.normal(0, spread, 2)
        if where @ where < 0.8 and np.linalg.norm((where - eye.disc) / eye.disc_axes) > 1.4:
            return where


def _outline(rng, roughness):
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return 1 + sum(rng.normal(0, roughness / i) * np.cos(i * angle + rng.uniform(0, 6.28))
                   for i in range(1, 5))


def _add_lesions(eye, rng):
    def some(kind):
        low, high = _COUNTS[kind][eye.grade]
        return int(rng.integers(low, high + 1))

    def radius(kind):
        return rng.uniform(*_RADII[kind])

    for kind, spread, roughness in (('microaneurysm', 0.32, 0.05), ('dot', 0.38, 0.12),
                                    ('blot', 0.4, 0.28), ('cotton', 0.36, 0.25)):
        for _ in range(some(kind)):
            eye.lesions.append(Lesion(kind, _place(eye, rng, spread), radius(kind),
                                      _outline(rng, roughness)))
    for _ in range(some('exudates')):
        centre = _place(eye, rng, 0.28)
        ring = rng.random() < 0.4          # circinate ring around a leak, or a plain cluster
        for _ in range(int(rng.integers(8, 26))):
            angle, distance = rng.uniform(0, 2 * np.pi), rng.normal(0.09, 0.015) if ring else abs(
                rng.normal(0, 0.055))
            offset = distance * np.array([math.cos(angle), math.sin(angle)])
            eye.lesions.append(Lesion('exudate', centre + offset, radius('exudate'),
                                      _outline(rng, 0.2)))
    for i in range(some('new_vessels')):
        at_disc = i == 0 and rng.random() < 0.6
        centre = eye.disc + rng.normal(0, 0.03, 2) if at_disc else _place(eye, rng, 0.45)
        for _ in range(int(rng.integers(9, 16))):
            angle = rng.uniform(0, 2 * np.pi)
            count = int(rng.integers(14, 26))
            turn = rng.normal(0, 0.35)
            points, position = np.empty((count, 2)), centre.copy()
            for j in range(count):
                points[j] = position
                angle += turn + rng.normal(0, 0.5)
                position = position + 0.011 * np.array([math.cos(angle), math.sin(angle)])
            eye.vessels.append(Vessel('new', points, np.full(count, 0.0042), 9))
    for _ in range(some('preretinal')):
        eye.lesions.append(Lesion('preretinal', _place(eye, rng, 0.4), radius('preretinal'),
                                  _outline(rng, 0.1)))


# -- photograph -----------------------------------------------------------------------------


def photograph(eye, *, size, seed, patient, visit):
    """One visit's photograph of an eye as a Phantom; deterministic from its arguments.

    size: width in pixels, MIN_SIZE to MAX_SIZE.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f'size {size} is outside {MIN_SIZE}..{MAX_SIZE}')
    rng = numpy_generator(seed, 'patient', patient, 'visit', eye.side, visit)
    mirror = -1 if eye.side == 'left' else 1
    angle, zoom = rng.normal(0, 0.045), rng.normal(1, 0.02)
    gaze = rng.normal(0, 0.035, 2)
    turn = zoom * np.array([[math.cos(angle), -math.sin(angle)],
                            [math.sin(angle), math.cos(angle)]])

    def view(points):
        """Retina -> picture, both in units of the field of view."""
        return (np.asarray(points) * np.array([mirror, 1])) @ turn.T + gaze

    half = size / 2
    axis = (np.arange(size, dtype=np.float32) + 0.5 - half) / (half * _FOV)
    x, y = np.meshgrid(axis, axis)
    r2 = x * x + y * y
    layers = _draw(eye, view, size)
    image = _background(eye, view, x, y, r2, size)
    veil = layers['artery'][..., None] * np.array([0.26, 0.62, 0.45], np.float32)
    veil += layers['vein'][..., None] * np.array([0.42, 0.85, 0.60], np.float32)
    veil += layers['blood'][..., None] * np.array([0.55, 1.15, 0.9], np.float32)
    image *= np.exp(-veil)
    image += layers['reflex'][..., None] * np.array([0.10, 0.07, 0.04], np.float32)
    for name, colour in (('exudate', (0.95, 0.86, 0.52)), ('cotton', (0.90, 0.84, 0.70))):
        weight = layers[name][..., None]
        image = image * (1 - weight) + weight * np.array(colour, np.float32)
    image = _camera(image, x, y, r2, size, rng)
    mask = (layers['mask'] > 0.5) & (r2 < 1)
    return Phantom(image, mask, eye)


def render_phantom(seed, patient, side, visit, grade, size):
    """make_eye and photograph in one step."""
    eye = make_eye(seed, patient, side, grade)
    return photograph(eye, size=size, seed=seed, patient=patient, visit=visit)


def _noise(key, size, cells):
    """Smooth noise of unit variance, [size, size], with about `cells` bumps across."""
    coarse = numpy_generator(key, 'texture', cells).standard_normal((cells, cells))
    image = Image.fromarray(coarse.astype(np.float32))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _background(eye, view, x, y, r2, size):
    fovea, disc = view(eye.fovea), view(eye.disc)
    key = eye.texture_key
    cloud = 0.035 * _noise(key, size, 5) + 0.02 * _noise(key, size, 14)
    stripes = _noise(key + 1, size, 40) * 0.7 + _noise(key + 2, size, 22)
    cloud = cloud + 0.035 * eye.tessellation * np.minimum(stripes, 0.6)
    light = (1.04 - 0.30 * r2 + cloud).astype(np.float32)
    far = (x - fovea[0]) ** 2 + (y - fovea[1]) ** 2
    macula = 0.22 * np.exp(-far / (2 * 0.15 ** 2)) + 0.16 * np.exp(-far / (2 * 0.045 ** 2))
    image = light[..., None] * eye.base.astype(np.float32)
    image *= np.exp(-macula[..., None] * np.array([0.75, 1.05, 1.3], np.float32))
    # The nerve fibre layer brightens the arcs above and below the disc.
    u, v = (x - disc[0]) / eye.disc_axes[0], (y - disc[1]) / eye.disc_axes[1]
    d = np.sqrt(u * u + v * v)
    sheen = np.exp(-((d - 1.6) / 1.4) ** 2) * (0.4 + 0.6 * np.minimum(1, np.abs(v) / 2))
    image += 0.045 * sheen[..., None] * np.array([0.5, 1.0, 0.7], np.float32)
    softness = 0.09
    rim = 1 / (1 + np.exp((d - 1) / softness))
    cup = 1 / (1 + np.exp((np.hypot(u - 0.04, v) - eye.cup) / 0.14))
    shade = 1 + 0.05 * _noise(key + 3, size, 24)
    rim_colour = np.array([0.94, 0.66, 0.38], np.float32) * (0.55 + 0.6 * eye.base[0])
    cup_colour = np.array([0.99, 0.88, 0.66], np.float32) * (0.55 + 0.6 * eye.base[0])
    nerve = (rim_colour + cup[..., None] * (cup_colour - rim_colour)) * shade[..., None]
    return (image * (1 - rim[..., None]) + rim[..., None] * nerve).astype(np.float32)


def _runs(values):
    """(start, stop) of stretches of equal values, at least one step long."""
    cuts = [0, *(np.flatnonzero(np.diff(values)) + 1), len(values) - 1]
    return [(a, b) for a, b in zip(cuts, cuts[1:]) if b > a]


def _draw(eye, view, size):
    """Coverage maps [S, S] in [0, 1]: artery, vein, reflex, blood, exudate, cotton, mask."""
    factor = max(2, -(-384 // size))
    canvas = size * factor
    scale = canvas / 2 * _FOV

    def new():
        image = Image.new('L', (canvas, canvas))
        return image, ImageDraw.Draw(image)

    def pixels(points):
        return view(points) * scale + canvas / 2

    names = ('artery', 'vein', 'reflex', 'blood', 'exudate', 'cotton', 'mask')
    sheets = {name: new() for name in names}
    for vessel in sorted(eye.vessels, key=lambda v: -v.depth):
        points = pixels(vessel.points)
        kind = 'artery' if vessel.kind == 'artery' else 'vein'
        width = 2 * vessel.radius * scale
        # Thin vessels absorb less light; a line can't be thinner than a canvas pixel.
        fill = np.clip(255 * (0.42 + 0.58 * vessel.radius / 0.011), 60, 255) * np.minimum(width, 1)
        for start, stop in _runs(np.maximum(1, np.rint(width))):
            line = [tuple(p) for p in points[start:stop + 1]]
            w = max(1, round(width[start]))
            sheets[kind][1].line(line, fill=int(fill[start]), width=w, joint='curve')
            sheets['mask'][1].line(line, fill=255, width=w, joint='curve')
            if w >= 4:
                reflex = 150 if kind == 'artery' else 70
                sheets['reflex'][1].line(line, fill=reflex, width=max(1, round(w * 0.3)))
    around = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    for lesion in eye.lesions:
        reach = lesion.radius * lesion.outline[:, None]
        outline = lesion.centre + reach * np.stack([np.cos(around), np.sin(around)], 1)
        if lesion.kind == 'preretinal':      # settles with a level top, like a boat
            outline[:, 1] = np.maximum(outline[:, 1], lesion.centre[1] - 0.25 * lesion.radius)
        sheet = {'exudate': 'exudate', 'cotton': 'cotton'}.get(lesion.kind, 'blood')
        fill = {'microaneurysm': 190, 'exudate': 235, 'cotton': 175}.get(lesion.kind, 235)
        sheets[sheet][1].polygon([tuple(p) for p in pixels(outline)], fill=fill)
    maps = {}
    for name, (sheet, _) in sheets.items():
        small = sheet.reduce(factor)
        maps[name] = np.asarray(small, dtype=np.float32) / 255
    maps['cotton'] = ndimage.gaussian_filter(maps['cotton'], 0.007 * size)
    maps['blood'] = ndimage.gaussian_filter(maps['blood'], 0.0018 * size)
    return maps


def _camera(image, x, y, r2, size, rng):
    """Uneven light, colour balance, blur, noise, haze and the edge of the field of view."""
    toward = rng.uniform(0, 2 * np.pi)
    tilt = rng.normal(0, 0.07)
    light = 1 + tilt * (x * math.cos(toward) + y * math.sin(toward)) - 0.12 * r2 * r2
    exposure = math.exp(rng.normal(0, 0.09))
    balance = np.exp(rng.normal(0, 0.03, 3)).astype(np.float32)
    image = image * (light * exposure)[..., None].astype(np.float32) * balance
    haze = abs(rng.normal(0, 0.018))
    image = image * (1 - haze) + haze * np.array([0.8, 0.6, 0.45], np.float32)
    sigma = size / 256 * rng.uniform(0.25, 0.85)
    image = ndimage.gaussian_filter(image, (sigma, sigma, 0), truncate=3)
    grain = rng.standard_normal((size, size, 1), dtype=np.float32) * 0.008
    grain = grain + rng.standard_normal((size, size, 3), dtype=np.float32) * 0.005
    edge = np.clip((1 - np.sqrt(r2)) * size / 2 * _FOV / 1.2 + 0.5, 0, 1).astype(np.float32)
    image = np.clip(image + grain, 0, 1)
    image = image / (1 + 0.12 * np.maximum(image - 0.7, 0))      # soft shoulder of the sensor
    return (image * edge[..., None] * 255 + 0.5).astype(np.uint8)


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
    phantom = render_phantom(seed, patient, side, visit, grade, size)
    name = f'{_id_code(patient, side, visit)}.png'
    save_png(Image.fromarray(phantom.image), out_dir / 'images' / name)
    if masks:
        save_png(Image.fromarray(phantom.vessel_mask.astype(np.uint8) * 255),
                 out_dir / 'masks' / name)
