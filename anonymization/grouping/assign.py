"""The one entry: checks the input, groups stratum by stratum, checks the promises."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from anonymization.grouping.features import (
    as_matrix,
    load_features,
    row_hashes,
    squared_errors,
    with_grades,
)
from anonymization.grouping.methods import DEALT, METHODS, Effort, solve
from anonymization.grouping.units import POLICIES, SURPLUS, as_ids, make_units, placeable, strata_of
from anonymization.promises import check_groups
from utils.errors import UserError

log = logging.getLogger(__name__)

_NO_STRATUM = (
    'no stratum has the {k} distinct patients that one group needs; lower `k` or use '
    'coarser `strata`'
)


@dataclass
class Grouping:
    """The outcome of `assign_groups`.

    numbers: int64 [n], 1..C, 0 = suppressed. suppressed: [(row, reason)]. sse: sum over images of
    the squared Euclidean distance to their group's mean, in the features as given, suppressed
    images left out. info: n_groups, sizes {images per group: groups}, patients_per_group
    {distinct patients: groups}, sst, sse_ratio, policy, seed, strata, reduction.
    """

    numbers: np.ndarray
    suppressed: list[tuple[int, str]]
    method: str
    sse: float
    info: dict = field(default_factory=dict)


def assign_groups(
    features: Float[np.ndarray, 'n ...'] | Float[Tensor, 'n ...'],
    k: int,
    *,
    patients: Sequence[Any] | None = None,
    strata: Sequence[Any] | None = None,
    grades: Sequence[int] | Int[np.ndarray, ' n'] | None = None,
    grade_penalty: float = 0.0,
    method: str = 'default',
    policy: str = 'distinct',
    seed: int = 0,
    surplus: str = 'error',
    reduce: int | str | None = 'auto',
    rounds: int = 300,
    block: int = 320,
    restarts: int | None = None,
    tolerance: float = 0.0001,
    device: torch.device | str = 'cpu',
) -> Grouping:
    """Groups `n` images so that every group holds at least `k` distinct patients.

    features: [n, d] floating array, np.memmap or tensor; larger shapes are flattened to [n, d].
    patients: n ids (None: every image is its own patient). strata: n values that groups never
    cross; strata with fewer than k patients are suppressed and listed. grades, grade_penalty: the
    squared distance of two images grows by that of their grades [n], scaled so that its total
    variance is `grade_penalty` times that of the features; 0 leaves grades out.
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
    owners, kinds = as_ids(patients, n, 'patient'), as_ids(strata, n, 'stratum')
    _check_homes(owners, kinds, policy)
    matrix = as_matrix(features)
    hashes = row_hashes(matrix) if method != DEALT else np.zeros(n, 'S32')  # features say nothing
    x, reduction = load_features(matrix, hashes, reduce, seed, device)
    if grade_penalty:
        x = with_grades(x, grades, grade_penalty)

    effort = Effort(rounds, block, restarts, tolerance)
    rules = _Rules(k, method, policy, surplus, seed, effort, device)
    numbers, suppressed, found = _number_strata(x, owners, kinds, hashes, rules)
    people, homes = (None if ids is None else ids.tolist() for ids in (owners, kinds))
    check_groups(numbers.tolist(), k, patients=people, strata=homes, policy=policy)
    sse, sst = squared_errors(matrix, numbers)
    ratio = sse / sst if sst else 0.0
    info = _describe(numbers, owners, k)
    info.update(sst=sst, sse_ratio=ratio, policy=policy, seed=seed, reduction=reduction)
    if kinds is not None:
        info['strata'] = found
    return Grouping(numbers, suppressed, method, sse, info)


class _Rules(NamedTuple):
    """What holds in every stratum."""

    k: int
    method: str
    policy: str
    surplus: str
    seed: int
    effort: Effort
    device: torch.device | str


def _number_strata(
    x: Float[np.ndarray, 'n d'],
    owners: Shaped[np.ndarray, ' n'] | None,
    kinds: Shaped[np.ndarray, ' n'] | None,
    hashes: Shaped[np.ndarray, ' n'],
    rules: _Rules,
) -> tuple[Int[np.ndarray, ' n'], list[tuple[int, str]], list[dict[str, Any]]]:
    """Labels [n] counted on over the strata, the suppressed (row, reason), a record per stratum."""
    k, method, policy, surplus, seed, effort, device = rules
    numbers = np.zeros(len(hashes), np.int64)
    suppressed, strata_info, count = [], [], 0
    for name, rows in strata_of(kinds, len(hashes)):
        people = owners[rows] if owners is not None else None
        keep, dropped, reason = placeable(rows, people, hashes, k, policy, surplus, name)
        suppressed += [(int(row), reason) for row in dropped]
        groups = 0
        if len(keep):
            units = make_units(x, keep, owners, hashes, policy, method, device)
            assignment = solve(units, k, method, seed, effort)
            for unit_rows, group in zip(units.rows, assignment):
                numbers[unit_rows] = count + 1 + group
            groups = int(assignment.max()) + 1
            count += groups
        strata_info.append(
            {'stratum': name, 'images': len(rows), 'suppressed': len(dropped), 'groups': groups}
        )
    if count == 0:
        raise UserError(_NO_STRATUM.format(k=k))
    if suppressed:
        log.warning(
            '%d of %d images suppressed, because no group may hold them',
            len(suppressed),
            len(hashes),
        )
    return numbers, sorted(suppressed), strata_info


def check_groupable(
    k: int,
    *,
    patients: Sequence[Any],
    strata: Sequence[Any] | None = None,
    policy: str = 'distinct',
    surplus: str = 'error',
) -> None:
    """UserError when `assign_groups` would refuse these patients whatever their features are."""
    n = len(patients)
    owners, kinds = as_ids(patients, n, 'patient'), as_ids(strata, n, 'stratum')
    _check_homes(owners, kinds, policy)
    n_groups = 0
    for name, rows in strata_of(kinds, n):
        people = owners[rows] if owners is not None else None
        counts = len(rows) if people is None else len(set(people.tolist()))
        n_groups += counts >= k
        if surplus == 'error' or not name:
            placeable(rows, people, np.zeros(n, np.int64), k, policy, surplus, name)
    if not n_groups:
        raise UserError(_NO_STRATUM.format(k=k))


def _check_homes(
    patients: Shaped[np.ndarray, ' n'] | None, strata: Shaped[np.ndarray, ' n'] | None, policy: str
) -> None:
    if policy == 'together' and patients is not None and strata is not None:
        homes = Counter(patient for patient, _ in set(zip(patients, strata)))
        torn = sum(count > 1 for count in homes.values())
        if torn:
            raise UserError(
                f'the images of {torn} patients lie in several strata, so that the '
                "policy 'together' cannot keep them in one group; use 'distinct' or "
                'strata that do not divide a patient'
            )


def _check_options(
    k: int,
    method: str,
    policy: str,
    surplus: str,
    reduce: int | str | None,
    rounds: int,
    block: int,
    restarts: int | None,
) -> None:
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
        raise UserError(
            f'block must be at least 2 and restarts at least 1, got {block} and {restarts}'
        )


def _describe(
    numbers: Int[np.ndarray, ' n'], patients: Shaped[np.ndarray, ' n'] | None, k: int
) -> dict[str, Any]:
    """Sizes of the groups, in images and in distinct patients."""
    sizes = np.bincount(numbers)[1:]
    people = sizes
    if patients is not None:
        pairs = {(number, person) for number, person in zip(numbers.tolist(), patients) if number}
        people = np.bincount([number for number, _ in pairs])[1:]
    return {
        'n_groups': len(sizes),
        'k': k,
        'sizes': {int(size): int(c) for size, c in zip(*np.unique(sizes, return_counts=True))},
        'patients_per_group': {
            int(size): int(c) for size, c in zip(*np.unique(people, return_counts=True))
        },
    }
