"""Stage 2: who is grouped with whom, kept in private/groups.csv and checked again from there."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from anonymization.context import Context
from anonymization.grouping import assign_groups
from anonymization.inversion import ANEW
from anonymization.promises import check_groups
from anonymization.release import release_names
from anonymization.starts import read_key
from datasets.groups import Groups
from utils import distributed
from utils.io import check_intact, has_seal, sealing, write_csv

log = logging.getLogger(__name__)

GROUP_TABLE = 'groups.csv'


def form_groups(run: Context, latents: np.ndarray) -> Groups:
    """The groups of the run, formed once by process 0 from latents [n, L, D].

    PrivacyError when they break a promise, UserError when none can be formed or the group table
    was damaged.
    """
    path = run.private / GROUP_TABLE
    if distributed.is_main():
        if not has_seal(path):
            _write_groups(run, path, _assign(run, latents))
        check_intact(path, remedy=ANEW)
    distributed.barrier()
    groups = Groups.read(path, run.table.ids)
    _check(run, groups.of + 1)
    return groups


def _assign(run: Context, latents: np.ndarray) -> np.ndarray:
    """Group numbers [n], 1 to C, 0 for left out."""
    s = run.settings
    latents = latents.reshape(len(latents), -1)
    rows = np.flatnonzero(~run.copies)
    found = assign_groups(
        latents[rows] if run.copies.any() else latents,
        s.k,
        patients=[run.people[i] for i in rows],
        strata=run.strata and [run.strata[i] for i in rows],
        grades=None if run.table.labels is None else run.table.labels[rows].tolist(),
        grade_penalty=s.grade_penalty,
        method=s.clustering,
        policy=s.policy,
        surplus=s.surplus,
        seed=s.seed,
        reduce=s.reduce_dim or 'auto',
        device=run.device,
    )
    log.info(
        '%d groups of %s; squared error within groups %.1f %% of the total',
        found.numbers.max(),
        _sizes(found.numbers),
        100 * found.info['sse_ratio'],
    )
    for reason in sorted({r for _, r in found.suppressed}):
        log.warning(
            'left out %d photographs: %s', sum(r == reason for _, r in found.suppressed), reason
        )
    numbers = np.zeros(len(latents), np.int64)
    numbers[rows] = found.numbers
    return numbers


def _check(run: Context, numbers: np.ndarray) -> None:
    check_groups(
        numbers.tolist(),
        run.settings.k,
        patients=run.people,
        strata=run.strata,
        policy=run.settings.policy,
    )


def _write_groups(run: Context, path: Path, numbers: np.ndarray) -> None:
    _check(run, numbers)
    sizes = np.bincount(numbers)
    secret, s = '\n'.join(f'{i} {c}' for i, c in zip(run.table.ids, numbers)).encode(), run.settings
    if s.noise.epsilon is not None:  # else names that fit one table only would say who is in it
        secret = read_key(run.private, s.start_key) + secret
    names = release_names(int(numbers.max()), secret, s.seed)
    columns = {
        'id_code': run.table.ids,
        'centers': numbers,
        'count_centers': [int(sizes[c]) if c else 0 for c in numbers],
        'release_name': [names[c - 1] if c else '' for c in numbers],
        'patient_id': run.table.patients or [f'person-{p}' for p in run.people],
    }
    if run.table.labels is not None:
        columns['diagnosis'] = run.table.labels
    with sealing(path):
        write_csv(path, pd.DataFrame(columns))


def _sizes(numbers: np.ndarray) -> str:
    sizes, counts = np.unique(np.bincount(numbers)[1:], return_counts=True)
    return ', '.join(f'{s} images ({c}x)' for s, c in zip(sizes, counts))
