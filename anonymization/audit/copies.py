"""A diagnostic: does a release picture look like a copy of one photograph?

Pictures are compared as two maps of 32 x 32: tone (ranks of grey levels, which no tone curve
changes) and detail (the same after taking the local mean away). Each release picture is tried in
328 views: the eight mirrored and quarter-turned ones, each shifted, turned, cropped or padded; 200
views at half the size choose the sources that are compared in all of them; of more than 2,000
photographs, those 2,000 whose rings (`rings.py`) are nearest the picture's, and those of its own
group in any case, so that the time grows with the number of pictures. A copy explains the picture
far better than any other person's photograph does; an average lies about equally far from several
people. What is blended, painted over, or made in another way slips through: that every picture is
the one which the optimisation made is shown by its digest, not here.

Shapes: n sources, V views, S = 32 the side of a map, F = 2 maps.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int
from matplotlib.axes import Axes
from scipy.sparse import csr_matrix

from anonymization.audit.checks import Audit, Check, Findings
from anonymization.audit.maps import SIDE, Features, bilinear, sampling_matrix, stacked
from anonymization.audit.records import Run
from anonymization.audit.rings import Rings
from utils.logs import progress

COPIES = 'no release picture looks like a copy of a photograph'
COARSE = 16
LEFT_OVER = 0.12  # a copy leaves at most this share of the variance unexplained,
RATIO = 0.45  # and at most this part of what the nearest other person leaves
_CANDIDATES = 24  # sources per map that are compared at full side
_YARDSTICK = 300  # sources that are compared with the other people's
_COMPARED = 2000  # sources per map, by their rings the nearest, that are compared at half the side
_BLOCK = 2048
_MAPS = 2


class _Views(NamedTuple):
    """All views as one linear map.

    matrix: sparse [V * S * S, S * S], bilinear. masks: float32 [V, S * S], 1 where a view shows
    the picture.
    """

    matrix: csr_matrix
    masks: np.ndarray


@functools.lru_cache(maxsize=2)
def _views(side: int) -> _Views:
    """8 orientations x (25 shifts or, at half the size, 9; 11 turns; 5 sizes)."""
    steps = (-2, -1, 0, 1, 2) if side == SIDE else (-2, 0, 2)
    shifts = [(0.0, 1.0, dx, dy) for dx, dy in itertools.product(steps, repeat=2)]
    turns = [(a, 1.0, 0.0, 0.0) for a in (-30, -20, -15, -10, -5, 5, 10, 15, 20, 30, 45)]
    sizes = [(0.0, s, 0.0, 0.0) for s in (0.8, 0.9, 0.95, 1.1, 1.2)]
    maps, masks = [], []
    axis = (np.arange(side) + 0.5) / side - 0.5
    y, x = (v.ravel() for v in np.meshgrid(axis, axis, indexing='ij'))
    for (angle, size, dx, dy), quarter, mirrored in itertools.product(
        shifts + turns + sizes, range(4), (False, True)
    ):
        turn = np.deg2rad(angle + 90 * quarter)
        u = (np.cos(turn) * x - np.sin(turn) * y) / size + dx / SIDE
        v = (np.sin(turn) * x + np.cos(turn) * y) / size + dy / SIDE
        weights, mask = bilinear(-u if mirrored else u, v, side)
        maps.append(weights)
        masks.append(mask)
    matrix = sampling_matrix(maps, side * side, side)
    return _Views(matrix, np.stack(masks).astype(np.float32))


class _Pool:
    """Maps of the sources at one side, with what masked correlations need of them."""

    def __init__(self, maps: Float32[np.ndarray, 'n P']) -> None:
        """maps: float32 [n, S * S]."""
        self.maps = maps
        self.views = _views(int(maps.shape[1] ** 0.5))
        masks = self.views.masks
        self.count = masks.sum(1)
        self.sums, squares = maps @ masks.T, (maps**2) @ masks.T
        self.spread = squares - self.sums**2 / self.count  # [n, V]

    def left_over(
        self, query: Float32[np.ndarray, ' P'], rows: Int[np.ndarray, ' r']
    ) -> Float[np.ndarray, ' r']:
        """Share of variance [r] that the sources `rows` leave unexplained in their best view.

        query: map [S * S]. In [0, 1]; a negative explains as much as the picture.
        """
        masks = self.views.masks
        views = (self.views.matrix @ query).reshape(masks.shape) * masks
        means = views.sum(1) / self.count
        spread = (views**2).sum(1) - means**2 * self.count  # [V]
        cross = self.maps[rows] @ views.T - self.sums[rows] * means  # [r, V]
        both = np.maximum(self.spread[rows] * spread, 1e-9)
        return np.clip(1 - (cross**2 / both).max(1), 0, 1)


class Detector:
    """Compares pictures with the photographs behind a release.

    sources: features [F, S, S] of each photograph; people: person of each; compared: how many of
    them, by their rings the nearest, are compared with a picture in all views, at most.
    """

    def __init__(
        self, sources: Sequence[Features], people: Sequence[int], *, compared: int = _COMPARED
    ) -> None:
        self.people, self.sources, self.compared = np.asarray(people), sources, compared
        planes = [[maps[m] for maps in sources] for m in range(_MAPS)]
        self.coarse = [_Pool(_shrink(maps)) for maps in planes]
        self.rings = [Rings(maps) if len(sources) > compared else None for maps in planes]

    def compare(
        self, picture: Features, *, other_than: int | None = None, members: Sequence[int] = ()
    ) -> tuple[float, float, int]:
        """What the nearest source and the nearest other person leave unexplained, and the source.

        Of the map (tone or detail) in which the nearest stands out most. other_than: a person
        who is left out. members: sources that are looked at in any case.
        """
        allowed = np.flatnonzero(self.people != other_than)
        best: tuple[float, float, int] = (1.0, 1.0, int(allowed[0]))
        for m, plane in enumerate(picture.astype(np.float32)):
            nearest = self._nearest(m, plane, allowed)
            rows = np.concatenate([nearest, np.setdiff1d(np.asarray(members, int), nearest)])
            fine = _Pool(stacked([self.sources[row][m] for row in rows]))
            left = fine.left_over(plane.ravel(), np.arange(len(rows)))
            first = int(left.argmin())
            others = left[self.people[rows] != self.people[rows[first]]]
            found = float(left[first]), float(others.min(initial=1.0)), int(rows[first])
            if found[0] * best[1] < best[0] * found[1] or best[0] == 1.0:
                best = found
        return best

    def _nearest(
        self, m: int, plane: Float32[np.ndarray, 'S S'], allowed: Int[np.ndarray, ' a']
    ) -> Int[np.ndarray, ' c']:
        """Those of the sources `allowed` that are compared at full side, by map m."""
        rings = self.rings[m]
        if rings is not None and len(allowed) > self.compared:
            apart = rings.distances(plane.ravel())[allowed]
            allowed = allowed[np.sort(np.argpartition(apart, self.compared)[: self.compared])]
        rough = self.coarse[m].left_over(_shrink([plane])[0], allowed)
        return allowed[np.argsort(rough, kind='stable')[:_CANDIDATES]]


def _shrink(maps: Sequence[Float[np.ndarray, 'S S']]) -> Float32[np.ndarray, 'n P']:
    """n maps [S, S] -> [n, 16 * 16], means of 2 x 2."""
    step = SIDE // COARSE
    blocks = (
        stacked(maps[i : i + _BLOCK]).reshape(-1, COARSE, step, COARSE, step)
        for i in range(0, len(maps), _BLOCK)
    )
    return np.concatenate([b.mean((2, 4)).reshape(len(b), -1) for b in blocks])


def is_copy(left: float, other: float) -> bool:
    """Whether a source that leaves `left` unexplained, the next person `other`, is copied."""
    return left < LEFT_OVER and left < RATIO * other


def check_copies(pictures: Sequence[tuple[str, Features | None]], run: Run, audit: Audit) -> Check:
    """The check, and distances for the report in `audit`. pictures: (name, features)."""
    found = Findings(COPIES)
    detector = Detector([look.features for look in run.looks], run.people)
    groups = run.members
    members = {name: groups[number] for number, name in run.names.items()}
    rows = np.linspace(0, len(run.people) - 1, min(_YARDSTICK, len(run.people))).astype(int)
    seen = [(name, maps) for name, maps in pictures if maps is not None]
    yardstick = [detector.compare(run.looks[i].features, other_than=run.people[i])[0] for i in rows]
    bar = progress(seen, total=len(seen), desc='comparing', unit='img')
    nearest = [detector.compare(maps, members=members.get(name, ())) for name, maps in bar]
    distances = [left for left, *_ in nearest]
    for (name, _), (left, other, source) in zip(seen, nearest):
        if is_copy(left, other):
            found.add(
                f"a picture explains one photograph to {1 - left:.0%}, the next person's "
                f'to {1 - other:.0%}',
                [name, run.table.ids[source]],
            )
    if not distances:
        return found.check('no picture could be compared')
    audit.distances, audit.yardstick = np.array(distances), np.array(yardstick)
    audit.facts['nearest_source_unexplained'] = _quantiles(audit.distances)
    audit.facts['nearest_other_patient_unexplained'] = _quantiles(audit.yardstick)
    others = "people's photographs" if run.table.patients else 'photographs'
    return found.check(
        f'the nearest photograph leaves {min(distances):.0%} to {max(distances):.0%} of a '
        f"picture's variance unexplained, median {np.median(distances):.0%}; between two "
        f'{others} the median is {np.median(yardstick):.0%}'
    )


def _quantiles(values: Float[np.ndarray, ' n']) -> dict[str, float]:
    points = (0, 5, 25, 50, 75, 95, 100)
    return {f'p{q}': round(float(v), 4) for q, v in zip(points, np.percentile(values, points))}


def plot_distances(audit: Audit, axes: Axes) -> None:
    """Histogram of what the nearest source leaves unexplained, beside that between people.

    audit: of a release that was compared with its photographs.
    """
    values = [v for v in (audit.distances, audit.yardstick) if v is not None]
    bins = np.linspace(0, max(float(v.max()) for v in values) * 1.02 + 1e-6, 40).tolist()
    axes.hist(
        values,
        bins=bins,
        density=True,
        histtype='stepfilled',
        alpha=0.6,
        label=['release picture by nearest source', 'source by nearest other patient'],
    )
    axes.axvline(LEFT_OVER, color='black', linestyle=':', label='a copy lies below')
    axes.set(xlabel='share of variance left unexplained', ylabel='density')
    axes.legend()
