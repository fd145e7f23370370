"""The first two stages: the photographs are checked, shared out by people, and cropped."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from datasets.people import merge_identical
from datasets.pictures import load_pictures
from datasets.table import Table, read_table, without_patients
from evaluation.population import people_of
from evaluation.splits import MEMBER, split_by_patient
from stages.figures import sheet
from stages.runner import Finding, Outcome, Places
from stages.settings import Request
from utils.errors import UserError
from utils.images import find_images
from utils.io import sha256_file, write_csv, write_json

log = logging.getLogger(__name__)

RELEASED, HELD_OUT = 'release', 'held_out'  # values of the column `split`
LABELS = 'labels.csv'
MIN_HELD_OUT = 8  # people: 4 non-members and 4 whom an attacker knows
_LEAST_GROUPS = 10
_MORE = 'more photographs, or a smaller `k`'
_LEAST_KEPT = 0.9
_READERS = 4
_SHOWN = 24

# A command of the project: takes flags, returns an exit code.
Command = Callable[[Sequence[str]], int | None]


def file_hashes(paths: Sequence[Path], known_in: Path) -> list[str]:
    """SHA-256 of files [n]; those of files with size and time as before come from `known_in`."""
    known = json.loads(known_in.read_text(encoding='utf-8')) if known_in.exists() else {}

    def one(path: Path) -> tuple[str, list]:
        state = path.stat()
        seen, name = [state.st_size, state.st_mtime_ns], str(path.resolve())
        if name in known and known[name][:2] == seen:
            return name, known[name]
        return name, [*seen, sha256_file(path)]

    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(one, paths))
    if any(known.get(name) != entry for name, entry in found):
        write_json(known_in, dict(found))
    return [entry[2] for _, entry in found]


def hold_out(
    request: Request, table: Table, people: Sequence[str]
) -> tuple[list[str], set[str], set[str]]:
    """The role of every photograph (`evaluation.splits`), where people [n] says who is on it.

    Also the people of the release, and those who are held out.

    UserError when too few are held out, or no group can be made of the others.
    """
    roles = split_by_patient(people, 1 - request.held_out, seed=request.seed)
    inside = {p for p, role in zip(people, roles) if role == MEMBER}
    outside = set(people) - inside
    if len(outside) < MIN_HELD_OUT:
        raise UserError(
            f'`held_out` {request.held_out:g}: {len(outside)} {table.unit} would be held out, at '
            f'least {MIN_HELD_OUT} are needed to test the release; raise it'
        )
    if len(inside) < request.k:
        raise UserError(
            f'`k` {request.k}: {len(inside)} {table.unit} are left for the release, of which no '
            f'group can be made; {_MORE}'
        )
    return roles, inside, outside


def check_photographs(request: Request, table: Table) -> Callable:
    """The stage that decodes all photographs, counts people and decides who is held out.

    Photographs with the same pixels show one person.
    """

    def work(folder: Path, places: Places) -> Outcome:
        people = people_of(merge_identical(table))
        roles, inside, outside = hold_out(request, table, people)
        rows = pd.read_csv(
            request.labels, dtype=str, keep_default_na=False, encoding='utf-8-sig'
        ).rename(columns=str.strip)
        write_csv(
            folder / LABELS,
            rows.assign(split=[RELEASED if r == MEMBER else HELD_OUT for r in roles]),
        )
        groups = len(inside) // request.k
        known = '' if table.patients else f' {without_patients(table)}.'
        found = f' of {len(set(people))} people' if table.patients else ''
        finding = Finding(
            'groups',
            groups,
            _LEAST_GROUPS,
            True,
            f'{len(table)} photographs{found}; {len(outside)} {table.unit} are '
            f'held out for tests, {len(inside)} make groups of {request.k}.{known}',
            _MORE,
        )
        return Outcome([finding], {}, [LABELS])

    return work


def crop_photographs(request: Request, dataset_tool: Command) -> Callable:
    """The stage that crops to the field of view; left eyes are mirrored to look like right ones."""

    def work(folder: Path, places: Places) -> Outcome:
        reports = []
        for part in (RELEASED, HELD_OUT):
            dest = folder / part
            if dest.exists() and not (folder / f'{part}.report.csv').exists():
                shutil.rmtree(dest)  # a killed run's: the report is written last
            if not dest.exists():
                dataset_tool(
                    [
                        f'--source={places["check"] / LABELS}',
                        f'--image_dir={request.photos}',
                        f'--split={part}',
                        f'--dest={dest}',
                        '--transform=fundus',
                        '--mask',
                        f'--width={request.how.size}',
                        '--one_side',
                        '--keep_names',
                    ]
                )
            reports.append(pd.read_csv(folder / f'{part}.report.csv'))
        report = pd.concat(reports)
        kept = int(report['kept'].sum())
        rest = '' if kept == len(report) else '; the rest is damaged or shows no field of view'
        shown = find_images(folder / RELEASED)[:_SHOWN]
        sheet([load_pictures(shown, request.how.size)], folder / 'crops.png')
        finding = Finding(
            'share of photographs kept',
            kept / len(report),
            _LEAST_KEPT,
            True,
            f'{kept} of {len(report)} photographs were cropped{rest}.',
            f'see who was left out and why in {RELEASED}.report.csv and {HELD_OUT}.report.csv, '
            'and replace those photographs',
        )
        tables = [f'{part}/{LABELS}' for part in (RELEASED, HELD_OUT)]
        return Outcome([finding], {'Cropped photographs': 'crops.png'}, tables)

    return work


def cropped(places: Places, part: str) -> Table:
    """The table of the cropped photographs that are released, or held out."""
    folder = places['crop'] / part
    return read_table(folder / LABELS, folder)
