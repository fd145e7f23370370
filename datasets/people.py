"""Which photographs show one person: by the patient column, and by identical pictures.

Files with the same pixels are one photograph, whatever a table says of them, so that they count
once for k and fall on one side of every split.
"""

import dataclasses
import logging
from collections.abc import Hashable, Sequence

from scipy.cluster.hierarchy import DisjointSet

from datasets.digests import read_digests
from datasets.table import Table

log = logging.getLogger(__name__)


def person_numbers(*keys: Sequence[Hashable | None]) -> list[int]:
    """Numbers [n], in order of first appearance: images that agree in any key are one person.

    keys: one or more sequences [n], e.g. patients and digests. None agrees with nothing.
    """
    n = len(keys[0])
    together = DisjointSet(range(n))
    for part in keys:
        first: dict[Hashable, int] = {}
        for i, key in enumerate(part):
            if key is not None:
                together.merge(first.setdefault(key, i), i)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(together[i], len(numbers)) for i in range(n)]


def merge_duplicates(patients: Sequence[str] | None, digests: Sequence[str]) -> list[int]:
    """Person numbers [n] under which images with equal digests belong to one person.

    patients: strings or None (every image its own person); digests: one per image.
    """
    return person_numbers(digests, *([] if patients is None else [patients]))


def merge_identical(table: Table) -> Table:
    """The table with `patients` such that identical photographs have the same patient.

    The merged patient takes the first of the names by alphabet (of ids, where the table knows no
    patients). A table without files, or without identical ones, comes back as it is.
    """
    if not table.paths:
        return table
    names = table.patients or table.ids
    people = person_numbers(names, read_digests(table.paths).pixels)
    merged: dict[int, str] = {}
    for person, name in zip(people, names):
        merged[person] = min(name, merged.get(person, name))
    if len(merged) == len(set(names)):
        return table
    log.warning(
        'identical photographs show one person: %d people, not %d', len(merged), len(set(names))
    )
    return dataclasses.replace(table, patients=[merged[p] for p in people])


def shown_elsewhere(table: Table, *others: Table) -> list[bool]:
    """For every row of `table`, whether its person occurs in one of the other tables.

    The same id, the same patient or the same pixels make the same person; tables without files are
    compared by ids and patients alone.
    """
    tables = (table, *others)
    files = [p for t in tables for p in t.paths]
    keys = iter(read_digests(files).pixels)
    people = person_numbers(
        [i for t in tables for i in t.ids],
        [p for t in tables for p in t.patients or [None] * len(t)],
        [next(keys) if t.paths else None for t in tables for _ in range(len(t))],
    )
    known = set(people[len(table) :])
    return [p in known for p in people[: len(table)]]
