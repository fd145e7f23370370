"""Releases whose groups are known: what the pair attack is trained on, and tested on.

Shapes: n photographs and C release pictures, uint8 [*, 3, S, S]; group_of [n] is the index of a
photograph's release picture.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from datasets.groups import find_group_table, group_pictures, read_groups
from datasets.people import merge_identical
from datasets.pictures import load_pictures
from datasets.table import read_table
from evaluation.attacks.metrics import attack_metrics, precision_at_k
from utils.errors import UserError

log = logging.getLogger(__name__)

KINDS = ('centroid_ours', 'centroid')  # k-SALSA pictures, plain averages


class ReleaseFiles(NamedTuple):
    """Group table (or a folder that holds it), folder of photographs, folder of pictures."""

    table: Path
    photographs: Path
    pictures: Path


class KnownRelease(NamedTuple):
    """photos [n], pictures [C], group_of [n], and the person behind each photograph [n]."""

    photos: np.ndarray
    pictures: np.ndarray
    group_of: np.ndarray
    people: list


def run_files(run: Path, kind: str) -> ReleaseFiles:
    """The files of a run folder of scripts/k-SALSA.py; UserError when it is none."""
    record = run / 'private' / 'options.json'
    try:
        photographs = Path(json.loads(record.read_text(encoding='utf-8'))['options']['data_path'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'`run` {run}: not the folder of a finished run of scripts/k-SALSA.py '
            f'({record}: {error})'
        ) from error
    pictures = 'release/images' if kind == KINDS[0] else 'private/centroids'
    return ReleaseFiles(run / 'private', photographs, run / pictures)


def chosen_files(
    given: ReleaseFiles, run: Path | None, kind: str, names: Sequence[str]
) -> ReleaseFiles:
    """What is given, and for those left out (None) what a run folder holds.

    names: of the three parameters, for the UserError that lists what is missing, and the remedy.
    """
    if run is not None:
        found = run_files(run, kind)
        return ReleaseFiles(*(own or other for own, other in zip(given, found)))
    missing = [f'`{name}`' for name, value in zip(names, given) if value is None]
    if missing:
        raise UserError(
            f'{", ".join(missing)} needed: the group table, the photographs and the '
            'release pictures; or name the run of scripts/k-SALSA.py that holds all '
            'three with `run`'
        )
    return given


def read_known_release(
    files: ReleaseFiles, tables: Sequence[str], kind: str, size: int, names: Sequence[str]
) -> KnownRelease:
    """Photographs, pictures, groups and people of a release.

    tables: names that the group table may have in its folder. People are the patients of the
    table; identical photographs show one person. UserError for missing files and fewer than two
    groups.
    """
    path = find_group_table(files.table, tables, parameter=names[0])
    groups = read_groups(path, parameter=names[0])
    if len(groups) < 2:
        raise UserError(f'`{names[0]}` {path}: {len(groups)} groups; the attack needs at least 2')
    if not files.photographs.is_dir():
        raise UserError(f'`{names[1]}` {files.photographs}: no such folder')
    pictures = group_pictures(groups, files.pictures, centroid=kind == KINDS[1], parameter=names[2])
    table = read_table(path, files.photographs)
    if table.patients is None:
        log.warning('%s knows no patients: every photograph counts as a person of its own', path)
    own = {i: c for c, group in enumerate(groups) for i in group.members}
    table = merge_identical(table.subset([n for n, i in enumerate(table.ids) if i in own]))
    return KnownRelease(
        load_pictures(table, size),
        load_pictures(pictures, size),
        np.array([own[i] for i in table.ids]),
        table.patients or table.ids,
    )


def pair_results(
    scores: Float[np.ndarray, 'C n'],
    group_of: Int[np.ndarray, ' n'],
    people: Sequence,
    topk: int,
    *,
    seed: int,
) -> tuple[dict, dict]:
    """Results of scores [C, n] against targets 0..C-1 for photographs of all groups, and curves.

    `membership` asks whether a person stands behind any target picture (a photograph's best score
    counts). Non-members are photographs of people who stand behind none; other photographs of
    members, in groups that are no targets, count on neither side. `pairs` asks whether a
    photograph stands behind a given picture. Curves: {name: (member scores, other scores)}.
    """
    n_targets, who = len(scores), np.asarray(people, dtype=str)
    same = group_of[None] == np.arange(n_targets)[:, None]
    known = group_of < n_targets
    strange = ~np.isin(who, who[known])
    best = scores.max(0)
    shown = np.broadcast_to(who, same.shape)
    found = {
        'precision_at_k': precision_at_k(scores, same, topk),
        'topk': topk,
        'chance_precision': float(same.mean()),
        'n_targets': n_targets,
        'n_photographs': scores.shape[1],
        'n_neither': int((~known & ~strange).sum()),
        'membership': attack_metrics(
            best[known],
            best[strange],
            seed=seed,
            member_people=who[known],
            other_people=who[strange],
        ),
        'pairs': attack_metrics(
            scores[same],
            scores[~same],
            seed=seed,
            member_people=shown[same],
            other_people=shown[~same],
        ),
    }
    return found, {
        'in the release at all': (best[known], best[strange]),
        'behind a given picture': (scores[same], scores[~same]),
    }
