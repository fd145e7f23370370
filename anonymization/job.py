"""The whole job as one function: from a table of photographs to a verified release."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from anonymization.audit import Audit
from anonymization.card import Card, check_names, read_card
from anonymization.context import Context
from anonymization.grouped import GROUP_TABLE
from anonymization.networks import Networks
from anonymization.photographs import check_unchanged, read_photographs
from anonymization.pipeline import run_stages
from anonymization.publish import check_place, finished, publish
from anonymization.release import MANIFEST, check_outside_release
from anonymization.settings import Settings
from anonymization.starts import parse_key
from anonymization.workers import one_thread
from datasets.groups import Groups
from datasets.table import Table, without_patients
from utils import distributed, options
from utils.errors import UserError
from utils.runs import run_record, start_run, versions

log = logging.getLogger(__name__)

# Options that may differ when a run goes on: they do not change what is computed, or the content
# of the files they name is compared instead.
_FREE = (
    'exp_dir',
    'checkpoint_path',
    'data_path',
    'df',
    'content_weights',
    'style_weights',
    'guide',
    'test_workers',
    'device',
    'card',
    *options.free(Settings),
)


class Release(NamedTuple):
    """A published release: its folder, what the audit found, and who is in which group."""

    folder: Path
    audit: Audit
    groups: Groups


def anonymize(
    table: Table,
    networks: Networks,
    settings: Settings,
    run_folder: str | Path,
    *,
    device: torch.device | str = 'cpu',
    workers: int = 2,
    card: Card | None = None,
    inversions: Path | None = None,
) -> Release:
    """Makes a k-anonymous release of the photographs of `table`, or goes on making it.

    In `run_folder`: release/, which may be shared, and private/, which may not. A release is
    there only if it has passed its audit. The same call goes on where a run stopped, and returns
    a finished release in seconds; a run of other photographs, settings or networks is refused.
    Works alone or as one of the processes of torchrun, each of which calls it.

    device: for the networks. workers: photographs decoded at a time, at least one per thread of
    torch. card: the institution's fields
    (`anonymization.card.read_card`); another one than before rewrites the pages of a finished
    release, None leaves them as they are. inversions: a folder, as private as private/, in which
    runs of the same photographs and networks share their inversions.

    Raises UserError for bad input, before heavy work where it can be seen; PrivacyError when a
    promise would be broken, and nothing is published.
    """
    if settings.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read at its first use
    run_folder = Path(run_folder)
    settings.check()
    _check_folders(run_folder, table)
    if inversions is not None:
        check_outside_release(inversions, '`inversions`')
        _check_apart(inversions, '`inversions`', table)
    _check_table(table, settings, card)
    with one_thread() as threads:
        _compute(table, networks, settings, run_folder, device, workers, card, threads, inversions)
    audit = distributed.from_main(lambda: _publish(run_folder, table, card))
    groups = Groups.read(run_folder / 'private' / GROUP_TABLE, table.ids)
    return Release(run_folder / 'release', audit, groups)


def _compute(
    table: Table,
    networks: Networks,
    settings: Settings,
    run_folder: Path,
    device: torch.device | str,
    workers: int,
    card: Card | None,
    threads: int,
    inversions: Path | None,
) -> None:
    """All stages up to the staged release, or none where a release is published."""
    loaded = networks.load(settings.optimize)
    private = run_folder / 'private'
    if distributed.is_main():
        _make_folders(run_folder, private)
        asked = {
            'exp_dir': run_folder,
            **settings.options(),
            **networks.options(),
            **table.origin_options(),
            'device': str(device),
        }
        record = run_record(asked, inputs=networks.files(), seed=settings.seed)
        record['inputs']['table'] = table.digest()
        start_run(private, record, resume=True, free_options=_FREE)
    distributed.barrier()
    if (run_folder / 'release' / MANIFEST).exists():
        if distributed.is_main():
            check_unchanged(private, table)
        return
    photographs = read_photographs(
        private,
        table,
        size=loaded.psp.input_size,
        sides=settings.sides,
        threads=max(workers, threads),
    )
    device = torch.device(device)
    run = Context(
        private,
        table,
        photographs,
        loaded,
        settings,
        device,
        threads if device.type == 'cpu' else 1,
        _facts(networks.facts(loaded), card),
        inversions,
    )
    run.check()
    run_stages(run, private / 'staging')


def _publish(run_folder: Path, table: Table, card: Card | None) -> Audit:
    """The verified release in its place, whether it has just been made or was there."""
    private, release = run_folder / 'private', run_folder / 'release'
    if (release / MANIFEST).exists():
        return finished(release, private, table, card)
    audit = publish(private / 'staging', release, private, table)
    shutil.rmtree(private / 'work')
    return audit


def _facts(networks: dict[str, str], card: Card | None) -> dict[str, Any]:
    return {'networks': networks, 'versions': versions(), 'card': card or read_card(None)}


def _check_folders(run_folder: Path, table: Table) -> None:
    """UserError for a run folder among the photographs, in a release, or with a strange release."""
    check_outside_release(run_folder, '`exp_dir`')
    _check_apart(run_folder, '`exp_dir`', table)
    check_place(run_folder)


def _check_apart(folder: Path, name: str, table: Table) -> None:
    """UserError for a folder among the photographs."""
    place = folder.resolve()
    for photos in sorted({p.parent.resolve() for p in table.paths}):
        if place == photos or photos in place.parents:
            raise UserError(
                f'{name} {folder} lies in `data_path` {photos}: results would stand '
                'among the photographs; choose another folder'
            )


def _check_table(table: Table, settings: Settings, card: Card | None) -> None:
    """UserError for too few people, and a card that names one of them."""
    people = len(set(table.patients)) if table.patients else len(table)
    if people < settings.k:
        kind = 'patients' if table.patients else 'images'
        raise UserError(f'`k` {settings.k}: the table has only {people} {kind}')
    settings.noise.check_people(people)
    if settings.start_key is not None:
        parse_key(Path(settings.start_key))  # which is used far later
    if settings.grade_penalty and table.labels is None:
        raise UserError('`grade_penalty` needs a grade column in the table')
    if not table.patients:
        log.warning(without_patients(table))
    if card:
        check_names(card, table.ids, table.patients)


def _make_folders(run_folder: Path, private: Path) -> None:
    """Makes the run folder and its private folder, which only its owner enters."""
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        private.mkdir(mode=0o700, exist_ok=True)
        private.chmod(0o700)
    except OSError as error:
        raise UserError(
            f'`exp_dir` {run_folder} cannot be made ({error.strerror}); choose another folder'
        ) from error
