"""Who stands where in an evaluation: members, others, later photographs of members.

Whole people are split, and identical photographs show one person, so that nobody is on two sides.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from datasets.table import Table
from evaluation.splits import MEMBER, OTHER, check_roles, split_by_patient
from utils.errors import UserError

log = logging.getLogger(__name__)


class Population(NamedTuple):
    """Tables of one photograph per row; members make the releases, others never enter them.

    again: later photographs of members' eyes, or None; again_of [a]: the row in members of the
    eye's first photograph. nonmember [n]: of the others, True for the attacks' non-members, False
    for their reference people. others_again, others_again_of: as again and again_of, of the others.
    """

    members: Table
    others: Table
    again: Table | None
    again_of: np.ndarray
    nonmember: np.ndarray
    others_again: Table | None
    others_again_of: np.ndarray


def people_of(table: Table) -> list[str]:
    """The person of every row [n]: the patient, or the photograph where patients are unknown."""
    return table.patients or table.ids


def roles_of(table: Table, *, share: float, column: dict | None, seed: int) -> list[str]:
    """'member', 'other' or '' (left out) for every row.

    share: of the people that become members. column: {'members': value, 'others': value} of the
    split column to use instead. UserError for a column that is not there or parts a person.
    """
    if column is None:
        roles = split_by_patient(people_of(table), share, seed=seed)
    else:
        if table.splits is None:
            raise UserError('split_column: the table has no split column')
        value = {column['members']: MEMBER, column['others']: OTHER}
        roles = [value.get(s, '') for s in table.splits]
    check_roles(people_of(table), roles)
    return roles


def populate(table: Table, roles: Sequence[str], *, seed: int) -> Population:
    """The population of a table whose identical photographs are merged (`merge_identical`)."""
    people, first = people_of(table), first_visits(table)
    rows = {r: [i for i, own in enumerate(roles) if own == r and first[i]] for r in (MEMBER, OTHER)}
    again = {
        r: _later(table, [i for i, own in enumerate(roles) if own == r and not first[i]], rows[r])
        for r in rows
    }
    halves = split_by_patient([people[i] for i in rows[OTHER]], 0.5, seed=seed)
    return Population(
        table.subset(rows[MEMBER]),
        table.subset(rows[OTHER]),
        *again[MEMBER],
        np.array([h == MEMBER for h in halves]),
        *again[OTHER],
    )


def _later(table: Table, later: list[int], first: list[int]) -> tuple[Table | None, np.ndarray]:
    """Of the rows `later` those whose eye is known, and the place in `first` of its first
    photograph."""
    photographs = defaultdict(list)
    for n, i in enumerate(first):
        photographs[_eye(table, i)].append(n)
    again = [i for i in later if len(photographs[_eye(table, i)]) == 1]
    if len(again) < len(later):
        log.warning(
            '%d later photographs are left out: which first photograph shows the same '
            'eye is not known (eye column)',
            len(later) - len(again),
        )
    return (
        table.subset(again) if again else None,
        np.array([photographs[_eye(table, i)][0] for i in again], dtype=int),
    )


def _eye(table: Table, i: int) -> tuple[str, str]:
    return people_of(table)[i], table.eyes[i] if table.eyes else ''


def first_visits(table: Table) -> list[bool]:
    """Whether each row is of the first visit of its eye: by number, or else by alphabet (dates)."""
    if table.visits is None:
        return [True] * len(table)
    try:
        order = [float(v or '-inf') for v in table.visits]
    except ValueError:
        order = list(table.visits)
    earliest: dict = {}
    for i, visit in enumerate(order):
        earliest[_eye(table, i)] = min(visit, earliest.get(_eye(table, i), visit))
    return [visit == earliest[_eye(table, i)] for i, visit in enumerate(order)]
