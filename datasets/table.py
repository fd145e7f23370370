"""The table of source photographs: ids, files, grades and patients from one CSV.

Column names of the common sets are understood: APTOS (id_code, diagnosis), EyePACS (image,
level) and this project's phantoms.
"""

import dataclasses
import difflib
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Int

from utils.errors import UserError, listing
from utils.images import IMAGE_SUFFIXES, strip_suffix
from utils.io import sha256_bytes

log = logging.getLogger(__name__)

ID_COLUMNS = ('id_code', 'image', 'image_id', 'id', 'filename', 'name')
LABEL_COLUMNS = ('diagnosis', 'level', 'label', 'grade')
PATIENT_COLUMNS = ('patient_id', 'patient', 'subject_id', 'subject')
# What other columns of patients are called, without spaces, marks and capital letters.
_PATIENT_WORDS = (
    'patient',
    'subject',
    'person',
    'patientid',
    'subjectid',
    'participant',
    'patid',
    'mrn',
)
MAX_GRADE = 4
REFERABLE_FROM = 2  # referable diabetic retinopathy: moderate (grade 2) and worse
_NUMBER = re.compile(r'0*(\d+)(?:\.0+)?')
_EYEPACS_ID = re.compile(r'(.+)_(left|right)', re.IGNORECASE)


class Origin(NamedTuple):
    """How to read a table again: `read_table` with these arguments."""

    csv: Path | None
    image_dir: Path | None
    split: str | None
    n_images: int | None


@dataclasses.dataclass(frozen=True)
class Table:
    """One entry per image, in the order of the file's rows; absent columns are None."""

    ids: list
    paths: list  # of the image files; empty when only ids were asked for
    labels: np.ndarray | None = None  # int64 grades, 0 to 4
    patients: list | None = None  # strings
    eyes: list | None = None  # 'left' or 'right'
    visits: list | None = None
    splits: list | None = None
    origin: Origin | None = None  # of a table as it was read

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def unit(self) -> str:
        """What is counted: people, or photographs where the table names no patients."""
        return 'people' if self.patients else 'photographs'

    @property
    def grades(self) -> Int[np.ndarray, ' n']:
        """The labels of a table that has them; ValueError of one that was read without."""
        if self.labels is None:
            raise ValueError('the table was read without grades; use require_label')
        return self.labels

    @property
    def referable(self) -> list[bool] | None:
        """Whether each grade is referable; None of a table without grades."""
        return None if self.labels is None else (self.labels >= REFERABLE_FROM).tolist()

    def subset(self, keep: Iterable[int]) -> 'Table':
        """The rows with the given indices, in that order."""
        keep = [int(i) for i in keep]
        pick: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del pick['origin']
        picked: dict[str, Any] = {
            name: None
            if value is None
            else value[keep]
            if name == 'labels'
            else [value[i] for i in keep]
            if value
            else value
            for name, value in pick.items()
        }
        return Table(**picked)

    def digest(self) -> str:
        """SHA-256 that changes with ids, grades, patients, eyes, visits and splits."""
        labels = None if self.labels is None else self.labels.tolist()
        columns = [self.ids, labels, self.patients, self.eyes, self.visits, self.splits]
        return sha256_bytes(json.dumps(columns).encode())

    def origin_options(self) -> dict[str, Any]:
        """Where the table and its photographs are, by flag of scripts/k-SALSA.py; None unknown."""
        origin = self.origin or Origin(None, None, None, None)
        folders = {str(p.parent) for p in self.paths}
        return {
            'df': origin.csv and str(origin.csv),
            'data_path': folders.pop() if len(folders) == 1 else None,
            'split': origin.split,
            'n_images': origin.n_images,
        }


def joined(first: Table, second: Table) -> Table:
    """The rows of two tables, one behind the other; columns that one of them lacks are None."""
    columns: dict = {}
    for field in dataclasses.fields(Table):
        if field.name == 'origin':
            continue  # two tables come from two places
        parts = getattr(first, field.name), getattr(second, field.name)
        if parts[0] is None or parts[1] is None:
            columns[field.name] = None
        elif field.name == 'labels':
            columns[field.name] = np.concatenate(parts)
        else:
            columns[field.name] = [*parts[0], *parts[1]]
    return Table(**columns)


def read_table(
    csv: str | Path,
    image_dir: str | Path | None = None,
    *,
    require_label: bool = False,
    ids_only: bool = False,
    split: str | None = None,
    n_images: int | None = None,
) -> Table:
    """Reads a CSV of image ids with optional grade, patient, eye, visit and split columns.

    image_dir: folder of `<id>` with any usual image suffix; None takes `images/` beside the
    table, or the table's folder. ids_only: do not look for files. split: keep those rows only;
    n_images: keep so many, the first ones.
    Without a patient column, ids of the form `<patient>_left` and `<patient>_right` name it;
    patients that differ in capital letters only are one.
    UserError, listing all bad rows together, for: no table, no id column, empty or duplicate
    ids, ids without a file or with several, grades that are not 0 to 4, half-filled patients.
    """
    csv = Path(csv)
    frame = _read_csv(csv)
    ids = _ids(frame, csv)
    table = Table(
        ids=ids,
        paths=[],
        labels=_labels(frame, csv, require_label),
        patients=_patients(frame, ids, csv),
        eyes=_eyes(frame, ids),
        visits=_strings(frame, 'visit'),
        splits=_strings(frame, 'split'),
    )
    if split is not None:
        table = _only_split(table, split, csv)
    if n_images is not None:
        table = table.subset(range(min(n_images, len(table))))
    if not ids_only:
        table = dataclasses.replace(table, paths=_find_files(table.ids, csv, image_dir))
    folder = None if image_dir is None else Path(image_dir)
    return dataclasses.replace(table, origin=Origin(csv, folder, split, n_images))


def without_patients(table: Table) -> str:
    """What it means that a table names no patients, and how to name them, in one sentence."""
    csv = table.origin.csv if table.origin else None
    alike = [] if csv is None else [c for c in _read_csv(csv).columns if _names_patients(c)]
    return (
        f'{csv or "The table"} has no column {PATIENT_COLUMNS[0]}: every photograph is taken for '
        'another person, so photographs are counted, not people, and those of one person may stand '
        'for several; '
        + (f'if {" or ".join(alike)} holds the patients, rename it' if alike else 'add it')
        + f' ({", ".join(PATIENT_COLUMNS)} are known)'
    )


def _names_patients(column: str) -> bool:
    """Whether a column that is not known looks as if it held patients."""
    name = re.sub('[^a-z]', '', column.casefold())
    return bool(difflib.get_close_matches(name, _PATIENT_WORDS, 1, cutoff=0.8)) or any(
        word in name for word in _PATIENT_WORDS[:3]
    )


def _read_csv(csv: Path) -> pd.DataFrame:
    if not csv.is_file():
        raise UserError(f'table not found: {csv}')
    try:
        frame = pd.read_csv(csv, dtype=str, keep_default_na=False, encoding='utf-8-sig')
    except Exception as error:  # random bytes make the reader, and unpackers, fail in any way
        raise UserError(f'{csv} is not a readable CSV table: {str(error)[:200]}') from error
    frame.columns = [str(c).strip() for c in frame.columns]
    if frame.empty:
        raise UserError(f'{csv} has no rows')
    return frame


def _ids(frame: pd.DataFrame, csv: str | Path) -> list[str]:
    column = next((c for c in ID_COLUMNS if c in frame), None)
    if column is None:
        raise UserError(
            f'{csv} has no id column: its columns are '
            f'{", ".join(frame.columns)}; name one of them '
            f'{" or ".join(ID_COLUMNS[:2])}'
        )
    ids = [v.strip() for v in frame[column]]
    empty = [f'row {i + 2}' for i, v in enumerate(ids) if not v]
    if empty:
        raise UserError(listing(f'{csv}: empty ids in column {column}', empty))
    seen: dict[str, int] = {}
    double = []
    for i, v in enumerate(ids):
        if v in seen:
            double.append(f'{v}: rows {seen[v] + 2} and {i + 2}')
        seen.setdefault(v, i)
    if double:
        raise UserError(listing(f'{csv}: duplicate ids; keep one row of each', double))
    return ids


def _labels(frame: pd.DataFrame, csv: str | Path, required: bool) -> Int[np.ndarray, ' n'] | None:
    column = next((c for c in LABEL_COLUMNS if c in frame), None)
    if column is None:
        if required:
            raise UserError(f'{csv} has no grade column ({", ".join(LABEL_COLUMNS)})')
        return None
    values = pd.to_numeric(frame[column], errors='coerce')
    good = values.between(0, MAX_GRADE) & (values == values.round())
    if not good.all():
        raise UserError(
            listing(
                f'{csv}: column {column} must hold grades from 0 to {MAX_GRADE}',
                [f'row {i + 2}: {frame[column].iloc[i]!r}' for i in np.flatnonzero(~good)],
            )
        )
    return values.to_numpy().astype(np.int64)


def _strings(frame: pd.DataFrame, column: str) -> list[str] | None:
    return [v.strip() for v in frame[column]] if column in frame else None


def _patients(frame: pd.DataFrame, ids: list[str], csv: Path) -> list[str] | None:
    column = next((c for c in PATIENT_COLUMNS if c in frame), None)
    if column is None:
        return _patients_of_ids(ids, csv)
    patients = _strings(frame, column) or []
    empty = [f'row {i + 2} ({ids[i]})' for i, v in enumerate(patients) if not v]
    if empty:
        raise UserError(
            listing(
                f'{csv}: column {column} is empty in some rows; fill it, or '
                'remove the column if every image is another person',
                empty,
            )
        )
    return _one_spelling(patients, csv)


def _patients_of_ids(ids: list[str], csv: Path) -> list[str] | None:
    """Patients of ids <patient>_left and _right; None when no id has that form.

    UserError when some ids have it and others do not: whose eyes those are, nobody can tell.
    """
    matches = [_EYEPACS_ID.fullmatch(strip_suffix(v)) for v in ids]
    odd = [v for v, m in zip(ids, matches) if not m]
    if len(odd) == len(ids):
        return None
    if odd:
        raise UserError(
            listing(
                f'{csv} has no patient column, and {len(odd)} of {len(ids)} ids are not of the '
                'form <patient>_left or <patient>_right, from which patients could be taken; add a '
                'patient_id column or remove these rows',
                odd,
            )
        )
    log.info('%s: patients taken from ids of the form <patient>_left, <patient>_right', csv)
    return _one_spelling([m.group(1) for m in matches if m], csv)


def _spelling(patient: str) -> str:
    """Equal for ways to write one id: letters of any case, width or composition, 7, 007 and 7.0."""
    text = unicodedata.normalize('NFKC', patient).casefold()
    text = ''.join(c for c in text if unicodedata.category(c) != 'Cf').strip()
    number = _NUMBER.fullmatch(text)
    return number[1] if number else text


def _one_spelling(patients: list[str], csv: Path) -> list[str]:
    """The patients, those whose ids differ in spelling only being one; the first one names it."""
    first: dict[str, str] = {}
    merged = [first.setdefault(_spelling(p), p) for p in patients]
    if double := sorted(set(patients) - set(merged)):
        log.warning(
            '%s: patients whose ids differ in spelling only count as one person: %s',
            csv,
            ', '.join(f'{first[_spelling(p)]} and {p}' for p in double[:5])
            + (f' and {len(double) - 5} more' if len(double) > 5 else ''),
        )
    return merged


def _eyes(frame: pd.DataFrame, ids: Sequence[str]) -> list[str] | None:
    for column in ('eye', 'laterality', 'side'):
        if column in frame:
            named = {
                'l': 'left',
                'left': 'left',
                'os': 'left',
                'r': 'right',
                'right': 'right',
                'od': 'right',
            }
            return [named.get(v.strip().lower(), '') for v in frame[column]]
    matches = [_EYEPACS_ID.fullmatch(strip_suffix(v)) for v in ids]
    sides = [m.group(2).lower() for m in matches if m]
    return sides if len(sides) == len(ids) else None


def _only_split(table: Table, split: str, csv: str | Path) -> Table:
    if table.splits is None:
        raise UserError(f'`split` {split}: {csv} has no split column')
    keep = [i for i, v in enumerate(table.splits) if v == split]
    if not keep:
        raise UserError(
            f'`split` {split}: no row of {csv} has that split; it has '
            f'{", ".join(sorted(set(table.splits)))}'
        )
    return table.subset(keep)


def _find_files(ids: list[str], csv: Path, image_dir: str | Path | None) -> list[Path]:
    if image_dir is None:
        image_dir = csv.parent / 'images' if (csv.parent / 'images').is_dir() else csv.parent
    image_dir = Path(image_dir)
    if not image_dir.is_dir():
        raise UserError(f'image folder not found: {image_dir}')
    by_name: dict[str, Path] = {}
    by_stem: dict[str, list[Path]] = {}
    for path in sorted(image_dir.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            by_name[path.name] = path
            by_stem.setdefault(path.stem, []).append(path)
    paths, missing, unclear = [], [], []
    for v in ids:
        # Archives that keep names turn img1.jpg into img1.png.
        found = [by_name[v]] if v in by_name else by_stem.get(v) or by_stem.get(strip_suffix(v), [])
        if len(found) == 1:
            paths.append(found[0])
        elif found:
            unclear.append(f'{v}: {", ".join(p.name for p in found)}')
        else:
            missing.append(v)
    if missing:
        raise UserError(
            listing(
                f'{len(missing)} of {len(ids)} ids of {csv} have no image in '
                f'{image_dir.resolve()}; name the folder of the images, add the '
                'files or remove the rows',
                missing,
            )
        )
    if unclear:
        raise UserError(
            listing(
                f'ids of {csv} with more than one image in {image_dir}; keep one file of each',
                unclear,
            )
        )
    users: dict[Path, list[str]] = {}
    for v, path in zip(ids, paths):
        users.setdefault(path, []).append(v)
    if shared := [f'{p.name}: {", ".join(vs)}' for p, vs in users.items() if len(vs) > 1]:
        raise UserError(listing(f'{csv}: several ids of one image; keep one row of each', shared))
    return paths
