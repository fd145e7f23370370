"""The circular field of view of a fundus photograph: finding it, cropping to it, masking it.

A fundus camera sees a disc. In a file that disc may be cut flat by the sensor (top, bottom or
sides), may be larger than the frame, may carry an orientation notch or burnt-in text, may be
squeezed to an ellipse by a careless resize, may be dark in places, and may lie on black or on
white. The disc is therefore fitted to the rim that can be seen instead of being read off the
extent of the bright pixels.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Num, UInt8
from PIL import Image
from scipy import ndimage

from utils.errors import UserError

_WORK_SIZE = 320  # the long side at which the rim is looked for, in pixels
_NEAR_BLACK = 20  # a frame whose 95th percentile of the largest channel is below this
_BLANK = 8  # a frame whose values span less than this holds no picture
_DARK_MARGIN = 50  # edges brighter than this are retina, not margin
_WHITE = 240  # all channels at least this: a white margin
_RAYS = 360
_HYPOTHESES = 300
_EARNED = 0.1  # share of the rim points that an ellipse explains beyond what a circle does
_TOLERANCE = 0.012  # rim points this close to the disc (in radii) count as on it


class UnusableFrame(UserError):
    """The frame shows no retina: near-black, or one flat colour."""


@dataclasses.dataclass(frozen=True)
class Fov:
    """A field of view in pixel coordinates of the full-size picture.

    kind: 'disc' (a rim was fitted; `cx, cy, rx, ry` describe the ellipse, which may reach beyond
        the frame), 'box' (a margin was found but no disc fits it) or 'frame' (no margin at all);
        for the latter two the ellipse is the one inscribed in the box.
    box: (left, top, right, bottom), whole pixels, the part of the field inside the frame.
    white_margin: whether the surroundings are white and not black.
    """

    kind: str
    cx: float
    cy: float
    rx: float
    ry: float
    box: tuple
    white_margin: bool = False


def check_frame(values: Num[np.ndarray, 'H W']) -> None:
    """Raises UnusableFrame for a near-black or flat [H, W] array of channel maxima (0-255)."""
    low, high, top = np.percentile(values, (1, 95, 99))
    if high < _NEAR_BLACK:
        raise UnusableFrame(f'near-black frame (95% of its pixels are at most {high:.0f} of 255)')
    if top - low < _BLANK:
        raise UnusableFrame('blank frame (one flat colour)')


def find_fov(image: Image.Image) -> Fov:
    """Finds the field of view of a PIL RGB picture; UnusableFrame when there is no picture."""
    shrink = max(max(image.size) / _WORK_SIZE, 1.0)
    size = [max(round(s / shrink), 1) for s in image.size]
    small = image.resize(size, Image.Resampling.BOX, reducing_gap=1.0)
    bands = [np.asarray(band) for band in small.split()]
    values = functools.reduce(np.maximum, bands).astype(np.int16)
    check_frame(values)
    scale = [full / part for full, part in zip(image.size, size)]

    white = _white_margin(functools.reduce(np.minimum, bands))
    if white is not None:
        fov = _fit(np.where(white, 0, values), scale, image.size)
        if fov.kind == 'disc':
            return dataclasses.replace(fov, white_margin=True)
    return _fit(values, scale, image.size)


def _white_margin(darkest: UInt8[np.ndarray, 'H W']) -> Bool[np.ndarray, 'H W'] | None:
    """Mask of the white surroundings, or None. darkest: the least channel.

    An over-exposed retina is not one: a margin is white in at least three corners of the frame.
    """
    white = darkest >= _WHITE
    labels, _ = ndimage.label(white)
    corners = {int(labels[y, x]) for y in (0, -1) for x in (0, -1)} - {0}
    n_white = sum(bool(white[y, x]) for y in (0, -1) for x in (0, -1))
    return np.isin(labels, list(corners)) if n_white >= 3 else None


def _margin_level(values: Num[np.ndarray, 'H W']) -> float:
    """The level of the darkest corner or edge strip: that of the margin, when there is one."""
    h, w = values.shape
    n = max(round(0.02 * min(h, w)), 1)
    strips = [
        values[:n, :n],
        values[:n, -n:],
        values[-n:, :n],
        values[-n:, -n:],
        values[:n],
        values[-n:],
        values[:, :n],
        values[:, -n:],
    ]
    return min(float(np.median(s)) for s in strips)


def _fit(values: Num[np.ndarray, 'H W'], scale: Sequence[float], full_size: tuple[int, int]) -> Fov:
    h, w = values.shape
    frame = Fov(
        'frame',
        full_size[0] / 2,
        full_size[1] / 2,
        full_size[0] / 2,
        full_size[1] / 2,
        (0, 0, *full_size),
    )
    margin = _margin_level(values)
    if margin > _DARK_MARGIN:
        return frame
    # Above the noise of the margin even in a dark picture, above the glare in a bright one.
    threshold = margin + max(5.0, 0.12 * (np.percentile(values, 90) - margin))
    mask = _main_parts(values > threshold)
    if not mask.any():
        return frame
    rim = _rim_points(mask)
    disc = _fit_disc(rim, mask) if len(rim) >= 12 else None
    if disc is None:
        ys, xs = np.nonzero(mask)
        box = _to_box((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), scale, full_size)
        if box == frame.box:
            return frame
        return Fov(
            'box',
            (box[0] + box[2]) / 2,
            (box[1] + box[3]) / 2,
            (box[2] - box[0]) / 2,
            (box[3] - box[1]) / 2,
            box,
        )
    cx, cy, rx, ry = (float(v) for v in disc)
    # A flat cut inside the frame ends the picture before the disc ends.
    (left, right), (top, bottom) = (_extent(mask.sum(axis=a)) for a in (0, 1))
    inside = (
        max(cx - rx, 0, min(left, cx - 0.6 * rx)),
        max(cy - ry, 0, min(top, cy - 0.6 * ry)),
        min(cx + rx, w, max(right, cx + 0.6 * rx)),
        min(cy + ry, h, max(bottom, cy + 0.6 * ry)),
    )
    sx, sy = scale
    return Fov('disc', cx * sx, cy * sy, rx * sx, ry * sy, _to_box(inside, scale, full_size))


def _extent(counts: Num[np.ndarray, ' n']) -> tuple[int, int]:
    """First and one past the last position whose count is not negligible."""
    found = np.nonzero(counts > 0.05 * counts.max())[0]
    return int(found[0]), int(found[-1]) + 1


def _main_parts(mask: Bool[np.ndarray, 'H W']) -> Bool[np.ndarray, 'H W']:
    """Drops text, notches and specks; a dark band may cut the retina into several large parts."""
    mask = ndimage.binary_opening(mask, structure=np.ones((3, 3)), iterations=2)
    labels, n = ndimage.label(mask)
    if n == 0:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= 0.05 * sizes.max())[labels]


def _rim_points(mask: Bool[np.ndarray, 'H W']) -> Float[np.ndarray, 'n 2']:
    """The outermost mask pixel along each ray from the centroid, [n, 2] as (x, y) pixel centres,
    without those where the frame and not the rim ends the mask."""
    h, w = mask.shape
    edge = mask & ~ndimage.binary_erosion(mask, border_value=0)
    ys, xs = np.nonzero(edge)
    cy, cx = ndimage.center_of_mass(mask)
    dx, dy = xs - cx, ys - cy
    ray = ((np.arctan2(dy, dx) / (2 * np.pi) + 0.5) * _RAYS).astype(int) % _RAYS
    order = np.argsort(np.hypot(dx, dy), kind='stable')
    outermost = np.full(_RAYS, -1)
    outermost[ray[order]] = order  # the last write wins: the farthest
    keep = outermost[outermost >= 0]
    xs, ys = xs[keep], ys[keep]
    inside = (xs > 1) & (xs < w - 2) & (ys > 1) & (ys < h - 2)
    return np.stack([xs[inside] + 0.5, ys[inside] + 0.5], axis=1)


def _solve(points: Num[np.ndarray, '... n 2'], circle: bool) -> Float[np.ndarray, '... 4']:
    """Least-squares axis-parallel ellipse (or circle) through [..., n, 2] points -> cx, cy, rx, ry
    (NaN where none fits)."""
    x, y = points[..., 0], points[..., 1]
    one = np.ones_like(x)
    if circle:  # x^2 + y^2 = a x + b y + c
        columns, target = [x, y, one], x * x + y * y
    else:  # x^2 = -q y^2 + a x + b y + c
        columns, target = [x, y, one, -y * y], x * x
    solution = (np.linalg.pinv(np.stack(columns, axis=-1)) @ target[..., None])[..., 0]
    a, b, c = solution[..., 0], solution[..., 1], solution[..., 2]
    q = np.ones_like(a) if circle else solution[..., 3]
    with np.errstate(all='ignore'):
        cx, cy = a / 2, b / (2 * q)
        rx2 = c + cx**2 + q * cy**2
        return np.stack([cx, cy, np.sqrt(rx2), np.sqrt(rx2 / q)], axis=-1)


def _distances(
    points: Float[np.ndarray, 'n 2'], disc: Float[np.ndarray, '... 4']
) -> Float[np.ndarray, '... n']:
    """Distance of points [n, 2] from the rim of discs [..., 4], in radii -> [..., n]."""
    cx, cy, rx, ry = (disc[..., i, None] for i in range(4))
    return np.abs(np.hypot((points[:, 0] - cx) / rx, (points[:, 1] - cy) / ry) - 1)


def _plausible(
    disc: Float[np.ndarray, '... 4'], shape: tuple[int, int]
) -> Bool[np.ndarray, '...'] | np.bool_:
    h, w = shape
    cx, cy, rx, ry = (disc[..., i] for i in range(4))
    with np.errstate(invalid='ignore'):
        return (
            (cx > 0.1 * w)
            & (cx < 0.9 * w)
            & (cy > 0.1 * h)
            & (cy < 0.9 * h)
            & (np.minimum(rx, ry) > 0.2 * min(h, w))
            & (np.maximum(rx, ry) < 0.9 * max(h, w))
            & (rx < 1.8 * ry)
            & (ry < 1.8 * rx)
        )


def _ransac(
    rim: Float[np.ndarray, 'n 2'], shape: tuple[int, int], circle: bool
) -> tuple[Float[np.ndarray, ' 4'], float] | None:
    """The disc that most rim points lie on, refitted to them; (disc, share) or None."""
    n = 3 if circle else 4
    draws = np.random.default_rng(0).random((_HYPOTHESES, len(rim))).argpartition(n)[:, :n]
    discs = _solve(rim[draws], circle)
    discs = discs[_plausible(discs, shape)]
    if not len(discs):
        return None
    best = discs[(_distances(rim, discs) < _TOLERANCE).sum(axis=1).argmax()]
    for _ in range(3):
        on_rim = _distances(rim, best) < _TOLERANCE
        if on_rim.sum() < n:
            return None
        best = _solve(rim[on_rim], circle)
        if not _plausible(best, shape):
            return None
    return best, float((_distances(rim, best) < _TOLERANCE).mean())


def _fit_disc(
    rim: Float[np.ndarray, 'n 2'], mask: Bool[np.ndarray, 'H W']
) -> Float[np.ndarray, ' 4'] | None:
    """cx, cy, rx, ry of the disc behind the rim points, or None when the picture is not one."""
    # One parameter more always fits a little better: an ellipse has to earn its place.
    found = _ransac(rim, mask.shape, True)
    if found is None or found[1] <= 1 - _EARNED:
        ellipse = _ransac(rim, mask.shape, False)
        if ellipse is not None and (found is None or found[1] <= ellipse[1] - _EARNED):
            found = ellipse
    if found is None:
        return None
    disc, share = found
    ys, xs = np.nonzero(mask)
    outside = np.hypot((xs + 0.5 - disc[0]) / disc[2], (ys + 0.5 - disc[1]) / disc[3]) > 1.03
    return None if share < 0.3 or outside.mean() > 0.05 else disc


def _to_box(
    box: Sequence[float], scale: Sequence[float], full_size: tuple[int, int]
) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = (v * s for v, s in zip(box, (*scale, *scale), strict=True))
    return (
        max(math.floor(x0), 0),
        max(math.floor(y0), 0),
        min(math.ceil(x1), full_size[0]),
        min(math.ceil(y1), full_size[1]),
    )


def fov_mask(fov: Fov, width: int, height: int) -> Float[np.ndarray, '{height} {width}']:
    """Float [height, width] array: 1 inside the field, 0 outside, one soft pixel between."""
    y, x = np.ogrid[:height, :width]
    left, top, right, bottom = fov.box
    inside = ((x >= left) & (x < right) & (y >= top) & (y < bottom)).astype(np.float32)
    if fov.kind != 'disc':
        return inside
    rho = np.hypot((x + 0.5 - fov.cx) / fov.rx, (y + 0.5 - fov.cy) / fov.ry)
    return inside * np.clip(0.5 + (1 - rho) * min(fov.rx, fov.ry), 0, 1).astype(np.float32)


def crop_fov(
    image: Image.Image,
    fov: Fov,
    *,
    size: int | None = None,
    mask: bool = False,
    unsqueeze: bool = False,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """Crops a PIL RGB picture to its field of view, pads it to a square with black, resizes it.

    The square is centred on the disc as far as that keeps everything visible, so a picture with
    flat-cut top and bottom keeps its shape. `mask` blackens what lies outside the field (always
    done for white margins). `unsqueeze` stretches an ellipse back to the circle the camera saw.
    `size` None keeps the resolution of the source.
    """
    if mask or fov.white_margin:
        alpha = Image.fromarray(np.rint(fov_mask(fov, *image.size) * 255).astype(np.uint8))
        image = Image.composite(image, Image.new('RGB', image.size), alpha)
    left, top, right, bottom = fov.box
    image = image.crop(fov.box)
    cx, cy = fov.cx - left, fov.cy - top
    if unsqueeze and fov.kind == 'disc' and fov.rx != fov.ry:
        stretch = max(fov.rx, fov.ry) / np.array([fov.rx, fov.ry])
        cx, cy = np.array([cx, cy]) * stretch
        image = image.resize(
            [round(s * f) for s, f in zip(image.size, stretch, strict=True)],
            Image.Resampling.BICUBIC,
        )
    side = max(image.size)
    x, y = (
        round(min(max(side / 2 - c, 0), side - s))
        for c, s in zip((cx, cy), image.size, strict=True)
    )
    canvas = image
    if image.size != (side, side):
        canvas = Image.new('RGB', (side, side))
        canvas.paste(image, (x, y))
    return canvas if size is None else canvas.resize((size, size), resample)
