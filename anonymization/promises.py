"""The promises of a grouping, checked by code that shares nothing with its making."""

from collections import defaultdict
from collections.abc import Hashable, Sequence

from utils.errors import PrivacyError


def check_groups(
    numbers: Sequence[int],
    k: int,
    *,
    patients: Sequence[Hashable] | None = None,
    strata: Sequence[Hashable] | None = None,
    policy: str = 'distinct',
) -> None:
    """Checks an assignment against the promises, sharing no code with its making.

    numbers: [n] of group numbers, 0 = suppressed. Raises PrivacyError that lists every broken
    promise: fewer than k distinct patients, a patient twice in a group ('distinct') or in two
    groups ('together'), a group across strata, group numbers other than 1..C.
    """
    numbers = [int(number) for number in numbers]
    people = list(range(len(numbers))) if patients is None else [str(p) for p in patients]
    kinds = [''] * len(numbers) if strata is None else [str(s) for s in strata]
    if not len(numbers) == len(people) == len(kinds):
        raise PrivacyError(
            f'{len(numbers)} group numbers for {len(people)} patients and {len(kinds)} strata'
        )
    members, homes = defaultdict(list), defaultdict(set)
    for row, number in enumerate(numbers):
        if number != 0:
            members[number].append(row)
            homes[people[row]].add(number)
    faults = []
    if sorted(members) != list(range(1, len(members) + 1)):
        faults.append('group numbers are not 1..C')
    for number, rows in sorted(members.items()):
        distinct = {people[row] for row in rows}
        if len(distinct) < k:
            faults.append(
                f'group {number} holds {len(distinct)} distinct patients, fewer than k = {k}'
            )
        if policy == 'distinct' and len(distinct) < len(rows):
            faults.append(f'group {number} holds a patient more than once')
        if len({kinds[row] for row in rows}) > 1:
            faults.append(f'group {number} crosses strata')
    if policy == 'together':
        scattered = sum(len(groups) > 1 for groups in homes.values())
        if scattered:
            faults.append(f'{scattered} patients have images in several groups')
    if not members:
        faults.append('there is no group at all')
    if faults:
        shown = '; '.join(faults[:10]) + ('; ...' if len(faults) > 10 else '')
        raise PrivacyError(f'the grouping breaks its promises: {shown}')
