"""Assigns images to groups of at least k distinct patients with a small within-group squared error.

Three methods share one interface: the paper's greedy (section on same-size clustering), MDAV
(Domingo-Ferrer and Mateo-Sanz, 2002), the standard of microaggregation, and the default, which
starts from MDAV and then repeatedly ejects one member of every group and puts all of them back by
an optimal assignment. Nothing larger than the features is ever held: no n x n matrix.

A *unit* is what moves as a whole: an image under the policy 'distinct' (a patient's images then
land in different groups), all images of a patient under 'together'. Either way a group needs k
units, and never holds two units of one patient.
"""
import hashlib
import logging
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from utils.errors import PrivacyError, UserError
from utils.logs import progress
from utils.seeds import numpy_generator, torch_generator

log = logging.getLogger(__name__)

METHODS = ('default', 'published', 'mdav', 'kmeans-constrained')
POLICIES = ('distinct', 'together')
SURPLUS = ('error', 'suppress')
AUTO_REDUCE_ELEMENTS = 2 ** 28    # features above 1 GiB of float32 are reduced by 'auto'
AUTO_REDUCE_DIMS = 256
CELL = 8192                       # units among which the start of the default is sought
TIE = 1e-11                       # relative difference of two distance sums that counts as a tie


@dataclass
class Grouping:
    """The outcome of `assign_groups`.

    labels: int64 [n], 1..C, 0 = suppressed. suppressed: [(row, reason)]. sse: sum over images of
    the squared Euclidean distance to their group's mean, in the features as given, suppressed
    images left out. info: n_groups, sizes {images per group: groups}, patients_per_group
    {distinct patients: groups}, sst, sse_ratio, policy, seed, strata, reduction.
    """
    labels: np.ndarray
    suppressed: list
    method: str
    sse: float
    info: dict = field(default_factory=dict)


def assign_groups(features, k, *, patients=None, strata=None, method='default', policy='distinct',
                  seed=0, surplus='error', reduce='auto', rounds=300, block=320, restarts=None,
                  tolerance=1e-4, device='cpu'):
    """Groups `n` images so that every group holds at least `k` distinct patients.

    features: [n, d] floating array, np.memmap or tensor; larger shapes are flattened to [n, d].
    patients: n ids (None: every image is its own patient). strata: n values that groups never
    cross; strata with fewer than k patients are suppressed and listed.
    policy: 'distinct' (no patient twice in a group) or 'together' (all images of a patient in
    one group). surplus: what happens to a patient with more images than there are groups under
    'distinct': 'error', or 'suppress' the images that fit nowhere.
    reduce: None (exact), a number of principal directions, or 'auto' (256 above 1 GiB).
    rounds, block, restarts: effort of the default method: refinement rounds, groups per
    assignment problem, and starts (None: several below 2000 units); refinement ends early when
    many rounds together lower the error by less than the share `tolerance`.
    The result depends on the features, ids and seed, not on the order of the rows; only exact
    ties of the method 'published' go to the lowest row, as in the paper's code.
    Raises UserError for input that cannot be grouped, PrivacyError if a promise were broken.
    """
    n, k = len(features), int(k)
    _check_options(k, method, policy, surplus, reduce, rounds, block, restarts)
    patients = _ids(patients, n, 'patient')
    strata = _ids(strata, n, 'stratum')
    if policy == 'together' and patients is not None and strata is not None:
        homes = Counter(patient for patient, _ in set(zip(patients, strata)))
        torn = sum(count > 1 for count in homes.values())
        if torn:
            raise UserError(f"the images of {torn} patients lie in several strata, so that the "
                            "policy 'together' cannot keep them in one group; use 'distinct' or "
                            'strata that do not divide a patient')
    features = _as_matrix(features)
    hashes = _row_hashes(features)
    x, reduction = _load(features, hashes, reduce, seed, device)

    labels = np.zeros(n, np.int64)
    suppressed, strata_info, count = [], [], 0
    for name, rows in _strata(strata, n):
        people = patients[rows] if patients is not None else None
        keep, dropped, reason = _placeable(rows, people, hashes, k, policy, surplus, name)
        suppressed += [(int(row), reason) for row in dropped]
        groups = 0
        if len(keep):
            units = _units(x, keep, patients, hashes, policy, method, device)
            assignment = _solve(units, k, method, seed, rounds, block, restarts, tolerance)
            for unit_rows, group in zip(units.rows, assignment):
                labels[unit_rows] = count + 1 + group
            groups = int(assignment.max()) + 1
            count += groups
        strata_info.append({'stratum': name, 'images': len(rows), 'suppressed': len(dropped),
                            'groups': groups})
    if count == 0:
        raise UserError(f'no stratum has the {k} distinct patients that one group needs; lower '
                        '--same_k or use coarser strata')
    check_groups(labels, k, patients=patients, strata=strata, policy=policy)
    sse, sst = squared_errors(features, labels)
    info = _describe(labels, patients, k)
    info.update(sst=sst, sse_ratio=sse / sst if sst else 0.0, policy=policy, seed=seed,
                reduction=reduction)
    if strata is not None:
        info['strata'] = strata_info
    if suppressed:
        log.warning('%d of %d images suppressed, because no group may hold them',
                    len(suppressed), n)
    return Grouping(labels, sorted(suppressed), method, sse, info)


def check_groups(labels, k, *, patients=None, strata=None, policy='distinct'):
    """Checks an assignment against the promises, sharing no code with its making.

    labels: [n] of group numbers, 0 = suppressed. Raises PrivacyError that lists every broken
    promise: fewer than k distinct patients, a patient twice in a group ('distinct') or in two
    groups ('together'), a group across strata, group numbers other than 1..C.
    """
    labels = [int(label) for label in labels]
    people = list(range(len(labels))) if patients is None else [str(p) for p in patients]
    kinds = [''] * len(labels) if strata is None else [str(s) for s in strata]
    if not len(labels) == len(people) == len(kinds):
        raise PrivacyError(f'{len(labels)} group labels for {len(people)} patients and '
                           f'{len(kinds)} strata')
    members, homes = defaultdict(list), defaultdict(set)
    for row, label in enumerate(labels):
        if label != 0:
            members[label].append(row)
            homes[people[row]].add(label)
    faults = []
    if sorted(members) != list(range(1, len(members) + 1)):
        faults.append('group numbers are not 1..C')
    for label, rows in sorted(members.items()):
        distinct = {people[row] for row in rows}
        if len(distinct) < k:
            faults.append(f'group {label} holds {len(distinct)} distinct patients, fewer than '
                          f'k = {k}')
        if policy == 'distinct' and len(distinct) < len(rows):
            faults.append(f'group {label} holds a patient more than once')
        if len({kinds[row] for row in rows}) > 1:
            faults.append(f'group {label} crosses strata')
    if policy == 'together':
        scattered = sum(len(groups) > 1 for groups in homes.values())
        if scattered:
            faults.append(f'{scattered} patients have images in several groups')
    if not members:
        faults.append('there is no group at all')
    if faults:
        shown = '; '.join(faults[:10]) + ('; ...' if len(faults) > 10 else '')
        raise PrivacyError(f'the grouping breaks its promises: {shown}')


def squared_errors(features, labels):
    """(SSE, SST) of grouped rows in float64: within groups, and around the mean of all of them.

    Reads the rows group by group, so that a memory-mapped file stays on disk.
    """
    order = np.flatnonzero(labels)
    order = order[np.argsort(labels[order], kind='stable')]
    sse, square_sum, total = 0.0, 0.0, np.zeros(features.shape[1])
    starts = np.searchsorted(labels[order], np.arange(1, labels.max() + 2))
    first = 0
    while first < len(starts) - 1:
        last = max(np.searchsorted(starts, starts[first] + _block_rows(features, 8), 'right') - 1,
                   first + 1)
        rows = order[starts[first]:starts[last]]
        block = np.asarray(features[rows], np.float64)
        if first == 0:
            origin = block.mean(0)    # near the data, so that the difference of sums keeps digits
        block -= origin
        local = starts[first:last] - starts[first]
        sums = np.add.reduceat(block, local, axis=0)
        sizes = np.diff(np.append(local, len(rows)))
        squares = np.einsum('ij,ij->', block, block)
        means = np.repeat(sums / sizes[:, None], sizes, axis=0)
        block -= means
        sse += np.einsum('ij,ij->', block, block)
        square_sum += squares
        total += sums.sum(0)
        first = last
    return float(sse), float(square_sum - total @ total / len(order))


# ---------------------------------------------------------------------------------------------
# Input

def _check_options(k, method, policy, surplus, reduce, rounds, block, restarts):
    if k < 2:
        raise UserError(f'k must be at least 2, got {k}: a group of one hides nobody')
    if method not in METHODS:
        raise UserError(f'unknown clustering {method!r}; choose from {", ".join(METHODS)}')
    if policy not in POLICIES:
        raise UserError(f'unknown patient policy {policy!r}; choose from {", ".join(POLICIES)}')
    if surplus not in SURPLUS:
        raise UserError(f'surplus must be one of {SURPLUS}, got {surplus!r}')
    if not (reduce in (None, 'auto') or (isinstance(reduce, int) and reduce > 0)):
        raise UserError(f"reduce must be None, 'auto' or a positive number, got {reduce!r}")
    if rounds < 0:
        raise UserError(f'rounds must not be negative, got {rounds}')
    if block < 2 or (restarts is not None and restarts < 1):
        raise UserError(f'block must be at least 2 and restarts at least 1, got {block} and '
                        f'{restarts}')


def _ids(values, n, what):
    """Ids as an array of strings, or None."""
    if values is None:
        return None
    values = list(values)
    if len(values) != n:
        raise UserError(f'{len(values)} {what} values for {n} images')
    missing = [i for i, v in enumerate(values) if v is None or v != v or str(v).strip() == '']
    if missing:
        raise UserError(f'{what} missing in {len(missing)} rows, first rows '
                        f'{missing[:5]} (counted from 0); fill the column or leave it out')
    return np.array([str(v) for v in values], dtype=object)


def _as_matrix(features):
    """[n, d] numpy view of the features, without reading a memory-mapped file."""
    if isinstance(features, torch.Tensor):
        features = features.detach().cpu().numpy()
    if not isinstance(features, np.ndarray):
        features = np.asarray(features)
    if features.ndim < 2 or 0 in features.shape:
        raise UserError(f'features must be [n, d] with n, d > 0, got shape {features.shape}')
    if features.dtype.kind not in 'fiu':
        raise UserError(f'features must be real numbers, got {features.dtype}')
    return features.reshape(len(features), -1)


def _block_rows(features, itemsize):
    """Rows per block of about 64 MiB."""
    return max(1, 2 ** 26 // (features.shape[1] * itemsize))


def _row_hashes(features):
    """[n] array of 16-byte digests: a canonical order that does not depend on the row order."""
    digests = np.empty(len(features), dtype='S32')
    bad = []
    step = _block_rows(features, 4)
    for start in progress(range(0, len(features), step), desc='reading features'):
        block = np.ascontiguousarray(features[start:start + step])
        bad += (start + np.flatnonzero(~np.isfinite(block).all(1))).tolist()
        for i, row in enumerate(block):
            digests[start + i] = hashlib.blake2b(row, digest_size=16).hexdigest()
    if bad:
        raise UserError(f'features of {len(bad)} images are not finite, first rows {bad[:5]} '
                        '(counted from 0)')
    return digests


def _load(features, hashes, reduce, seed, device):
    """(features to group by, reduction facts or None); reduced: scores of a randomised PCA."""
    n, d = features.shape
    if reduce == 'auto':
        reduce = AUTO_REDUCE_DIMS if n * d > AUTO_REDUCE_ELEMENTS else None
    if reduce is None or reduce >= min(n, d):
        return features, None
    return _random_pca(features, np.argsort(hashes, kind='stable'), reduce, seed, device)


def _random_pca(features, order, dims, seed, device, sample=20000, iterations=3):
    """Scores [n, dims] on the leading principal directions, and the variance they keep.

    Subspace iteration with the covariance (Halko, Martinsson and Tropp, 2011) on `sample` rows;
    `order` (by hash) makes the sample random and the result independent of the row order.
    """
    n, d = features.shape
    step = _block_rows(features, 4)

    def blocks(rows, mean=None):
        for start in range(0, len(rows), step):
            index = rows[start:start + step]
            block = torch.from_numpy(np.asarray(features[index], np.float32)).to(device)
            yield start, block if mean is None else block - mean

    chosen = order[:sample]
    mean = sum(block.double().sum(0) for _, block in blocks(chosen)) / len(chosen)
    mean = mean.float()
    width = min(dims + 16, d, n)
    generator = torch_generator(seed, 'reduction')
    basis = torch.randn(d, width, generator=generator).to(device)
    for _ in progress(range(iterations), desc='reducing features'):
        product = torch.zeros(d, width, device=device)
        for _, block in blocks(chosen, mean):
            product += block.T @ (block @ basis)
        basis = torch.linalg.qr(product).Q
    small = torch.zeros(width, width, device=device, dtype=torch.float64)
    for _, block in blocks(chosen, mean):
        scores = (block @ basis).double()
        small += scores.T @ scores
    basis = basis @ torch.linalg.eigh(small).eigenvectors[:, -dims:].float()
    scores = torch.empty(n, dims, device=device)
    total, sums = 0.0, torch.zeros(d, dtype=torch.float64, device=device)
    for start, block in blocks(order, mean):
        scores[torch.from_numpy(order[start:start + step]).to(device)] = block @ basis
        total += block.double().square().sum().item()
        sums += block.double().sum(0)
    variance = total - (sums.square().sum() / n).item()
    kept = (scores - scores.mean(0)).double().square().sum().item() / variance
    log.info('features reduced from %d to %d dimensions, %.2f %% of the variance kept', d, dims,
             100 * kept)
    return scores.cpu().numpy(), {'dims': dims, 'of': d, 'kept_variance': kept}


# ---------------------------------------------------------------------------------------------
# Units

@dataclass
class _Units:
    """Units of one stratum: rows (per unit), x [u, d], weight [u] images, person [u] codes.

    person is None when no patient owns two units.
    """
    rows: list
    x: torch.Tensor
    weight: np.ndarray
    person: np.ndarray | None

    def __len__(self):
        return len(self.rows)


def _strata(strata, n):
    """[(name, rows)] in the order of the names."""
    if strata is None:
        return [('', np.arange(n))]
    names, codes = np.unique(strata.astype(str), return_inverse=True)
    return [(str(name), np.flatnonzero(codes == c)) for c, name in enumerate(names)]


def _placeable(rows, people, hashes, k, policy, surplus, name):
    """(rows to group, rows to suppress, reason) of a stratum; UserError when it cannot be."""
    where = f'stratum {name!r}' if name else 'the table'
    counts = Counter(rows.tolist() if people is None else people.tolist())
    if len(counts) < k:
        if name:
            return rows[:0], rows, f'stratum {name!r} has fewer than {k} distinct patients'
        raise UserError(f'{len(counts)} distinct patients in {len(rows)} images cannot form a '
                        f'group of {k}; lower --same_k or add images')
    if people is None or policy == 'together':
        return rows, rows[:0], ''
    groups = len(rows) // k
    excess = {p: m for p, m in counts.items() if m > groups}
    if not excess:
        return rows, rows[:0], ''
    if surplus == 'error':
        raise UserError(
            f'{len(excess)} patients of {where} have more images than there are groups (up to '
            f'{max(excess.values())} images, {groups} groups of {k}), so that no patient can stay '
            "apart from themselves; use the policy 'together', let the surplus be suppressed, or "
            'lower --same_k')
    # The largest number of groups that can all be filled when each patient enters one at most once.
    groups = max(c for c in range(1, groups + 1)
                 if sum(min(m, c) for m in counts.values()) >= c * k)
    order = np.lexsort([hashes[rows]])
    taken, keep = Counter(), np.zeros(len(rows), bool)
    for i in order:
        taken[people[i]] += 1
        keep[i] = taken[people[i]] <= groups
    return rows[keep], rows[~keep], f'the patient has more images than the {groups} groups hold'


def _units(x, rows, patients, hashes, policy, method, device):
    """Units in canonical order: by content, ties by patient; 'published' keeps the row order."""
    dtype = torch.float64 if method == 'published' else torch.float32
    if policy == 'together' and patients is not None:
        lists = defaultdict(list)
        for row in rows:
            lists[patients[row]].append(int(row))
        names = list(lists)
        if method != 'published':
            names.sort(key=lambda p: (sorted(hashes[lists[p]].tolist()), p))
        groups = [np.array(lists[p]) for p in names]
        weight = np.array([len(g) for g in groups], np.float64)
        means = np.stack([x[g].mean(0, dtype=np.float64) for g in groups])
        return _Units(groups, torch.from_numpy(means).to(device, dtype), weight, None)
    person = None
    if patients is not None:
        person = np.unique(patients[rows].astype(str), return_inverse=True)[1]
    if method != 'published':
        signature = np.zeros(len(rows))
        if person is not None:
            # Twins of equal features are told apart by their patients' other images, then by name.
            lists = defaultdict(list)
            for i, p in enumerate(person):
                lists[p].append(hashes[rows[i]])
            rank = sorted(lists, key=lambda p: (sorted(lists[p]), p))
            place = np.empty(len(lists))
            place[rank] = np.arange(len(rank))
            signature = place[person]
        order = np.lexsort([signature, hashes[rows]])
        rows = rows[order]
        person = None if person is None else person[order]
    if person is not None and np.bincount(person).max() == 1:
        person = None
    values = torch.from_numpy(np.asarray(x[rows])).to(device, dtype)
    return _Units([np.array([r]) for r in rows], values, np.ones(len(rows)), person)


# ---------------------------------------------------------------------------------------------
# Methods

def _solve(units, k, method, seed, rounds, block, restarts, tolerance):
    """Group numbers 0..C-1 of the units."""
    if method == 'published':
        return _published(units, k)
    # Differences of large sums lose float32 digits; a shift moves no distance.
    units.x -= units.x.mean(0)
    if method == 'kmeans-constrained':
        return _kmeans_constrained(units, k, seed)
    if method == 'mdav':
        return _mdav(units, k)
    start = _start(units, k)
    if len(units) < 2 * k:
        return start
    if restarts is None:
        restarts = int(np.clip(2000 // len(units), 1, 8))
    best, best_value = start, -np.inf
    for attempt in range(restarts):
        rng = numpy_generator(seed, 'grouping', attempt)
        groups = _Groups(units, start if attempt == 0 else _deal(units, k, rng), k)
        groups.refine(rng, rounds, block, tolerance)
        value = groups.between()
        if value > best_value * (1 + 1e-9):
            best, best_value = groups.assignment(), value
    return _numbered(best)


def _numbered(assignment):
    """Group numbers in the order in which the units first meet them."""
    _, first, inverse = np.unique(assignment, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


class _Pool:
    """The units that are still free, and the rule that keeps every later group possible.

    As long as no patient owns more free units than groups are still to come, the rest can be
    dealt out evenly. A patient who owns exactly that many is due in every group from then on.

    index: the units in play, ascending; x: their features; free: which of them are unassigned.
    """

    def __init__(self, units, k):
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

    def shrink(self):
        """Drops assigned units once they are a quarter; returns the mask of those kept, or None."""
        if self.free.sum() > 0.75 * len(self.free):
            return None
        kept = self.free
        places = torch.from_numpy(np.flatnonzero(kept)).to(self.x.device)
        self.index, self.x, self.squares = self.index[kept], self.x[places], self.squares[places]
        self.free = np.ones(len(self.index), bool)
        return kept

    def group(self, seed):
        """Gives the unit at place `seed` and its nearest permitted units the next group number.

        Returns the places of the members. Ties go to the lowest unit.
        """
        distance = self.distances(self.x[seed]).cpu().numpy()
        distance[~self.free] = np.inf
        if self.person is None:
            # The differences themselves decide among all that rounding may have put in disorder.
            slack = 8 * torch.finfo(self.x.dtype).eps * float(self.squares.max())
            near = np.flatnonzero(distance <= np.partition(distance, self.k - 1)[self.k - 1]
                                  + slack)
            exact = self.x[torch.from_numpy(near).to(self.x.device)] - self.x[seed]
            exact = exact.square().sum(1).cpu().numpy()
            exact[np.searchsorted(near, seed)] = -1.0
            chosen = near[np.argsort(exact, kind='stable')[:self.k]]
        else:
            chosen = self._distinct(seed, distance)
        self.free[chosen] = False
        self.assignment[self.index[chosen]] = self.formed
        self.formed += 1
        self.to_come -= 1
        if self.person is not None:
            self.left[self.person[self.index[chosen]]] -= 1
        return chosen

    def distances(self, point):
        """[len(index)] squared distances to `point`, up to rounding."""
        return torch.addmv(self.squares + point @ point, self.x, point, alpha=-2)

    def _distinct(self, seed, distance):
        owner = self.person[self.index[seed]]
        due = np.flatnonzero(self.left >= self.to_come) if self.to_come > 1 else ()
        waiting = [person for person in due if person != owner]
        chosen, size = [seed], max(self.k, len(waiting) + 1)
        distance[self._places(owner)] = np.inf
        for person in waiting:
            places = self._places(person)
            chosen.append(places[distance[places].argmin()])
            distance[places] = np.inf
        while len(chosen) < size:
            chosen.append(distance.argmin())
            distance[self._places(self.person[self.index[chosen[-1]]])] = np.inf
        return np.array(chosen)

    def _places(self, person):
        """Places of the person's free units."""
        units = self.owned[person]
        return np.searchsorted(self.index, units[self.assignment[units] < 0])


def _join_leftovers(units, pool):
    """Lets the units that are still free join the group whose squared error grows least."""
    assignment = pool.assignment
    free = assignment < 0
    if not free.any():
        return assignment
    x = units.x.cpu()    # sums in a fixed order, which a GPU does not promise
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


def _distance_sums(pool, places=None):
    """[len(pool.x)] sums of the Euclidean distances to the rows at `places` (None: all)."""
    others, other_squares = pool.x, pool.squares
    if places is not None:
        others, other_squares = others[places], other_squares[places]
    result = torch.empty_like(pool.squares)
    step = max(1, 2 ** 23 // len(others))
    for start in range(0, len(result), step):
        part = slice(start, start + step)
        scale = pool.squares[part, None] + other_squares
        d2 = torch.addmm(scale, pool.x[part], others.T, alpha=-2)
        # Below the rounding of the difference the two rows are copies of each other.
        d2[d2 < 1e-13 * scale] = 0
        result[part] = d2.sqrt_().sum(1)
    return result


def _published(units, k):
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
        top = sums.max()    # which rounding makes negative where all units left are identical
        chosen = pool.group(int((sums >= top - TIE * abs(top)).nonzero()[0, 0]))
        place = torch.from_numpy(chosen).to(sums.device)
        sums -= _distance_sums(pool, place)
        sums[place] = -torch.inf
        bar.update()
    bar.close()
    return _join_leftovers(units, pool)


def _mdav(units, k):
    """Maximum distance to average vector: the unit farthest from the mean of the free units and
    the unit farthest from that one each take their nearest; the last group keeps the rest."""
    pool = _Pool(units, k)
    weight = torch.from_numpy(units.weight).to(units.x)

    def farthest(point):
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


def _start(units, k):
    """MDAV within cells of nearby units, whose number keeps the whole below quadratic time."""
    cells = [np.arange(len(units))]
    while max(map(len, cells)) > max(CELL, 4 * k):
        cells = [part for cell in cells for part in _halves(units.x, cell, k)]
    result = np.empty(len(units), int)
    count = 0
    for cell in cells:
        person = None if units.person is None else units.person[cell]
        if person is not None and np.bincount(person).max() > len(cell) // k:
            return _mdav(units, k)    # one patient fills a cell; the whole has room for them
        part = _Units(cell, units.x[torch.from_numpy(cell).to(units.x.device)],
                      units.weight[cell], person)
        result[cell] = count + _mdav(part, k)
        count += len(cell) // k
    return result


def _halves(x, cell, k):
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


def _deal(units, k, rng):
    """A random assignment that keeps the promises: units are dealt out person by person."""
    order = rng.permutation(len(units))
    if units.person is not None:
        order = order[np.argsort(units.person[order], kind='stable')]
    assignment = np.empty(len(units), int)
    assignment[order] = np.arange(len(units)) % (len(units) // k)
    return assignment


class _Groups:
    """Groups under refinement: members [C, m] padded with -1, their sums and masses."""

    def __init__(self, units, assignment, k):
        self.k, self.x, self.person = k, units.x, units.person
        self.weight = torch.from_numpy(units.weight).to(self.x)
        self.x_weighted = self.x * self.weight[:, None] if units.weight.max() > 1 else self.x
        self.squares = self.x_weighted.square().sum(1)
        self.size = np.bincount(assignment)
        order = np.argsort(assignment, kind='stable')
        leftover = len(order) - k * len(self.size)
        self.members = np.full((len(self.size), k + leftover), -1)
        column = np.arange(len(order)) - np.repeat(np.cumsum(self.size) - self.size, self.size)
        self.members[assignment[order], column] = order
        self._sum_up()

    def assignment(self):
        result = np.empty(len(self.x), int)
        group, column = np.nonzero(self.members >= 0)
        result[self.members[group, column]] = group
        return result

    def between(self):
        """Sum over groups of |sum|^2 / mass; the squared error is a constant minus this."""
        self._sum_up()
        return (self.sums.double().square().sum(1) / self.mass.double()).sum().item()

    def _sum_up(self):
        self.sums = torch.zeros(len(self.size), self.x.shape[1], device=self.x.device)
        self.mass = torch.zeros(len(self.size), device=self.x.device)
        for column in self.members.T:    # no group twice in a column: the same sums on any device
            group = np.flatnonzero(column >= 0)
            index = torch.from_numpy(column[group]).to(self.x.device)
            group = torch.from_numpy(group).to(self.x.device)
            self.sums[group] += self.x_weighted[index]
            self.mass[group] += self.weight[index]

    def refine(self, rng, rounds, block, tolerance):
        """Ejects a random member of every group and puts all back by an optimal assignment.

        Sending everybody home is among the candidates, so the error never grows. Stops after
        `rounds`, or when many rounds in a row have gained less than `tolerance` of the error.
        """
        if len(self.size) < 2:
            return
        patience = max(40, 2 * self.k ** 2)
        spread = (self.weight.double() @ self.x.double().square().sum(1)).item()
        gains = []
        bar = progress(total=rounds, desc='refining groups')
        for step in range(rounds):
            if step % 20 == 0:
                error = spread - self.between()
            gain = sum(self._reassign(near, rng) for near in self._blocks(rng, block))
            if step % 10 == 0:
                gain += self._move_leftovers()
            gains.append(gain)
            bar.update()
            if step >= patience and sum(gains[-patience:]) <= tolerance * max(error, 0):
                break
        bar.close()

    def _blocks(self, rng, limit):
        """Sets of at most `limit` groups near each other, different in every round."""
        means = self.sums / self.mass[:, None]
        pending, done = [np.arange(len(self.size))], []
        while pending:
            block = pending.pop()
            if len(block) <= limit:
                done.append(block)
                continue
            a, b = rng.choice(block, 2, replace=False)
            here = means[torch.from_numpy(block).to(means.device)]
            along = (here @ (means[a] - means[b])).cpu().numpy()
            halves = np.array_split(block[np.argsort(along, kind='stable')], 2)
            pending += halves
        return done

    def _reassign(self, block, rng):
        """One assignment problem over the groups of a block; returns what the error loses."""
        column = rng.integers(self.size[block])
        ejected = self.members[block, column]
        groups = torch.from_numpy(block).to(self.x.device)
        units = torch.from_numpy(ejected).to(self.x.device)
        x, weight = self.x_weighted[units], self.weight[units]
        rest, mass = self.sums[groups] - x, self.mass[groups] - weight
        # [i, j]: |sum|^2 / mass of group j with unit i in it
        value = torch.addmm(rest.square().sum(1) + self.squares[units, None], x, rest.T, alpha=2)
        value /= mass + weight[:, None]
        # Seen from everybody at home: the optimum is the same, and the solver finds it sooner.
        value = (value - value.diagonal().clone()).cpu().numpy()
        if self.person is not None:
            value[self._clashes(block, column, ejected)] = -np.inf
        source, target = linear_sum_assignment(value, maximize=True)
        moved = np.flatnonzero(source != target)
        if not len(moved):
            return 0.0
        source, target = source[moved], target[moved]
        self.members[block[target], column[target]] = ejected[source]
        source, target = (torch.from_numpy(i).to(groups.device) for i in (source, target))
        self.sums[groups[target]] += x[source] - x[target]
        self.mass[groups[target]] += weight[source] - weight[target]
        return float(value[source.cpu(), target.cpu()].sum())

    def _clashes(self, block, column, ejected):
        """[i, j]: group j, without its own ejected unit, holds the patient of unit i."""
        rest = self.members[block]
        rest[np.arange(len(block)), column] = -1
        owner = self.person[ejected]
        clash = np.zeros((len(block), len(block)), bool)
        for others in rest.T:
            clash |= (owner[:, None] == self.person[others]) & (others >= 0)
        return clash

    def _move_leftovers(self):
        """Moves units out of groups above k while that lowers the error; returns the loss."""
        gained = 0.0
        for _ in range(4 * self.k):
            large = np.flatnonzero(self.size > self.k)
            if not len(large):
                break
            group, column = np.nonzero(self.members[large] >= 0)
            group = large[group]
            unit = self.members[group, column]
            home = torch.from_numpy(group).to(self.x.device)
            index = torch.from_numpy(unit).to(self.x.device)
            x, weight = self.x_weighted[index], self.weight[index]
            own = self.sums[home].square().sum(1) / self.mass[home]
            without = (self.sums[home] - x).square().sum(1) / (self.mass[home] - weight)
            squares = self.sums.square().sum(1)
            joined = torch.addmm(squares + self.squares[index, None], x, self.sums.T, alpha=2)
            joined /= self.mass + weight[:, None]
            gain = (joined - squares / self.mass + (without - own)[:, None]).cpu().numpy()
            gain[np.arange(len(unit)), group] = -np.inf
            if self.person is not None:
                for others in self.members.T:
                    gain[(self.person[unit][:, None] == self.person[others])
                         & (others >= 0)] = -np.inf
            best = gain.argmax()
            i, target = np.unravel_index(best, gain.shape)
            if gain[i, target] <= 1e-6 * abs(own[i].item()):
                break
            gained += float(gain[i, target])
            source = group[i]
            self.size[source] -= 1
            self.members[source, column[i]] = self.members[source, self.size[source]]
            self.members[source, self.size[source]] = -1
            self.members[target, self.size[target]] = unit[i]
            self.size[target] += 1
            self.sums[source] -= x[i]
            self.sums[target] += x[i]
            self.mass[source] -= weight[i]
            self.mass[target] += weight[i]
        return gained


def _kmeans_constrained(units, k, seed):
    """Size-constrained k-means of the k-means-constrained package, for comparison."""
    if units.person is not None or units.weight.max() > 1:
        raise UserError('kmeans-constrained cannot keep the images of a patient apart or '
                        'together; choose another clustering')
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError as error:
        raise UserError('the clustering kmeans-constrained needs the package of that name: '
                        'pip install k-means-constrained') from error
    count = len(units) // k
    if count == 1:
        return np.zeros(len(units), int)
    model = KMeansConstrained(count, size_min=k, n_init=1, random_state=seed % 2 ** 32)
    return _numbered(model.fit_predict(units.x.cpu().double().numpy()))


def _describe(labels, patients, k):
    """Sizes of the groups, in images and in distinct patients."""
    sizes = np.bincount(labels)[1:]
    people = sizes
    if patients is not None:
        pairs = {(label, person) for label, person in zip(labels.tolist(), patients) if label}
        people = np.bincount([label for label, _ in pairs])[1:]
    return {'n_groups': len(sizes), 'k': k,
            'sizes': {int(size): int(c) for size, c in zip(*np.unique(sizes, return_counts=True))},
            'patients_per_group': {int(size): int(c) for size, c
                                   in zip(*np.unique(people, return_counts=True))}}
