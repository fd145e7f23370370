"""From an eye and a view to pixels: background, disc, lesions, vessels, camera."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from scipy.ndimage import gaussian_filter

from datasets.phantoms.eye import EyeModel, View
from datasets.phantoms.traits import FIELD_FRACTION, Mark, Traits, smoothstep
from datasets.phantoms.vessels import Vessel

EYES = ('left', 'right')
GRADES = (0, 1, 2, 3, 4)

# Absorption in R, G, B at the axis of a large vessel.
_VEIN_ABSORPTION = np.array([0.36, 0.80, 0.55], np.float32)
_ARTERY_ABSORPTION = np.array([0.15, 0.58, 0.46], np.float32)
_BLOOD_ABSORPTION = np.array([0.42, 1.25, 0.95], np.float32)


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
    lesions: tuple[Lesion, ...]
    grade: int
    disc: tuple[float, float]
    fovea: tuple[float, float]


def _splat(
    size: int,
    x: Float[np.ndarray, ' n'],
    y: Float[np.ndarray, ' n'],
    weight: Float[np.ndarray, ' n'],
) -> Float[np.ndarray, '{size} {size}']:
    """Adds point weights to the four nearest pixels of a [size, size] picture (bilinear)."""
    x, y = x - 0.5, y - 0.5
    column, row = np.floor(x), np.floor(y)
    fx, fy = x - column, y - row
    column, row = column.astype(np.int64) + 1, row.astype(np.int64) + 1
    inside = (column >= 0) & (column <= size) & (row >= 0) & (row <= size)
    column, row, fx, fy, weight = (a[inside] for a in (column, row, fx, fy, weight))
    side = size + 2
    index = np.concatenate(
        [
            row * side + column,
            row * side + column + 1,
            (row + 1) * side + column,
            (row + 1) * side + column + 1,
        ]
    )
    values = np.concatenate(
        [
            (1 - fx) * (1 - fy) * weight,
            fx * (1 - fy) * weight,
            (1 - fx) * fy * weight,
            fx * fy * weight,
        ]
    )
    full = np.bincount(index, values, minlength=side * side).reshape(side, side)
    return full[1:-1, 1:-1].astype(np.float32)


def _vessel_maps(
    vessels: Sequence[Vessel], view: View
) -> dict[bool, tuple[Float[np.ndarray, 'S S'], Float[np.ndarray, 'S S']]]:
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
            width = (
                w0[chosen][:, None] * (1 - along[..., 0]) + w1[chosen][:, None] * along[..., 0]
            )[..., None]
            x, y = (
                starts[chosen][:, None, None, i]
                + step[chosen][:, None, None, i] * along
                + normal[chosen][:, None, None, i] * across * width / 2
                for i in (0, 1)
            )
            patch = np.broadcast_to(width * (length[chosen] / (m * n))[:, None, None], x.shape)
            profile = np.sqrt(1 - across**2) * (0.62 if vein else 0.72)
            if not vein:  # the arteriolar light reflex
                profile = profile * (1 - 0.45 * np.exp(-((across / 0.35) ** 2)))
            # Thin vessels absorb less, though more than in proportion to their thickness.
            depth = np.sqrt(width / (0.5 * view.pixels)) * 1.6
            density += _splat(view.size, x.ravel(), y.ravel(), (patch * profile * depth).ravel())
            area += _splat(view.size, x.ravel(), y.ravel(), patch.ravel())
        maps[vein] = density, area
    return maps


def _dots(
    size: int,
    x: Float[np.ndarray, ' n'],
    y: Float[np.ndarray, ' n'],
    radius: Float[np.ndarray, ' n'],
    strength: Float[np.ndarray, ' n'],
) -> Float[np.ndarray, '{size} {size}']:
    """Round soft dots of given pixel radii; dots below the pixel size keep their total weight."""
    canvas = np.zeros((size, size), np.float32)
    if len(x) == 0:
        return canvas
    sigma = np.sqrt((0.72 * radius) ** 2 + 0.3**2)
    peak = strength * np.minimum(1, 1.5 * (0.72 * radius / sigma) ** 2)
    reach = math.ceil(3 * sigma.max())
    window = np.arange(-reach, reach + 1)
    columns = np.floor(x).astype(int)[:, None] + window
    rows = np.floor(y).astype(int)[:, None] + window
    scale = (-0.5 / sigma**2)[:, None]
    gx = np.exp(scale * (columns + 0.5 - x[:, None]) ** 2)
    gy = np.exp(scale * (rows + 0.5 - y[:, None]) ** 2)
    for i in range(len(x)):
        r0, c0 = rows[i, 0], columns[i, 0]
        r1, c1 = max(r0, 0), max(c0, 0)
        r2, c2 = min(rows[i, -1] + 1, size), min(columns[i, -1] + 1, size)
        if r1 < r2 and c1 < c2:
            canvas[r1:r2, c1:c2] += (
                peak[i] * gy[i, r1 - r0 : r2 - r0, None] * gx[i, None, c1 - c0 : c2 - c0]
            )
    return canvas


def _patch(
    canvas: Float[np.ndarray, 'S S'],
    mark: Mark,
    x: float,
    y: float,
    view: View,
    *,
    soft: float,
    flat_top: bool = False,
) -> None:
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
    edge = 1 + sum(
        size_ * np.cos(k * angle + phase) for k, (size_, phase) in enumerate(mark.wobble, 2)
    )
    soft = max(soft, 0.7 / max(wide_b, 0.7))
    value = 1 - smoothstep(1 - soft / 2, 1 + soft / 2, distance / np.maximum(edge, 0.3))
    if flat_top:
        value = value * (1 - smoothstep(-0.06, 0.06, dy / wide_b - 0.12))
    canvas[r0:r1, c0:c1] += mark.strength * a * b / (wide_a * wide_b) * value


_DOT_KINDS = ('microaneurysm', 'hard_exudate')
_EDGES = {
    'dot_haemorrhage': 0.5,
    'blot_haemorrhage': 0.7,
    'flame_haemorrhage': 0.7,
    'preretinal_haemorrhage': 0.12,
    'cotton_wool_spot': 1.1,
    'fibrous_tissue': 0.9,
}


def _lesion_maps(
    eye: EyeModel, view: View
) -> tuple[dict[str, Float[np.ndarray, 'S S']], list[Lesion]]:
    """Maps of blood, exudate and white tissue [size, size], and the list of Lesions in view."""
    size = view.size
    maps = {name: np.zeros((size, size), np.float32) for name in ('blood', 'exudate', 'white')}
    found: list[Lesion] = []
    if not eye.marks:
        return maps, found
    centres = view.to_pixels(np.array([(m.x, m.y) for m in eye.marks]))
    for mark, (x, y) in zip(eye.marks, centres):
        if math.hypot(x - size / 2, y - size / 2) < FIELD_FRACTION * size:
            found.append(
                Lesion(mark.kind, float(x), float(y), math.sqrt(mark.a * mark.b) * view.pixels)
            )
        if mark.kind in _EDGES:
            name = 'blood' if 'haemorrhage' in mark.kind else 'white'
            _patch(
                maps[name],
                mark,
                x,
                y,
                view,
                soft=_EDGES[mark.kind],
                flat_top=mark.kind == 'preretinal_haemorrhage',
            )
    for kind, name in zip(_DOT_KINDS, ('blood', 'exudate')):
        chosen = [i for i, m in enumerate(eye.marks) if m.kind == kind]
        maps[name] += _dots(
            size,
            centres[chosen, 0],
            centres[chosen, 1],
            np.array([eye.marks[i].a for i in chosen]) * view.pixels,
            np.array([eye.marks[i].strength for i in chosen]),
        )
    return maps, found


def _background(
    eye: EyeModel, view: View, x: Float[np.ndarray, 'S S'], y: Float[np.ndarray, 'S S']
) -> tuple[Float[np.ndarray, '3 S S'], Float[np.ndarray, ' 3']]:
    """Retina and choroid without disc, vessels and lesions: float32 [3, size, size]."""
    traits = eye.traits
    colour = np.exp(traits.log_colour + view.exposure + view.balance).astype(np.float32)
    fine = sum(
        weight * view.sample(cell, values)
        for weight, (cell, values) in zip((0.05, 0.03, 0.014, 0.011, 0.013), eye.octaves)
    )
    ridges = sum(
        weight * np.clip(1 - np.abs(view.sample(cell, values)) * 1.7, 0, 1)
        for weight, (cell, values) in zip((0.6, 0.4), eye.choroid)
    )
    eccentricity = np.hypot(x, y)
    # The choroid shows least where the macular pigment is densest.
    shows = traits.tessellation * smoothstep(3.0, 14.0, eccentricity)
    choroid = shows * (ridges - 0.25)
    macula = traits.macula * np.exp(-((eccentricity / 3.6) ** 2)) + 0.55 * traits.macula * np.exp(
        -((eccentricity / 1.05) ** 2)
    )
    sheen = traits.sheen * np.exp(-(((np.abs(y) - 6.5) / 3.2) ** 2) - ((x - 11) / 8.0) ** 2)
    ring = eye.ring * np.exp(-(((eccentricity - 3.4) / 0.5) ** 2))
    planes = []
    for channel, (grain, vessel, dark) in enumerate(
        ((0.7, 0.10, 0.55), (1.0, 0.26, 1.0), (1.2, 0.32, 0.9))
    ):
        log = grain * fine - vessel * choroid - dark * macula + sheen + ring
        planes.append(colour[channel] * np.exp(log))
    image = np.stack(planes)
    reflex = eye.reflex * np.exp(-((x - 0.15) ** 2 + (y - 0.1) ** 2) / 0.16)
    return image + reflex, colour


def _add_disc(
    image: Float[np.ndarray, '3 S S'],
    eye: EyeModel,
    x: Float[np.ndarray, 'S S'],
    y: Float[np.ndarray, 'S S'],
    colour: Float[np.ndarray, ' 3'],
) -> Float[np.ndarray, '3 S S']:
    """Blends the optic disc (rim, cup, halo, crescent) into `image` [3, size, size]."""
    dx, dy = x - eye.disc[0], y - eye.disc[1]
    c, s = math.cos(eye.disc_tilt), math.sin(eye.disc_tilt)
    p, q = (c * dx + s * dy) / eye.disc_axes[0], (-s * dx + c * dy) / eye.disc_axes[1]
    e = np.hypot(p, q)
    disc = 1 - smoothstep(0.90, 1.08, e)
    cup = 1 - smoothstep(0.4, 1.5, np.hypot(p + 0.10, q) / eye.cup)
    halo = 0.22 * np.exp(-np.clip(e - 1, 0, None) / 0.45)
    crescent = eye.crescent * (1 - smoothstep(1.0, 1.2, np.hypot(p + 0.16, q * 0.96)))
    nasal = smoothstep(-0.6, 1.0, p)
    for channel, (rim_power, cup_power, pink) in enumerate(
        ((0.22, 0.12, 0.02), (0.48, 0.30, 0.10), (0.68, 0.46, 0.06))
    ):
        rim = colour[channel] ** rim_power * (1 - pink * nasal)
        white = colour[channel] ** cup_power
        plane = image[channel] * (1 + halo)
        plane = plane + crescent * (0.75 * rim - plane) * (1 - disc)
        own = rim + cup * (white - rim)
        image[channel] = plane + disc * (own * (0.5 + 0.5 * plane / colour[channel]) - plane)
    return image


def _photograph(
    image: Float[np.ndarray, '3 S S'], view: View, traits: Traits
) -> tuple[UInt8[np.ndarray, 'S S 3'], Float[np.ndarray, 'S S']]:
    """Camera: illumination, haze, blur, noise. Picture uint8 [S, S, 3] and field of view [S, S]."""
    size = view.size
    offset = ((np.arange(size) + 0.5) / size - 0.5) / FIELD_FRACTION
    u, v = offset[None, :].astype(np.float32), offset[:, None].astype(np.float32)
    r = np.hypot(u, v)
    light = (1 - view.vignette * np.clip(r, 0, 1.2) ** 2.6) * (
        1 + view.tilt[0] * u + view.tilt[1] * v
    )
    if view.blur > 0.15:
        image = np.stack([gaussian_filter(p, view.blur, truncate=3) for p in image])
    image = image * light
    across = u * math.cos(view.veil_angle) + v * math.sin(view.veil_angle)
    veil = view.veil * smoothstep(0.1, 1.2, across) + traits.haze * np.clip(r, 0, 1) ** 14
    image = image + veil * (np.array([0.55, 0.80, 0.80], np.float32)[:, None, None] - image)
    grain = view.rng.standard_normal((3, size, size), dtype=np.float32)
    shared = view.rng.standard_normal((size, size), dtype=np.float32)
    image = image + view.noise * (0.6 * grain + shared) * np.sqrt(np.clip(image, 0.05, 1))
    # A soft shoulder, as sensors and their gamma have, instead of clipped highlights.
    image = np.where(image > 0.8, 0.8 + 0.2 * np.tanh((image - 0.8) / 0.2), image)
    field = np.clip((1 - r) * size * FIELD_FRACTION / 1.2 + 0.5, 0, 1)
    pixels = np.rint(np.clip(image, 0.012, 1) * field * 255)
    return np.ascontiguousarray(pixels.astype(np.uint8).transpose(1, 2, 0)), field


def _render(eye: EyeModel, view: View) -> Phantom:
    x, y = view.retina_grid()
    image, colour = _background(eye, view, x, y)
    image = _add_disc(image, eye, x, y, colour)
    lesions, found = _lesion_maps(eye, view)
    exudate = np.clip(lesions['exudate'], 0, 1)
    white = np.clip(lesions['white'], 0, 1)
    vessels = _vessel_maps(eye.vessels, view)
    blood = np.clip(lesions['blood'], 0, 1.1)
    light = [min(1.0, 1.18 * c**p) for c, p in zip(colour, (0.22, 0.35, 0.75))]
    pale = [min(1.0, 1.05 * c**p) for c, p in zip(colour, (0.35, 0.40, 0.45))]
    vein, artery = (np.minimum(vessels[kind][0], 1.25) for kind in (True, False))
    for channel in range(3):
        plane = image[channel]
        plane = plane + exudate * (light[channel] - plane)
        absorbed = (
            _VEIN_ABSORPTION[channel] * vein
            + _ARTERY_ABSORPTION[channel] * artery
            + _BLOOD_ABSORPTION[channel] * blood
        )
        plane = plane * np.exp(-absorbed)
        image[channel] = plane + 0.85 * white * (pale[channel] - plane)
    pixels, field = _photograph(image, view, eye.traits)
    mask = ((vessels[True][1] + vessels[False][1]) > 0.4) & (field > 0.5)
    marks = view.to_pixels(np.array([eye.disc, (0.0, 0.0)]))
    return Phantom(
        pixels, mask, tuple(found), eye.grade, tuple(marks[0].tolist()), tuple(marks[1].tolist())
    )


def _check(eye: str, grade: int, size: int) -> None:
    if eye not in EYES:
        raise ValueError(f'eye must be one of {EYES}, not {eye!r}')
    if grade not in GRADES:
        raise ValueError(f'grade must be one of {GRADES}, not {grade!r}')
    if size < 16:
        raise ValueError(f'size must be at least 16, not {size}')


def render_phantom(
    *, seed: int, patient: int, eye: str, visit: int, grade: int, size: int
) -> Phantom:
    """Renders one fundus phantom.

    seed, patient, visit: whole numbers from 0; eye: 'left' or 'right'; grade: DR grade 0-4;
    size: side in pixels. The picture is a function of these alone. Visits share vessels, disc
    and lesions; grades of one eye share everything but the lesions.
    ValueError for other values.
    """
    _check(eye, grade, size)
    model = EyeModel(seed, patient, eye, grade)
    return _render(model, View(seed, patient, eye, visit, model, size))
