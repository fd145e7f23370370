"""What leaves: the release folder, built from group results alone.

Nothing here sees a photograph, a file name or a patient: the inputs are pictures, grades and
counts per group. The same inputs give the same bytes.
"""

import dataclasses
import hashlib
import html
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import PIL
import torch
from PIL import Image, features

from anonymization import croissant
from anonymization.card import Card, filled, is_address
from utils.errors import UserError
from utils.images import save_png
from utils.io import sha256_bytes, sha256_file, write_json, write_text
from utils.seeds import derive

MANIFEST, LABELS, METADATA = 'manifest.json', 'labels.csv', 'metadata.csv'
DATASHEET, REPORT = 'DATASHEET.md', 'report.html'
README, CROISSANT = 'README.md', 'croissant.json'
# All but manifest and pictures, which say the same in the forms that people and tools read.
PAGES = (LABELS, METADATA, DATASHEET, REPORT, README, CROISSANT)
# Stands for the wording of the templates too: a recipient renders them again and compares.
FORMAT, OLDER_FORMATS = ('k-salsa-release-5', tuple(f'k-salsa-release-{n}' for n in range(1, 5)))
# International scale for diabetic retinopathy.
GRADE_NAMES = ('none', 'mild', 'moderate', 'severe', 'proliferative')
RISK_LINE = 0.09  # re-identification risk accepted by EMA policy 0070 and Health Canada
DECIMALS = 6  # of shares and distances
_LETTERS = 'bcdfghjkmnpqrstvwxz'  # no vowels: no words; no digits: no mistaking for an id
_NAME_LENGTH = 8
_SHOWN = 24  # pictures in report.html
# Upper ends of the size categories of dataset cards.
_SIZES = {1000: 'n<1K', 10**4: '1K<n<10K', 10**5: '10K<n<100K', 10**6: '100K<n<1M'}
_TEMPLATES = Path(__file__).parent / 'templates'


@dataclasses.dataclass(frozen=True)
class GroupFacts:
    """What may be said of one group: its picture's name, size, and how many have which grade."""

    name: str
    n_images: int
    n_patients: int
    grades: tuple[int, ...] | None  # counts of grades 0, 1, ...; None without labels


def release_names(n: int, secret: bytes, seed: int) -> list[str]:
    """`n` distinct letter codes in an order that says nothing about the groups.

    secret: bytes that only the holder of the photographs has (the group table), so that the
    names cannot be traced back to the order in which groups were found.
    """
    rng = np.random.default_rng(
        [derive(seed, 'release names'), int.from_bytes(hashlib.sha256(secret).digest()[:8], 'big')]
    )
    names: list[str] = []
    taken: set[str] = set()
    while len(names) < n:
        name = ''.join(rng.choice(list(_LETTERS), _NAME_LENGTH))
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names


def majority_grade(grades: Iterable[int]) -> int:
    """The most frequent grade of a count vector; ties go to the lowest (published)."""
    return int(np.argmax(list(grades)))


def label_table(groups: Iterable[GroupFacts], *, soft_labels: bool = False) -> pd.DataFrame:
    """labels.csv: image, label and, on request, the share p<g> of each grade; sorted by name."""
    groups = sorted(groups, key=lambda g: g.name)
    columns: dict[str, list] = {'image': [g.name for g in groups]}
    counts = [g.grades for g in groups if g.grades is not None]
    if counts:
        columns['label'] = [majority_grade(c) for c in counts]
        if soft_labels:
            for grade in range(len(counts[0])):
                columns[f'p{grade}'] = [round(c[grade] / sum(c), DECIMALS) for c in counts]
    return pd.DataFrame(columns)


def grade_diversity(groups: list[GroupFacts]) -> dict[str, float] | None:
    """l-diversity and t-closeness of the grade over the groups, or None without labels.

    Returns {'homogeneous': share of groups with one single grade, 'l_min', 'l_mean': distinct
    grades per group, 't_max', 't_mean': earth mover's distance between a group's grades and all
    grades, over the range of grades, in [0, 1]} (Machanavajjhala 2007; Li 2007). Worked out in
    fractions, so that whoever derives it again gets the same digits.
    """
    counts = [g.grades for g in groups if g.grades is not None]
    if not counts:
        return None
    n_grades = len(counts[0])
    overall = [sum(column) for column in zip(*counts)]
    distinct = [sum(n > 0 for n in own) for own in counts]
    moved = []
    for own in counts:
        gaps = [
            Fraction(n, sum(own)) - Fraction(everyone, sum(overall))
            for n, everyone in zip(own, overall)
        ]
        moved.append(
            sum(abs(sum(gaps[:i], Fraction(0))) for i in range(1, n_grades)) / (n_grades - 1)
        )
    n = len(counts)
    exact = {
        'homogeneous': Fraction(distinct.count(1), n),
        'l_min': min(distinct),
        'l_mean': Fraction(sum(distinct), n),
        't_max': max(moved),
        't_mean': sum(moved) / n,
    }
    return {
        name: value if isinstance(value, int) else round(float(value), DECIMALS)
        for name, value in exact.items()
    }


def png_encoder() -> str:
    """What compresses the pictures here; another one writes other bytes for the same pixels."""
    library = 'zlib-ng' if features.check_feature('zlib_ng') else 'zlib'
    version = (
        features.version_feature('zlib_ng')
        if library == 'zlib-ng'
        else features.version_codec('zlib')
    )
    return f'pillow {PIL.__version__}, {library} {version}'


def _histogram(values: Iterable[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(map(int, values)).items())}


def metadata_table(labels: pd.DataFrame) -> pd.DataFrame:
    """metadata.csv: labels.csv with `file_name` (images/NAME.png) in place of `image`."""
    paths = [f'images/{name}.png' for name in labels['image']]
    return pd.DataFrame({'file_name': paths}).join(labels.drop(columns='image'))


def csv_text(table: pd.DataFrame) -> str:
    """A table as it stands in a release."""
    return table.to_csv(index=False, lineterminator='\n')


def render_pages(manifest: dict[str, Any], labels: pd.DataFrame) -> dict[str, str]:
    """All PAGES but labels.csv as text, from the manifest and labels.csv alone."""
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=jinja2.select_autoescape(['html']),
    )
    page.filters['quoted'] = lambda text: json.dumps(text, ensure_ascii=False)  # YAML reads it
    page.filters['cell'] = lambda text: html.escape(text).replace('|', '&#124;')
    smallest = min(int(v) for v in manifest['patients_per_group'])
    grades = labels['label'] if 'label' in labels else [None] * len(labels)
    metadata = metadata_table(labels)
    columns = [str(name) for name in metadata]
    values = {
        'm': manifest,
        'smallest': smallest,
        'risk': 1 / smallest,
        'risk_line': RISK_LINE,
        'shown': [
            {'name': n, 'label': g} for n, g in zip(labels['image'][:_SHOWN], grades[:_SHOWN])
        ],
        'soft_labels': 'p0' in labels,
        'grade_share': _shares(manifest['grades']),
        'card': filled(manifest['card']),
        'columns': columns,
        'grade_names': GRADE_NAMES,
        'size_category': _size_category(len(labels)),
        'license_is_address': is_address(manifest['card']['license'] or ''),
    }
    tables = {METADATA: csv_text(metadata), LABELS: csv_text(labels)}
    described = croissant.describe(
        manifest,
        {name: sha256_bytes(text.encode()) for name, text in tables.items()},
        columns,
        page.get_template('description.txt').render(values),
        GRADE_NAMES,
    )
    return {
        METADATA: tables[METADATA],
        DATASHEET: page.get_template('datasheet.md').render(values),
        REPORT: page.get_template('report.html').render(values),
        README: page.get_template('card.md').render(values),
        CROISSANT: json.dumps(described, indent=2) + '\n',
    }


def _size_category(n: int) -> str:
    return next((name for end, name in _SIZES.items() if n < end), '1M<n<10M')


def check_outside_release(path: str | Path, flag: str) -> None:
    """UserError when `path` lies in a release folder, where nothing may be added."""
    for folder in (Path(path).resolve(), *Path(path).resolve().parents):
        manifest = folder / MANIFEST
        if manifest.is_file() and any(
            f'"{name}"' in manifest.read_text('utf-8', 'replace')
            for name in (FORMAT, *OLDER_FORMATS)
        ):
            raise UserError(
                f'{flag} {path} lies in the release {folder}, to which nothing may be '
                'added; choose a place outside'
            )


def write_release(
    folder: str | Path,
    groups: list[GroupFacts],
    pictures: Iterable[tuple[str, Image.Image | torch.Tensor]],
    *,
    facts: dict[str, Any],
    soft_labels: bool = False,
) -> dict[str, Any]:
    """Writes images/, the PAGES and manifest.json into `folder`.

    groups: list of GroupFacts; pictures: pairs of name and
    float [3, R, R] or PIL picture, in any order, written one by one;
    facts: plain dict for the manifest (k, unit, policy, networks, settings, versions, card,
    png_encoder, ...). `folder` must be new. Returns the manifest.
    """
    folder = Path(folder)
    (folder / 'images').mkdir(parents=True)
    written = []
    for name, picture in pictures:
        save_png(picture, folder / 'images' / f'{name}.png')
        written.append(name)
    if sorted(written) != sorted(g.name for g in groups):
        raise ValueError('the pictures are not those of the groups')
    labels = label_table(groups, soft_labels=soft_labels)
    return _write_pages(
        folder,
        labels,
        {
            'format': FORMAT,
            **facts,
            'n_images': len(groups),
            'images_per_group': _histogram(g.n_images for g in groups),
            'patients_per_group': _histogram(g.n_patients for g in groups),
            'grades': _histogram(labels['label']) if 'label' in labels else None,
            'grade_diversity': grade_diversity(groups),
        },
    )


def describe_anew(release: str | Path, folder: str | Path, card: Card) -> dict[str, Any]:
    """Writes into the new `folder` the pictures of `release`, with pages that say another card.

    Returns the manifest. UserError for a release of another version.
    """
    release, folder = Path(release), Path(folder)
    manifest = json.loads((release / MANIFEST).read_text(encoding='utf-8'))
    if manifest.pop('format') != FORMAT:
        raise UserError(
            f'{release} was made by another version of this project, which cannot '
            'give it a card; make the release anew in another folder'
        )
    del manifest['files']
    shutil.copytree(release / 'images', folder / 'images')
    labels = pd.read_csv(release / LABELS, dtype={'image': str}, keep_default_na=False)
    return _write_pages(folder, labels, {'format': FORMAT, **manifest, 'card': card})


def _write_pages(folder: Path, labels: pd.DataFrame, manifest: dict[str, Any]) -> dict[str, Any]:
    """Writes PAGES and manifest beside the pictures; returns the manifest with all hashes."""
    write_text(folder / LABELS, csv_text(labels))
    manifest = json.loads(json.dumps(manifest))  # as a reader has it: lists, not tuples
    for name, text in render_pages(manifest, labels).items():
        write_text(folder / name, text)
    manifest['files'] = {
        str(p.relative_to(folder).as_posix()): sha256_file(p)
        for p in sorted(folder.rglob('*'))
        if p.is_file()
    }
    write_json(folder / MANIFEST, manifest)
    return json.loads((folder / MANIFEST).read_text(encoding='utf-8'))


def _shares(counts: dict[str, int] | None) -> list[dict[str, Any]]:
    if not counts:
        return []
    most = max(counts.values())
    return [{'grade': g, 'count': c, 'width': round(100 * c / most)} for g, c in counts.items()]
