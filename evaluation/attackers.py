"""What attackers have of their own: photographs of other people, and the method.

Half of the attackers' people teach networks whose eye is whose; of the other half a release is
made by the same method, whose groups are known: what it is trained on shows what the method does
to a person, and what it scores on the people under attack, who are not in it, is the control.
"""

import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datasets.digests import read_digests
from datasets.people import merge_identical
from datasets.phantoms import make_dataset
from datasets.table import Table, joined, read_table
from evaluation.population import Population, first_visits, people_of
from evaluation.splits import MEMBER, split_by_patient
from utils.errors import UserError

log = logging.getLogger(__name__)

PROGRESSION = 0.3  # chance that the lesions of a drawn eye change between visits


class Attackers(NamedTuple):
    """teachers: photographs that identity is learnt from, with several of each eye as far as there
    are any. released: one photograph of each eye of those whose release the attackers make.
    """

    teachers: Table
    released: Table


def own_attackers(table: Table, *, seed: int) -> Attackers:
    """Splits the people of a table of the attackers' own in halves."""
    table = merge_identical(table)
    roles = split_by_patient(people_of(table), 0.5, seed=seed)
    first = first_visits(table)
    return Attackers(
        table.subset([i for i, role in enumerate(roles) if role == MEMBER]),
        table.subset([i for i, role in enumerate(roles) if role != MEMBER and first[i]]),
    )


def attackers_among(population: Population) -> Attackers:
    """Where attackers have no people of their own: the reference people, for both purposes."""
    log.warning('attackers have no people of their own: the reference people teach them everything')
    known = ~population.nonmember
    reference = population.others.subset(np.flatnonzero(known))
    if population.others_again is None:
        return Attackers(reference, reference)
    later = population.others_again.subset(np.flatnonzero(known[population.others_again_of]))
    return Attackers(joined(reference, later), reference)


def draw_attackers(folder: Path, phantoms: dict[str, Any], *, seed: int) -> Attackers:
    """Phantoms for the attackers in `folder`, drawn where they are not there yet."""
    if not (folder / 'labels.csv').exists():
        shutil.rmtree(folder, ignore_errors=True)  # what a killed process had begun
        make_dataset(folder, progression=PROGRESSION, **phantoms)
    return own_attackers(read_table(folder / 'labels.csv', require_label=True), seed=seed)


def given_attackers(table: Path, image_dir: Path, *, least: int, seed: int) -> Attackers:
    """The people of a graded table of photographs.

    UserError that names `attackers` for an unfit table, and for fewer than `least` people.
    """
    try:
        found = read_table(table, image_dir, require_label=True)
    except UserError as error:
        raise UserError(f'`attackers`: {error}') from error
    if (n := len(set(people_of(found)))) < least:
        raise UserError(f'`attackers`: {n} people are too few; at least {least} are needed')
    return own_attackers(found, seed=seed)


def check_strangers(attackers: Attackers, population: Population) -> None:
    """UserError when a photograph of the attackers' own, by its pixels, is of one under attack."""
    known = (population.members, population.others, population.again, population.others_again)
    used = set(read_digests([p for t in known if t is not None for p in t.paths]).pixels)
    shared = {
        name
        for table in attackers
        for name, pixels in zip(table.ids, read_digests(table.paths).pixels)
        if pixels in used
    }
    if shared:
        raise UserError(
            f'`attackers`: {len(shared)} of their photographs are of people under attack as '
            f'well, such as {min(shared)}; give photographs of other people'
        )


def eyes_of(table: Table) -> list[str]:
    """Whose eye each photograph shows [n]."""
    eyes = table.eyes or [''] * len(table)
    return [f'{person} {eye}' for person, eye in zip(people_of(table), eyes)]


def has_visits(table: Table) -> bool:
    """Whether some eye was photographed more than once."""
    return len(set(eyes_of(table))) < len(table)
