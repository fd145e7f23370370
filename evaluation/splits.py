"""Member sets and never-used populations, split by patient."""

from collections.abc import Sequence

import pandas as pd

from datasets.table import Table
from utils.errors import UserError
from utils.seeds import numpy_generator

MEMBER, OTHER = 'member', 'other'


def split_by_patient(patients: Sequence[str], share: float, *, seed: int = 0) -> list[str]:
    """The role of every image, 'member' or 'other': whole patients only, by chance from the seed.

    patients [n]: one id per image. share: of the patients that become members. UserError when
    one side would be empty.
    """
    people = sorted(set(patients))
    drawn = numpy_generator(seed, 'members').permutation(len(people))
    chosen = {people[i] for i in drawn[: round(share * len(people))]}
    if not 0 < len(chosen) < len(people):
        raise UserError(
            f'a share of {share} of {len(people)} patients leaves one side of the '
            'split empty; choose another share'
        )
    return [MEMBER if p in chosen else OTHER for p in patients]


def check_roles(patients: Sequence[str], roles: Sequence[str]) -> None:
    """UserError when a patient is on both sides of a given split, or one side is empty."""
    sides = {r: {p for p, own in zip(patients, roles) if own == r} for r in (MEMBER, OTHER)}
    if both := sides[MEMBER] & sides[OTHER]:
        raise UserError(
            f'{len(both)} patients are members and others at once, e.g. {min(both)}; '
            'split by patient (identical photographs show one patient)'
        )
    if empty := [r for r in sides if not sides[r]]:
        raise UserError(f'the split has no {empty[0]}s')


def split_table(table: Table, roles: Sequence[str]) -> pd.DataFrame:
    """The record of a split: a frame id_code, patient_id, role."""
    return pd.DataFrame(
        {'id_code': table.ids, 'patient_id': table.patients or table.ids, 'role': roles}
    )
