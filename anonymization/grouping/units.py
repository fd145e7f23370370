"""What moves as a whole, per stratum, and what cannot be placed."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped

from utils.errors import UserError

POLICIES = ('distinct', 'together')
SURPLUS = ('error', 'suppress')


@dataclass
class Units:
    """Units of one stratum: rows (per unit), x [u, d], weight [u] images, person [u] codes.

    person is None when no patient owns two units.
    """

    rows: list[np.ndarray]
    x: torch.Tensor
    weight: np.ndarray
    person: np.ndarray | None

    def __len__(self) -> int:
        return len(self.rows)


def as_ids(values: Sequence[Any] | None, n: int, what: str) -> Shaped[np.ndarray, ' n'] | None:
    """Ids as an array of strings, or None."""
    if values is None:
        return None
    values = list(values)
    if len(values) != n:
        raise UserError(f'{len(values)} {what} values for {n} images')
    missing = [i for i, v in enumerate(values) if v is None or v != v or str(v).strip() == '']
    if missing:
        raise UserError(
            f'{what} missing in {len(missing)} rows, first rows '
            f'{missing[:5]} (counted from 0); fill the column or leave it out'
        )
    return np.array([str(v) for v in values], dtype=object)


def strata_of(
    strata: Shaped[np.ndarray, ' n'] | None, n: int
) -> list[tuple[str, Int[np.ndarray, ' _']]]:
    """[(name, rows)] in the order of the names."""
    if strata is None:
        return [('', np.arange(n))]
    names, codes = np.unique(strata.astype(str), return_inverse=True)
    return [(str(name), np.flatnonzero(codes == c)) for c, name in enumerate(names)]


def placeable(
    rows: Int[np.ndarray, ' r'],
    people: Shaped[np.ndarray, ' r'] | None,
    hashes: Shaped[np.ndarray, ' n'],
    k: int,
    policy: str,
    surplus: str,
    name: str,
) -> tuple[Int[np.ndarray, ' p'], Int[np.ndarray, ' s'], str]:
    """(rows to group, rows to suppress, reason) of a stratum; UserError when it cannot be."""
    where = f'stratum {name!r}' if name else 'the table'
    counts = Counter(rows.tolist() if people is None else people.tolist())
    if len(counts) < k:
        if name:
            return rows[:0], rows, f'stratum {name!r} has fewer than {k} distinct patients'
        raise UserError(
            f'{len(counts)} distinct patients in {len(rows)} images cannot form a '
            f'group of {k}; lower `k` or add images'
        )
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
            'apart from themselves; use `policy` together, or `surplus` suppress, which leaves out '
            'what fits nowhere, or a lower `k`'
        )
    # The largest number of groups that can all be filled when each patient enters one at most once.
    groups = max(
        c for c in range(1, groups + 1) if sum(min(m, c) for m in counts.values()) >= c * k
    )
    order = np.lexsort([hashes[rows]])
    keep = np.zeros(len(rows), bool)
    taken: Counter[str] = Counter()
    for i in order:
        taken[people[i]] += 1
        keep[i] = taken[people[i]] <= groups
    return rows[keep], rows[~keep], f'the patient has more images than the {groups} groups hold'


def make_units(
    x: Float[np.ndarray, 'n d'],
    rows: Int[np.ndarray, ' r'],
    patients: Shaped[np.ndarray, ' n'] | None,
    hashes: Shaped[np.ndarray, ' n'],
    policy: str,
    method: str,
    device: torch.device | str,
) -> Units:
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
        return Units(groups, torch.from_numpy(means).to(device, dtype), weight, None)
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
    return Units([np.array([r]) for r in rows], values, np.ones(len(rows)), person)
