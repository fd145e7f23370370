"""What the flags of main.py name: training pictures, and test photographs of other people."""

import argparse
import logging
from pathlib import Path
from typing import Any

from classification.data import (
    TrainingSet,
    graded_groups,
    photograph_set,
    pixel_average_set,
    published_set,
    random_average_set,
    release_people,
    release_set,
    without_known_people,
)
from classification.metrics import check_test_labels
from datasets.table import Table, read_table
from utils.errors import UserError

log = logging.getLogger(__name__)


def required(opts: argparse.Namespace, *names: str) -> None:
    """UserError that names those of the flags that were not given."""
    missing = [f'--{n}' for n in names if getattr(opts, n) is None]
    if missing:
        raise UserError(f'{", ".join(missing)} needed; see --help')


def source_table(opts: argparse.Namespace, *, ids_only: bool = False) -> Table:
    """The table of --labels_train; its files too, unless they are only good to have (ids_only)."""

    def read(**how: Any) -> Table:
        return read_table(
            opts.labels_train,
            opts.train_images_path,
            require_label=True,
            split=opts.train_split,
            **how,
        )

    if not ids_only or opts.train_images_path is not None:
        return read()
    try:
        return read()
    except UserError:
        log.warning(
            'the photographs of --labels_train are not at hand, so that identical ones '
            'among the test photographs are not noticed; name their folder with '
            '--train_images_path'
        )
        return read(ids_only=True)


def release_source(opts: argparse.Namespace) -> Table | None:
    """Whose photographs are behind --release, if that can be known; says loudly if it cannot."""
    if opts.labels_train:
        return source_table(opts, ids_only=True)
    found = release_people(opts.release)
    if found is None:
        log.warning(
            'IT IS NOT KNOWN WHO IS BEHIND THE RELEASE: test photographs of the same '
            'people make its scores too good. Name the table of its photographs with '
            '--labels_train, or leave the release in its run folder'
        )
    return found


def training_set(opts: argparse.Namespace) -> tuple[TrainingSet, Table | None, int | None]:
    """(TrainingSet, source Table or None, number of pictures to draw or None)."""
    if opts.release is not None:
        if opts.images_path or opts.baseline:
            raise UserError('--release goes without --images_path and --baseline')
        return release_set(opts.release), release_source(opts), None
    required(opts, 'labels_train')
    if opts.baseline is None:
        if opts.images_path is None:
            raise UserError('give --release, --images_path with --df, or --baseline')
        required(opts, 'df')
        table = source_table(opts, ids_only=True)
        grades = dict(zip(table.ids, table.grades))
        return (
            published_set(
                graded_groups(opts.df, grades), grades, opts.images_path, centroid=opts.is_centroid
            ),
            table,
            None,
        )
    if opts.baseline in ('real', 'real-same-n'):
        table = source_table(opts)
        n = number_of_groups(opts, table) if opts.baseline == 'real-same-n' else None
        return photograph_set(table), table, n
    if opts.baseline == 'pixel-average':
        required(opts, 'df')
        table = source_table(opts)
        grades = dict(zip(table.ids, table.grades))
        return (
            pixel_average_set(
                graded_groups(opts.df, grades), grades, dict(zip(table.ids, table.paths))
            ),
            table,
            None,
        )
    if opts.baseline == 'random-average':
        table = source_table(opts)
        return random_average_set(table, opts.group_size), table, None
    folder = Path(opts.baseline)
    if not folder.is_dir():
        raise UserError(
            f'--baseline {opts.baseline}: neither real, real-same-n, '
            'pixel-average, random-average nor a folder'
        )
    if (folder / 'labels.csv').is_file():
        return release_set(folder), source_table(opts, ids_only=True), None
    table = read_table(opts.labels_train, folder, require_label=True, split=opts.train_split)
    return photograph_set(table), table, None


def number_of_groups(opts: argparse.Namespace, table: Table) -> int:
    """How many photographs real-same-n draws."""
    if opts.n_train is not None:
        n = opts.n_train
    else:
        if opts.df is None:
            raise UserError('--baseline real-same-n needs --n_train, or --df to count groups')
        n = len(graded_groups(opts.df, dict(zip(table.ids, table.grades))))
    if n > len(table):
        raise UserError(f'--n_train {n}: {opts.labels_train} has only {len(table)} photographs')
    return n


def test_table(
    opts: argparse.Namespace, source: Table | None, positive_from: int
) -> tuple[Table, int]:
    """The test Table without people of the source table, and how many rows that dropped."""
    required(opts, 'labels_test')
    table = read_table(
        opts.labels_test, opts.test_images_path, require_label=True, split=opts.test_split
    )
    table, dropped = without_known_people(table, *([] if source is None else [source]))
    if dropped:
        log.warning(
            '%d test photographs left out: they show people of the training pictures', dropped
        )
    check_test_labels(table.grades, positive_from=positive_from)
    return table, dropped
