"""One group after the other: the paper's greedy and MDAV, over a pool of free units."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anonymization.grouping.units import Units
from utils.logs import progress

CELL = 8192  # units among which the start of the default is sought
TIE = 1e-11  # relative difference of two distance sums that counts as a tie


class _Pool:
    """The units that are still free, and the rule that keeps every later group possible.

    As long as no patient owns more free units than groups are still to come, the rest can be
    dealt out evenly. A patient who owns exactly that many is due in every group from then on.

    index: the units in play, ascending; x: their features; free: which of them are unassigned.
    """

    def __init__(self, units: Units, k: int) -> None:
        self.k, self.person = k, units.person
        self.to_come = len(units) // k
        self.formed = 0
        self.index, self.x = np.arange(len(units)), units.x
        self.squares = units.x.square().sum(1)
        self.free = np.ones(len(units), bool)
        self.assignment = np.full(len(units), -1)
        if self.person is not None:
            order = np.argsort(self.person, kind='stable')
            self.left = np.bincount(self.person)
            self.owned = np.split(order, np.cumsum(self.left)[:-1])

    def shrink(self) -> Bool[np.ndarray, ' p'] | None:
        """Drops assigned units once they are a quarter; returns the mask of those kept, or None."""
        if self.free.sum() > 0.75 * len(self.free):
            return None
        kept = self.free
        places = torch.from_numpy(np.flatnonzero(kept)).to(self.x.device)
        self.index, self.x, self.squares = self.index[kept], self.x[places], self.squares[places]
        self.free = np.ones(len(self.index), bool)
        return kept

    def group(self, seed: int) -> Int[np.ndarray, ' g']:
        """Gives the unit at place `seed` and its nearest permitted units the next group number.

        Returns the places of the members. Ties go to the lowest unit.
        """
        distance = self.distances(self.x[seed]).cpu().numpy()
        distance[~self.free] = np.inf
        if self.person is None:
            # The differences themselves decide among all that rounding may have put in disorder.
            slack = 8 * torch.finfo(self.x.dtype).eps * float(self.squares.max())
            near = np.flatnonzero(
                distance <= np.partition(distance, self.k - 1)[self.k - 1] + slack
            )
            exact = self.x[torch.from_numpy(near).to(self.x.device)] - self.x[seed]
            exact = exact.square().sum(1).cpu().numpy()
            exact[np.searchsorted(near, seed)] = -1.0
            chosen = near[np.argsort(exact, kind='stable')[: self.k]]
        else:
            chosen = self._distinct(seed, distance)
        self.free[chosen] = False
        self.assignment[self.index[chosen]] = self.formed
        self.formed += 1
        self.to_come -= 1
        if self.person is not None:
            self.left[self.person[self.index[chosen]]] -= 1
        return chosen

    def distances(self, point: Float[Tensor, ' d']) -> Float[Tensor, ' p']:
        """[len(index)] squared distances to `point`, up to rounding."""
        return torch.addmv(self.squares + point @ point, self.x, point, alpha=-2)

    def _distinct(self, seed: int, distance: Float[np.ndarray, ' p']) -> Int[np.ndarray, ' g']:
        assert self.person is not None
        owner = self.person[self.index[seed]]
        due = np.flatnonzero(self.left >= self.to_come) if self.to_come > 1 else ()
        waiting = [person for person in due if person != owner]
        chosen, size = [seed], max(self.k, len(waiting) + 1)
        distance[self._places(owner)] = np.inf
        for person in waiting:
            places = self._places(int(person))
            chosen.append(places[distance[places].argmin()])
            distance[places] = np.inf
        while len(chosen) < size:
            chosen.append(int(distance.argmin()))
            distance[self._places(self.person[self.index[chosen[-1]]])] = np.inf
        return np.array(chosen)

    def _places(self, person: int) -> Int[np.ndarray, ' q']:
        """Places of the person's free units."""
        units = self.owned[person]
        return np.searchsorted(self.index, units[self.assignment[units] < 0])


def _join_leftovers(units: Units, pool: _Pool) -> Int[np.ndarray, ' u']:
    """Lets the units that are still free join the group whose squared error grows least."""
    assignment = pool.assignment
    free = assignment < 0
    if not free.any():
        return assignment
    x = units.x.cpu()  # sums in a fixed order, which a GPU does not promise
    weight = torch.from_numpy(units.weight).to(x)
    taken = torch.from_numpy(np.flatnonzero(~free))
    home = torch.from_numpy(assignment[~free])
    sums = torch.zeros(pool.formed, x.shape[1], dtype=x.dtype)
    sums.index_add_(0, home, x[taken] * weight[taken, None])
    mass = torch.zeros(pool.formed, dtype=x.dtype)
    mass.index_add_(0, home, weight[taken])
    for unit in np.flatnonzero(free):
        gap = (sums / mass[:, None] - x[unit]).square().sum(1)
        growth = gap * mass * weight[unit] / (mass + weight[unit])
        if units.person is not None:
            mine = assignment[pool.owned[units.person[unit]]]
            growth[torch.from_numpy(mine[mine >= 0])] = torch.inf
        group = int(growth.argmin())
        assignment[unit] = group
        sums[group] += x[unit] * weight[unit]
        mass[group] += weight[unit]
    return assignment


def _distance_sums(pool: _Pool, places: Int[Tensor, ' q'] | None = None) -> Float[Tensor, ' p']:
    """[len(pool.x)] sums of the Euclidean distances to the rows at `places` (None: all)."""
    others, other_squares = pool.x, pool.squares
    if places is not None:
        others, other_squares = others[places], other_squares[places]
    result = torch.empty_like(pool.squares)
    step = max(1, 2**23 // len(others))
    for start in range(0, len(result), step):
        part = slice(start, start + step)
        scale = pool.squares[part, None] + other_squares
        d2 = torch.addmm(scale, pool.x[part], others.T, alpha=-2)
        # Below the rounding of the difference the two rows are copies of each other.
        d2[d2 < 1e-13 * scale] = 0
        result[part] = d2.sqrt_().sum(1)
    return result


def published(units: Units, k: int) -> Int[np.ndarray, ' u']:
    """The paper's greedy: seed = largest sum of distances to the free units, plus its nearest.

    The sums are kept up to date by subtracting the distances to the units that leave, and
    computed afresh whenever half of the units are gone, so that rounding does not pile up.
    """
    pool = _Pool(units, k)
    sums = _distance_sums(pool)
    fresh = len(units)
    bar = progress(total=pool.to_come, desc='grouping')
    while pool.to_come:
        kept = pool.shrink()
        if kept is not None and len(pool.index) <= fresh // 2:
            sums = _distance_sums(pool)
            fresh = len(pool.index)
        elif kept is not None:
            sums = sums[torch.from_numpy(kept).to(sums.device)]
        top = sums.max()  # which rounding makes negative where all units left are identical
        chosen = pool.group(int((sums >= top - TIE * abs(top)).nonzero()[0, 0]))
        place = torch.from_numpy(chosen).to(sums.device)
        sums -= _distance_sums(pool, place)
        sums[place] = -torch.inf
        bar.update()
    bar.close()
    return _join_leftovers(units, pool)


def mdav(units: Units, k: int) -> Int[np.ndarray, ' u']:
    """Maximum distance to average vector: the unit farthest from the mean of the free units and
    the unit farthest from that one each take their nearest; the last group keeps the rest."""
    pool = _Pool(units, k)
    weight = torch.from_numpy(units.weight).to(units.x)

    def farthest(point: Float[Tensor, ' d']) -> int:
        gap = pool.distances(point)
        gap[torch.from_numpy(~pool.free).to(gap.device)] = -torch.inf
        return int(gap.argmax())

    total, mass = weight @ units.x, weight.sum()
    bar = progress(total=pool.to_come, desc='grouping')
    while pool.to_come:
        pool.shrink()
        opposite = None
        for _ in range(min(2, pool.to_come)):
            seed = farthest(total / mass if opposite is None else opposite)
            opposite = pool.x[seed]
            chosen = torch.from_numpy(pool.index[pool.group(seed)]).to(total.device)
            total -= weight[chosen] @ units.x[chosen]
            mass -= weight[chosen].sum()
            bar.update()
    bar.close()
    return _join_leftovers(units, pool)


def mdav_in_cells(units: Units, k: int) -> Int[np.ndarray, ' u']:
    """MDAV within cells of nearby units, whose number keeps the whole below quadratic time."""
    cells = [np.arange(len(units))]
    while max(map(len, cells)) > max(CELL, 4 * k):
        cells = [part for cell in cells for part in _halves(units.x, cell, k)]
    result = np.empty(len(units), int)
    count = 0
    for cell in cells:
        person = None if units.person is None else units.person[cell]
        if person is not None and np.bincount(person).max() > len(cell) // k:
            return mdav(units, k)  # one patient fills a cell; the whole has room for them
        part = Units(
            list(cell),
            units.x[torch.from_numpy(cell).to(units.x.device)],
            units.weight[cell],
            person,
        )
        result[cell] = count + mdav(part, k)
        count += len(cell) // k
    return result


def _halves(
    x: Float[Tensor, 'u d'], cell: Int[np.ndarray, ' c'], k: int
) -> tuple[Int[np.ndarray, ' a'], Int[np.ndarray, ' b']]:
    """Two halves of a cell along its principal direction, the first a multiple of k in size."""
    here = x[torch.from_numpy(cell).to(x.device)]
    here = here - here.mean(0)
    direction = here[here.square().sum(1).argmax()]
    for _ in range(8):
        direction = here.T @ (here @ direction)
        direction /= direction.norm() + 1e-30
    order = np.argsort((here @ direction).cpu().numpy(), kind='stable')
    middle = len(cell) // 2 // k * k
    return np.sort(cell[order[:middle]]), np.sort(cell[order[middle:]])
