"""What leaves: the release folder, built from group results alone.

Nothing here sees a photograph, a file name or a patient: the inputs are pictures, grades and
counts per group. The same inputs give the same bytes.
"""
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import PIL
import torch
from PIL import Image, features

from utils.images import save_png
from utils.io import sha256_file, write_csv, write_json, write_text
from utils.seeds import derive

MANIFEST, LABELS = 'manifest.json', 'labels.csv'
DATASHEET, REPORT = 'DATASHEET.md', 'report.html'
# Stands for the wording of the templates too: a recipient renders them again and compares.
FORMAT = 'k-salsa-release-2'
RISK_LINE = 0.09    # re-identification risk accepted by EMA policy 0070 and Health Canada
DECIMALS = 6        # of shares and distances
_LETTERS = 'bcdfghjkmnpqrstvwxz'    # no vowels: no words; no digits: no mistaking for an id
_NAME_LENGTH = 8
_SHOWN = 24         # pictures in report.html
_TEMPLATES = Path(__file__).parent / 'templates'


@dataclasses.dataclass(frozen=True)
class GroupFacts:
    """What may be said of one group: its picture's name, size, and how many have which grade."""

    name: str
    n_images: int
    n_patients: int
    grades: tuple[int, ...] | None    # counts of grades 0, 1, ...; None without labels


def release_names(n: int, secret: bytes, seed: int) -> list[str]:
    """`n` distinct letter codes in an order that says nothing about the groups.

    secret: bytes that only the holder of the photographs has (the group table), so that the
    names cannot be traced back to the order in which groups were found.
    """
    rng = np.random.default_rng([derive(seed, 'release names'),
                                 int.from_bytes(hashlib.sha256(secret).digest()[:8], 'big')])
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
        gaps = [Fraction(n, sum(own)) - Fraction(everyone, sum(overall))
                for n, everyone in zip(own, overall)]
        moved.append(sum(abs(sum(gaps[:i], Fraction(0))) for i in range(1, n_grades))
                     / (n_grades - 1))
    n = len(counts)
    exact = {'homogeneous': Fraction(distinct.count(1), n), 'l_min': min(distinct),
             'l_mean': Fraction(sum(distinct), n), 't_max': max(moved), 't_mean': sum(moved) / n}
    return {name: value if isinstance(value, int) else round(float(value), DECIMALS)
            for name, value in exact.items()}


def png_encoder() -> str:
    """What compresses the pictures here; another one writes other bytes for the same pixels."""
    library = 'zlib-ng' if features.check_feature('zlib_ng') else 'zlib'
    version = features.version_feature('zlib_ng') if library == 'zlib-ng' else \
        features.version_codec('zlib')
    return f'pillow {PIL.__version__}, {library} {version}'


def _histogram(values: Iterable[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(map(int, values)).items())}


def render_pages(manifest: dict[str, Any], labels: pd.DataFrame) -> dict[str, str]:
    """DATASHEET.md and report.html as text, from the manifest and labels.csv alone."""
    page = jinja2.Environment(loader=jinja2.FileSystemLoader(_TEMPLATES), trim_blocks=True,
                              lstrip_blocks=True, undefined=jinja2.StrictUndefined,
                              autoescape=jinja2.select_autoescape(['html']))
    smallest = min(int(v) for v in manifest['patients_per_group'])
    grades = labels['label'] if 'label' in labels else [None] * len(labels)
    values = {'m': manifest, 'smallest': smallest, 'risk': 1 / smallest, 'risk_line': RISK_LINE,
              'shown': [{'name': n, 'label': g} for n, g in
                        zip(labels['image'][:_SHOWN], grades[:_SHOWN])],
              'soft_labels': 'p0' in labels, 'grade_share': _shares(manifest['grades'])}
    return {DATASHEET: page.get_template('datasheet.md').render(values),
            REPORT: page.get_template('report.html').render(values)}


def write_release(folder: str | Path, groups: list[GroupFacts],
                  pictures: Callable[[str], Image.Image | torch.Tensor], *,
                  facts: dict[str, Any], soft_labels: bool = False) -> dict[str, Any]:
    """Writes images/, labels.csv, DATASHEET.md, report.html and manifest.json into `folder`.

    groups: list of GroupFacts; pictures: function name -> float [3, R, R] or PIL picture;
    facts: plain dict for the manifest (k, unit, policy, networks, settings, versions, png_encoder,
    ...). `folder` must be new. Returns the manifest.
    """
    folder = Path(folder)
    (folder / 'images').mkdir(parents=True)
    for group in sorted(groups, key=lambda g: g.name):
        save_png(pictures(group.name), folder / 'images' / f'{group.name}.png')
    labels = label_table(groups, soft_labels=soft_labels)
    write_csv(folder / LABELS, labels)
    manifest = {
        'format': FORMAT, **facts, 'n_images': len(groups),
        'images_per_group': _histogram(g.n_images for g in groups),
        'patients_per_group': _histogram(g.n_patients for g in groups),
        'grades': _histogram(labels['label']) if 'label' in labels else None,
        'grade_diversity': grade_diversity(groups)}
    manifest = json.loads(json.dumps(manifest))    # as a reader has it: lists, not tuples
    for name, text in render_pages(manifest, labels).items():
        write_text(folder / name, text)
    manifest['files'] = {str(p.relative_to(folder).as_posix()): sha256_file(p)
                         for p in sorted(folder.rglob('*')) if p.is_file()}
    write_json(folder / MANIFEST, manifest)
    return json.loads((folder / MANIFEST).read_text(encoding='utf-8'))


def _shares(counts: dict[str, int] | None) -> list[dict[str, Any]]:
    if not counts:
        return []
    most = max(counts.values())
    return [{'grade': g, 'count': c, 'width': round(100 * c / most)} for g, c in counts.items()]
