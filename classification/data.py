"""Training sets from releases, published result folders and real photographs.

Shapes: n training pictures, C = 5 grades. Pictures are uint8 [n, 3, S, S].
"""
import dataclasses
import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from datasets.table import read_table
from utils.errors import UserError
from utils.images import IMAGE_SUFFIXES, load_rgb, resize
from utils.logs import progress
from utils.seeds import numpy_generator

log = logging.getLogger(__name__)

N_CLASSES = 5
MIN_PICTURES = 8
_IN_MEMORY = 4 << 30    # bytes of pictures kept in memory; larger sets live in a temporary file
_MAX_LISTED = 20


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """Pictures to train on. `sources[i]` lists the files picture i is the mean of (mostly one).

    shares [n, C]: how the members' grades are distributed; one-hot for a single photograph, None
    where a release does not tell.
    labels [n]: majority grade, ties to the lowest. groups: patients, or None.
    """

    names: list
    sources: list
    labels: np.ndarray
    shares: np.ndarray | None = None
    groups: list | None = None

    def __len__(self):
        return len(self.names)

    def targets(self, kind):
        """What to train against: grades [n] ('majority') or shares [n, C] ('soft')."""
        if kind == 'soft' and self.shares is None:
            raise UserError(f'labels: soft needs the columns p0 to p{N_CLASSES - 1} in '
                            'labels.csv, which this release does not have; use majority')
        return self.shares if kind == 'soft' else self.labels


def _listing(head, lines):
    more = [f'... and {len(lines) - _MAX_LISTED} more'] if len(lines) > _MAX_LISTED else []
    return '\n  '.join([head + ':', *lines[:_MAX_LISTED], *more])


def one_hot(labels):
    """Grades [n] -> shares [n, C]."""
    return np.eye(N_CLASSES)[labels]


def release_set(folder):
    """A release of this project: `labels.csv` (image, label, optional p0..p4) and `images/`.

    UserError when the shares are negative or do not sum to 1.
    """
    folder = Path(folder)
    table_path = folder / 'labels.csv'
    if not table_path.is_file():
        raise UserError(f'--release {folder}: it has no labels.csv; name the release folder of '
                        'a k-SALSA run')
    images = folder / 'images' if (folder / 'images').is_dir() else folder
    table = read_table(table_path, images, require_label=True)
    frame = pd.read_csv(table_path)
    columns = [f'p{c}' for c in range(N_CLASSES)]
    if set(columns) <= set(frame.columns):
        shares = frame[columns].apply(pd.to_numeric, errors='coerce').to_numpy(dtype=np.float64)
        bad = ~(np.isfinite(shares).all(1) & (shares >= 0).all(1)
                & (np.abs(shares.sum(1) - 1) < 1e-3))
        if bad.any():
            raise UserError(_listing(f'{table_path}: p0..p{N_CLASSES - 1} must be shares that '
                                     'sum to 1', [f'row {i + 2}' for i in np.flatnonzero(bad)]))
    else:
        shares = None
    return TrainingSet(names=table.ids, sources=[[p] for p in table.paths], labels=table.labels,
                       shares=shares, groups=None)


def photograph_set(table):
    """Every photograph of a labelled table as a training picture of its own."""
    return TrainingSet(names=table.ids, sources=[[p] for p in table.paths], labels=table.labels,
                       shares=one_hot(table.labels), groups=table.patients)


def read_groups(path, grades):
    """The groups of a published cluster table or a run's private groups.csv.

    grades: {id: grade}. Returns a list of (group number, ids in table order, release name or
    None), in ascending group number; rows of group 0 (suppressed) are left out. UserError that
    lists all ids without a grade.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'--df {path}: no such table')
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if not {'id_code', 'centers'} <= set(frame.columns):
        raise UserError(f'--df {path}: it needs the columns id_code and centers, and has '
                        f'{", ".join(frame.columns)}')
    centers = pd.to_numeric(frame['centers'], errors='coerce')
    if centers.isna().any():
        raise UserError(_listing(f'--df {path}: centers must be numbers', [
            f'row {i + 2}: {frame["centers"].iloc[i]!r}' for i in np.flatnonzero(centers.isna())]))
    frame = frame.assign(centers=centers.astype(int))
    frame = frame[frame['centers'] != 0]
    missing = [i for i in frame['id_code'] if i not in grades]
    if missing:
        raise UserError(_listing(f'{len(missing)} of {len(frame)} ids of --df {path} have no '
                                 'grade in --labels_train; give the table of the photographs the '
                                 'groups were made of', missing))
    groups = []
    for number, rows in frame.groupby('centers', sort=True):
        release_name = rows['release_name'].iloc[0] if 'release_name' in rows else None
        groups.append((int(number), list(rows['id_code']), release_name))
    return groups


def _group_labels(groups, grades):
    counts = np.zeros((len(groups), N_CLASSES))
    for row, (_, members, _) in zip(counts, groups):
        np.add.at(row, [grades[m] for m in members], 1)
    return counts.argmax(1), counts / counts.sum(1, keepdims=True)


def published_set(groups, grades, folder, *, centroid=False):
    """Synthetic pictures named after the first member of their group, or by release name.

    centroid: `<id>_centroids` files, the plain latent averages. UserError that lists all groups
    without a picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f'--images_path {folder}: no such folder')
    files = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES}
    paths, missing = [], []
    for _, members, release_name in groups:
        first = members[0]
        # Published runs on .jpeg ids cut four characters off and left `<id>._centroids.png`.
        names = [f'{first}_centroids', f'{first}._centroids'] if centroid else [first]
        names += [release_name] if release_name else []
        found = next((files[n] for n in names if n in files), None)
        if found is None:
            missing.append(names[0])
        paths.append(found)
    if missing:
        raise UserError(_listing(f'{len(missing)} of {len(groups)} groups have no picture in '
                                 f'--images_path {folder}; check the path, --df and '
                                 '--is_centroid', missing))
    labels, shares = _group_labels(groups, grades)
    return TrainingSet(names=[p.stem for p in paths], sources=[[p] for p in paths],
                       labels=labels, shares=shares)


def pixel_average_set(groups, grades, paths):
    """The mean photograph of each group (k-Same); paths: {id: file}."""
    labels, shares = _group_labels(groups, grades)
    return TrainingSet(names=[f'group {number}' for number, _, _ in groups],
                       sources=[[paths[m] for m in members] for _, members, _ in groups],
                       labels=labels, shares=shares)


def load_pictures(sources, size, *, threads=4):
    """Reads (and averages, where a picture has several files) pictures: uint8 [n, 3, S, S].

    Antialiased, aspect ratio not kept (published). Sets above 4 GB are kept in a temporary file
    instead of memory. UserError that lists all unreadable files.
    """
    shape = (len(sources), 3, size, size)
    if np.prod(shape) > _IN_MEMORY:
        with tempfile.TemporaryFile() as file:    # the mapping keeps the deleted file alive
            pictures = np.memmap(file, dtype=np.uint8, mode='w+', shape=shape)
    else:
        pictures = np.empty(shape, np.uint8)

    def read(i):
        try:
            total = sum(np.asarray(resize(load_rgb(path), size), dtype=np.float64)
                        for path in sources[i])
        except UserError as error:
            return str(error)
        pictures[i] = np.rint(total / len(sources[i])).transpose(2, 0, 1)
        return None

    with ThreadPoolExecutor(threads) as pool:
        answers = list(progress(pool.map(read, range(len(sources))), total=len(sources),
                                desc='reading pictures', unit='img'))
    bad = [a for a in answers if a is not None]
    if bad:
        raise UserError(_listing(f'{len(bad)} pictures cannot be read', bad))
    return pictures


def split_validation(labels, *, fraction, seed, groups=None):
    """(training indices, validation indices), sorted: every grade's share, whole patients only.

    groups: patient of each picture; all pictures of a patient land on the same side, which
    counts under the highest grade among them. UserError with fewer than 8 pictures or with one
    patient only.
    """
    labels = np.asarray(labels)
    if len(labels) < MIN_PICTURES:
        raise UserError(f'only {len(labels)} training pictures; a grader needs at least '
                        f'{MIN_PICTURES}, so use a smaller k or more photographs')
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
        raise UserError('all training pictures show one patient, so none can be set apart for '
                        'validation; add photographs of other people')
    return np.flatnonzero(~validation), np.flatnonzero(validation)


def without_known_patients(table, *others):
    """The rows of a test table whose ids and patients occur in none of the other tables.

    Returns (table, number of rows dropped); UserError when nothing is left.
    """
    ids = {i for t in others for i in t.ids}
    patients = {p for t in others for p in t.patients or []}
    keep = [i for i in range(len(table)) if table.ids[i] not in ids
            and (table.patients is None or table.patients[i] not in patients)]
    if not keep:
        raise UserError('every test photograph shows a person of the training table, so nothing '
                        'is held out; check --labels_test and --test_split')
    dropped = len(table) - len(keep)
    return (table.subset(keep) if dropped else table), dropped
