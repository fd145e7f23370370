"""What leaves: the release folder, built from group results alone.

Nothing here sees a photograph, a file name or a patient: the inputs are pictures, grades and
counts per group. The same inputs give the same bytes.
"""
import dataclasses
import hashlib
import json
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd

from utils.images import save_png
from utils.io import sha256_file, write_csv, write_json, write_text
from utils.seeds import derive

MANIFEST = 'manifest.json'
FORMAT = 'k-salsa-release-1'
RISK_LINE = 0.09    # re-identification risk accepted by EMA policy 0070 and Health Canada
_LETTERS = 'bcdfghjkmnpqrstvwxz'    # no vowels: no words; no digits: no mistaking for an id
_NAME_LENGTH = 8
_TEMPLATES = Path(__file__).parent / 'templates'


@dataclasses.dataclass(frozen=True)
class GroupFacts:
    """What may be said of one group: its picture's name, size, and how many have which grade."""

    name: str
    n_images: int
    n_patients: int
    grades: tuple | None    # counts of grades 0, 1, ...; None without labels


def release_names(n, secret, seed):
    """`n` distinct letter codes in an order that says nothing about the groups.

    secret: bytes that only the holder of the photographs has (the group table), so that the
    names cannot be traced back to the order in which groups were found.
    """
    rng = np.random.default_rng([derive(seed, 'release names'),
                                 int.from_bytes(hashlib.sha256(secret).digest()[:8], 'big')])
    names, taken = [], set()
    while len(names) < n:
        name = ''.join(rng.choice(list(_LETTERS), _NAME_LENGTH))
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names


def majority_grade(grades):
    """The most frequent grade of a count vector; ties go to the lowest (published)."""
    return int(np.argmax(grades))


def label_table(groups, *, soft_labels=False):
    """labels.csv: image, label and, on request, the share p<g> of each grade; sorted by name."""
    groups = sorted(groups, key=lambda g: g.name)
    columns = {'image': [g.name for g in groups]}
    if groups and groups[0].grades is not None:
        columns['label'] = [majority_grade(g.grades) for g in groups]
        if soft_labels:
            for grade in range(len(groups[0].grades)):
                columns[f'p{grade}'] = [round(g.grades[grade] / sum(g.grades), 6) for g in groups]
    return pd.DataFrame(columns)


def grade_diversity(groups):
    """l-diversity and t-closeness of the grade over the groups, or None without labels.

    Returns {'homogeneous': share of groups with one single grade, 'l_min', 'l_mean': distinct
    grades per group, 't_max', 't_mean': earth mover's distance between a group's grades and all
    grades, over the range of grades, in [0, 1]} (Machanavajjhala 2007; Li 2007).
    """
    if not groups or groups[0].grades is None:
        return None
    counts = np.array([g.grades for g in groups], dtype=float)
    shares = counts / counts.sum(1, keepdims=True)
    overall = counts.sum(0) / counts.sum()
    distinct = (counts > 0).sum(1)
    moved = np.abs(np.cumsum(shares - overall, 1))[:, :-1].sum(1) / (counts.shape[1] - 1)
    return {'homogeneous': float((distinct == 1).mean()), 'l_min': int(distinct.min()),
            'l_mean': float(distinct.mean()), 't_max': float(moved.max()),
            't_mean': float(moved.mean())}


def _histogram(values):
    return {str(v): int(c) for v, c in zip(*np.unique(list(values), return_counts=True))}


def write_release(folder, groups, pictures, *, facts, soft_labels=False):
    """Writes images/, labels.csv, DATASHEET.md, report.html and manifest.json into `folder`.

    groups: list of GroupFacts; pictures: function name -> float [3, R, R] or PIL picture;
    facts: plain dict for the manifest (k, unit, policy, networks, settings, versions, ...).
    `folder` must be new. Returns the manifest.
    """
    folder = Path(folder)
    (folder / 'images').mkdir(parents=True)
    for group in sorted(groups, key=lambda g: g.name):
        save_png(pictures(group.name), folder / 'images' / f'{group.name}.png')
    labels = label_table(groups, soft_labels=soft_labels)
    write_csv(folder / 'labels.csv', labels)
    manifest = {
        'format': FORMAT, **facts, 'n_images': len(groups),
        'images_per_group': _histogram(g.n_images for g in groups),
        'patients_per_group': _histogram(g.n_patients for g in groups),
        'grades': _histogram(labels['label']) if 'label' in labels else None,
        'grade_diversity': grade_diversity(groups)}
    page = jinja2.Environment(loader=jinja2.FileSystemLoader(_TEMPLATES), trim_blocks=True,
                              lstrip_blocks=True, undefined=jinja2.StrictUndefined,
                              autoescape=jinja2.select_autoescape(['html']))
    smallest = min(int(v) for v in manifest['patients_per_group'])
    shown = [{'name': n, 'label': g} for n, g in
             zip(labels['image'][:24], labels['label'][:24] if 'label' in labels else [None] * 24)]
    values = {'m': manifest, 'smallest': smallest, 'risk': 1 / smallest, 'risk_line': RISK_LINE,
              'shown': shown, 'soft_labels': soft_labels,
              'grade_share': _shares(manifest['grades'])}
    write_text(folder / 'DATASHEET.md', page.get_template('datasheet.md').render(values))
    write_text(folder / 'report.html', page.get_template('report.html').render(values))
    manifest['files'] = {str(p.relative_to(folder).as_posix()): sha256_file(p)
                         for p in sorted(folder.rglob('*')) if p.is_file()}
    write_json(folder / MANIFEST, manifest)
    return json.loads((folder / MANIFEST).read_text(encoding='utf-8'))


def _shares(counts):
    if not counts:
        return []
    most = max(counts.values())
    return [{'grade': g, 'count': c, 'width': round(100 * c / most)} for g, c in counts.items()]
