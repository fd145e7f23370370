"""Training sets from releases, published result folders and real photographs.

Shapes: n training pictures, C = 5 grades. Pictures are uint8 [n, 3, S, S].
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Num

from datasets.groups import Group, group_pictures, read_groups
from datasets.people import merge_identical, shown_elsewhere
from datasets.table import Table, read_table
from evaluation.judges import networks_of
from utils.errors import UserError, listing
from utils.seeds import numpy_generator

log = logging.getLogger(__name__)

N_CLASSES = 5
MIN_PICTURES = 8


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """Pictures to train on. `sources[i]` lists the files picture i is the mean of (mostly one).

    shares [n, C]: how the members' grades are distributed; one-hot for a single photograph, None
    where a release does not tell.
    labels [n]: majority grade, ties to the lowest. groups: patients, or None. networks: what a
    release was made with (`networks_of`).
    """

    names: list[str]
    sources: list[list[Path]]
    labels: np.ndarray
    shares: np.ndarray | None = None
    groups: list[str] | None = None
    networks: dict[str, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def targets(self, kind: str) -> Num[np.ndarray, ' n *C']:
        """What to train against: grades [n] ('majority') or shares [n, C] ('soft')."""
        if kind == 'soft' and self.shares is None:
            raise UserError(
                f'labels: soft needs the columns p0 to p{N_CLASSES - 1} in '
                'labels.csv, which this release does not have; use majority'
            )
        return self.labels if self.shares is None or kind != 'soft' else self.shares


def one_hot(labels: Int[np.ndarray, ' n']) -> Float[np.ndarray, 'n C']:
    """Grades [n] -> shares [n, C]."""
    return np.eye(N_CLASSES)[labels]


def release_set(folder: str | Path) -> TrainingSet:
    """A release of this project: `labels.csv` (image, label, optional p0..p4) and `images/`.

    UserError when the shares are negative or do not sum to 1.
    """
    folder = Path(folder)
    table_path = folder / 'labels.csv'
    if not table_path.is_file():
        raise UserError(
            f'--release {folder}: it has no labels.csv; name the release folder of a k-SALSA run'
        )
    images = folder / 'images' if (folder / 'images').is_dir() else folder
    table = read_table(table_path, images, require_label=True)
    frame = pd.read_csv(table_path)
    columns = [f'p{c}' for c in range(N_CLASSES)]
    if set(columns) <= set(frame.columns):
        shares = frame[columns].apply(pd.to_numeric, errors='coerce').to_numpy(dtype=np.float64)
        bad = ~(
            np.isfinite(shares).all(1) & (shares >= 0).all(1) & (np.abs(shares.sum(1) - 1) < 1e-3)
        )
        if bad.any():
            raise UserError(
                listing(
                    f'{table_path}: p0..p{N_CLASSES - 1} must be shares that sum to 1',
                    [f'row {i + 2}' for i in np.flatnonzero(bad)],
                )
            )
    else:
        shares = None
    return TrainingSet(
        names=table.ids,
        sources=[[p] for p in table.paths],
        labels=table.grades,
        shares=shares,
        groups=None,
        networks=networks_of(Path(folder)),
    )


def photograph_set(table: Table) -> TrainingSet:
    """Every photograph of a labelled table as a training picture of its own."""
    return TrainingSet(
        names=table.ids,
        sources=[[p] for p in table.paths],
        labels=table.grades,
        shares=one_hot(table.grades),
        groups=merge_identical(table).patients,
    )


def graded_groups(path: str | Path, grades: Mapping[str, int]) -> list[Group]:
    """The groups of a table (`read_groups`), every member with a grade in {id: grade}.

    UserError that lists all ids without a grade.
    """
    groups = read_groups(path)
    ids = [i for g in groups for i in g.members]
    missing = [i for i in ids if i not in grades]
    if missing:
        raise UserError(
            listing(
                f'{len(missing)} of {len(ids)} ids of --df {path} have no grade '
                'in --labels_train; give the table of the photographs the '
                'groups were made of',
                missing,
            )
        )
    return groups


def _group_labels(
    groups: Sequence[Group], grades: Sequence[int] | Mapping[str, int]
) -> tuple[Int[np.ndarray, ' n'], Float[np.ndarray, 'n C']]:
    counts = np.zeros((len(groups), N_CLASSES))
    for row, group in zip(counts, groups):
        np.add.at(row, [grades[m] for m in group.members], 1)
    return counts.argmax(1), counts / counts.sum(1, keepdims=True)


def published_set(
    groups: Sequence[Group], grades: Mapping[str, int], folder: Path, *, centroid: bool = False
) -> TrainingSet:
    """The synthetic pictures of groups (`group_pictures`)."""
    paths = group_pictures(groups, folder, centroid=centroid)
    labels, shares = _group_labels(groups, grades)
    return TrainingSet(
        names=[p.stem for p in paths], sources=[[p] for p in paths], labels=labels, shares=shares
    )


def pixel_average_set(
    groups: Sequence[Group], grades: Mapping[str, int], paths: Mapping[str, Path]
) -> TrainingSet:
    """The mean photograph of each group (k-Same); paths: {id: file}."""
    labels, shares = _group_labels(groups, grades)
    return TrainingSet(
        names=[f'group {g.number}' for g in groups],
        sources=[[paths[m] for m in g.members] for g in groups],
        labels=labels,
        shares=shares,
    )


def random_average_set(table: Table, size: int, *, seed: int = 0) -> TrainingSet:
    """Mean photographs of `size` people drawn by chance, each photograph in at most one mean.

    The plainest k-Same: what grouping by likeness is compared with. UserError where there are too
    few people for one mean.
    """
    people = np.asarray(merge_identical(table).patients or table.ids)
    rng = numpy_generator(seed, 'random averages')
    groups, left = [], rng.permutation(len(table))
    while len(first := left[np.unique(people[left], return_index=True)[1]]) >= size:
        # One photograph each of people drawn from those who still have one.
        groups.append(np.sort(rng.choice(first, size, replace=False)))
        left = left[~np.isin(left, groups[-1])]
    if not groups:
        raise UserError(f'{len(set(people))} people are too few for means of {size}')
    shares = np.stack([one_hot(table.grades[g]).mean(0) for g in groups])
    return TrainingSet(
        names=[f'mean {i}' for i in range(len(groups))],
        sources=[[table.paths[i] for i in g] for g in groups],
        labels=shares.argmax(1),
        shares=shares,
    )


def split_validation(
    labels: Sequence[int] | Int[np.ndarray, ' n'],
    *,
    fraction: float,
    seed: int,
    groups: Sequence | None = None,
) -> tuple[Int[np.ndarray, ' a'], Int[np.ndarray, ' b']]:
    """(training indices, validation indices), sorted: every grade's share, whole patients only.

    groups: patient of each picture; all pictures of a patient land on the same side, which
    counts under the highest grade among them. UserError with fewer than 8 pictures or with one
    patient only.
    """
    labels = np.asarray(labels)
    if len(labels) < MIN_PICTURES:
        raise UserError(
            f'only {len(labels)} training pictures; a grader needs at least '
            f'{MIN_PICTURES}, so use a smaller k or more photographs'
        )
    units = np.arange(len(labels))
    if groups is not None:
        _, units = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    grade = np.full(units.max() + 1, -1)
    np.maximum.at(grade, units, labels)
    fraction = max(fraction, 1 / len(grade))
    rng = numpy_generator(seed, 'validation split')
    # Within shuffled grades, every (1/fraction)-th unit of the whole row goes to validation, so
    # that rare grades are represented in proportion over the row rather than rounded to none.
    order = np.lexsort((rng.random(len(grade)), grade))
    position = np.arange(len(order)) + rng.random()
    chosen = order[np.floor((position + 1) * fraction) > np.floor(position * fraction)]
    validation = np.isin(units, chosen)
    if not validation.any() or validation.all():
        raise UserError(
            'all training pictures show one patient, so none can be set apart for '
            'validation; add photographs of other people'
        )
    return np.flatnonzero(~validation), np.flatnonzero(validation)


def release_people(release: Path) -> Table | None:
    """The photographs behind a release that still lies in its run folder, or None.

    A table of ids, patients and, where they are still there, files: the private part of a run
    names them.
    """
    private = Path(release).resolve().parent / 'private'
    groups = private / 'groups.csv'
    if not groups.is_file():
        return None
    try:
        record = json.loads((private / 'options.json').read_text(encoding='utf-8'))
        return read_table(groups, record['options']['data_path'])
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        log.warning(
            'the photographs behind %s cannot be compared with those of the test, only '
            'ids and patients (%s)',
            release,
            error,
        )
        return read_table(groups, ids_only=True)


def without_known_people(table: Table, *others: Table) -> tuple[Table, int]:
    """The rows of a test table whose people occur in none of the other tables.

    The same id, patient or bytes make the same person. Returns (table with identical photographs
    as one patient, number of rows dropped); UserError when nothing is left.
    """
    known = shown_elsewhere(table, *others)
    if all(known):
        raise UserError(
            'every test photograph shows a person of the training table, so nothing '
            'is held out; check --labels_test and --test_split'
        )
    return (merge_identical(table.subset([i for i, k in enumerate(known) if not k])), sum(known))
