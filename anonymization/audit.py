"""An independent look at a release: does it keep what it promises?

Works from the files alone and shares no code with grouping and writing, so that a fault there is
not repeated here. Without the private folder it checks what any recipient can check.
"""
import dataclasses
import json
import logging
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagehash
import numpy as np
import pandas as pd
from PIL import Image

from utils.errors import UserError
from utils.images import load_rgb, open_image
from utils.io import sha256_file
from utils.logs import progress

log = logging.getLogger(__name__)

MANIFEST, LABELS = 'manifest.json', 'labels.csv'
PAGES = {MANIFEST, LABELS, 'DATASHEET.md', 'report.html'}
PNG_CHUNKS = {b'IHDR', b'PLTE', b'IDAT', b'IEND'}
SIDE = 32           # pictures are compared at this size: what re-encoding spoils is left out
NEAR = 2.5          # grey levels of 255 below which a picture is a copy, whatever else is near
NEAR_RATIO = 0.65   # nearest over nearest of another person; copies stay below, averages don't
NEAR_BITS = 10      # of 256 bits of the perceptual hash
ALIKE = 8.0         # ratio and hash only count within this difference
_MAX_LISTED = 10


@dataclasses.dataclass(frozen=True)
class Check:
    """One question, whether it was answered well, and the reasons or numbers."""

    name: str
    passed: bool
    detail: str


@dataclasses.dataclass
class Audit:
    """All checks of one release, numbers for the report, and nearest-source distances."""

    checks: list
    facts: dict
    distances: np.ndarray | None = None    # [n release pictures] RMSE to the nearest source
    yardstick: np.ndarray | None = None    # [n sources] RMSE to the nearest other person's source

    @property
    def passed(self):
        return all(c.passed for c in self.checks)


def audit_release(release, *, private=None, source_table=None):
    """Checks the folder `release`; with `private`, also groups and sources.

    source_table: datasets.table.Table of the photographs (for pictures and patients); without it
    the comparison with sources is left out and said to be. UserError when a folder is missing or
    the group table cannot be read.
    """
    release = Path(release)
    if not release.is_dir():
        raise UserError(f'release folder not found: {release}')
    manifest, checks = _check_files(release)
    pictures = sorted((release / 'images').glob('*')) if (release / 'images').is_dir() else []
    checks.append(_check_pictures(pictures))
    checks.append(_check_labels(release, pictures))
    facts = {'k': manifest.get('k'), 'pictures': len(pictures)}
    audit = Audit(checks, facts)
    if private is not None:
        groups = _read_groups(Path(private))
        secrets = _secrets(groups, source_table)
        checks.append(_check_names(release, pictures, manifest, secrets))
        checks += _check_groups(groups, manifest, pictures, source_table)
        checks.append(_check_grades(groups, release, facts))
        if source_table is not None:
            checks.append(_check_copies(pictures, groups, source_table, audit))
        else:
            checks.append(Check('no release picture is a source picture', False,
                                'not checked: the photographs were not given'))
    else:
        facts['note'] = ('groups, names and copies of sources were not checked: they need '
                         '--private')
    return audit


def _listed(items):
    items = list(items)
    more = f' and {len(items) - _MAX_LISTED} more' if len(items) > _MAX_LISTED else ''
    return ', '.join(str(i) for i in items[:_MAX_LISTED]) + more


def _check_files(release):
    try:
        manifest = json.loads((release / MANIFEST).read_text(encoding='utf-8'))
        listed = dict(manifest['files'])
    except FileNotFoundError:
        return {}, [Check('manifest is complete', False, f'{MANIFEST} is missing')]
    except (ValueError, KeyError, TypeError) as error:
        return {}, [Check('manifest is complete', False, f'{MANIFEST} is damaged: {error}')]
    there = {p.relative_to(release).as_posix() for p in release.rglob('*')
             if p.is_file() or p.is_symlink()} - {MANIFEST}
    faults = []
    if missing := sorted(listed.keys() - there):
        faults.append(f'missing: {_listed(missing)}')
    if extra := sorted(there - listed.keys()):
        faults.append(f'not listed: {_listed(extra)}')
    foreign = sorted(n for n in there if n not in PAGES
                     and not re.fullmatch(r'images/[^/]+\.png', n))
    if foreign:
        faults.append(f'do not belong in a release: {_listed(foreign)}')
    altered = sorted(n for n in there & listed.keys() if sha256_file(release / n) != listed[n])
    if altered:
        faults.append(f'altered: {_listed(altered)}')
    if not isinstance(manifest.get('k'), int) or manifest['k'] < 2:
        faults.append(f'k is {manifest.get("k")}, below 2')
    return manifest, [Check('files are complete and unaltered', not faults,
                            '; '.join(faults) or f'{len(listed)} files with the right SHA-256')]


def png_chunks(data):
    """Chunk types of a PNG in order; ValueError when it is no PNG or has bytes after its end."""
    if data[:8] != b'\x89PNG\r\n\x1a\n':
        raise ValueError('not a PNG')
    found, at = [], 8
    while at + 12 <= len(data):
        length, kind = struct.unpack('>I4s', data[at:at + 8])
        found.append(kind)
        at += 12 + length
        if kind == b'IEND':
            break
    if not found or found[-1] != b'IEND' or at > len(data):
        raise ValueError('truncated PNG')
    if at != len(data):
        raise ValueError(f'{len(data) - at} bytes after the end of the picture')
    return found


def _check_pictures(pictures):
    faults, sizes = [], set()
    for path in pictures:
        try:
            foreign = set(png_chunks(path.read_bytes())) - PNG_CHUNKS
            if foreign:
                names = ', '.join(sorted(k.decode('latin-1') for k in foreign))
                faults.append(f'{path.name} carries metadata ({names})')
            with open_image(path) as image:
                image.load()
                sizes.add(image.size)
        except (OSError, ValueError, UserError) as error:
            faults.append(f'{path.name}: {error}')
    if not pictures:
        faults.append('there are no pictures')
    if len(sizes) > 1:
        faults.append(f'pictures differ in size: {sorted(sizes)}')
    return Check('every picture decodes and carries no metadata', not faults,
                 _listed(faults) or f'{len(pictures)} pictures of {sizes.pop()[0]} px')


def _check_labels(release, pictures):
    name = 'labels belong to the pictures'
    try:
        table = pd.read_csv(release / LABELS, dtype=str, keep_default_na=False)
        images = table['image'].tolist()
    except (OSError, KeyError, ValueError) as error:
        return Check(name, False, f'{LABELS}: {error}')
    stems = [p.stem for p in pictures]
    wrong = sorted(set(images) ^ set(stems))
    known = {'image', 'label', *(f'p{g}' for g in range(5))}
    faults = ([f'without a counterpart: {_listed(wrong)}'] if wrong else []) + (
        ['rows are double'] if len(set(images)) != len(images) else []) + (
        [f'columns that do not belong here: {_listed(sorted(set(table) - known))}']
        if set(table) - known else [])
    return Check(name, not faults, '; '.join(faults) or f'{len(images)} rows')


def _read_groups(private):
    path = private / 'groups.csv'
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        table['centers'] = table['centers'].astype(int)
        table['count_centers'] = table['count_centers'].astype(int)
        table[['id_code', 'release_name', 'patient_id']]
    except FileNotFoundError:
        raise UserError(f'group table not found: {path}') from None
    except (KeyError, ValueError) as error:
        raise UserError(f'{path} is not a group table of this tool: {error}') from error
    return table


def _secrets(groups, source_table):
    """Source ids and patient ids long enough to be told from ordinary words and counts."""
    words = set(groups['id_code']) | set(groups['patient_id'])
    words |= {Path(v).stem for v in groups['id_code']}
    if source_table is not None:
        words |= set(source_table.patients or []) | {p.name for p in source_table.paths}
    return {w.lower() for w in words if len(w) >= 3}


def _tokens(text):
    """Lower-case words, and words joined by . _ - (ids often hold these)."""
    text = text.lower()
    return set(re.findall(r'[a-z0-9]+', text)) | set(re.findall(r'[a-z0-9]+(?:[._-][a-z0-9]+)+',
                                                                text))


def _check_names(release, pictures, manifest, secrets):
    faults = []
    for path in pictures:
        stem = path.stem.lower()
        hits = {s for s in secrets if s == stem or s in _tokens(stem)
                or (len(s) >= 5 and s in stem)}
        if hits:
            faults.append(f'{path.name} carries {_listed(sorted(hits))}')
    for page in sorted(PAGES):
        if not (release / page).is_file():
            continue
        text = (release / page).read_text(encoding='utf-8', errors='replace')
        if page == MANIFEST:
            text = ' '.join(_strings({k: v for k, v in manifest.items() if k != 'files'}))
        # In running text a short number is a count, not an id.
        words = {t for t in _tokens(text) if not (t.isdigit() and len(t) < 6)}
        if hits := words & secrets:
            faults.append(f'{page} mentions {_listed(sorted(hits))}')
    return Check('names and texts hold no source or patient id', not faults,
                 '; '.join(faults) or f'{len(secrets)} ids looked for')


def _strings(value):
    if isinstance(value, dict):
        return [s for k, v in value.items() for s in [str(k), *_strings(v)]]
    if isinstance(value, list):
        return [s for v in value for s in _strings(v)]
    return [value] if isinstance(value, str) else []


def _check_groups(groups, manifest, pictures, source_table):
    k = manifest.get('k') or 0
    patients = dict(zip(groups['id_code'], groups['patient_id']))
    if source_table is not None and source_table.patients is not None:
        # The table of the photographs, not the run's copy of it, says who is who. Identical
        # photographs carry the run's joint person in addition.
        patients = dict(zip(source_table.ids, source_table.patients))
    faults, twice, smallest = [], [], None
    kept = groups[groups['centers'] > 0]
    for number, part in kept.groupby('centers'):
        people = [patients.get(v, v) for v in part['id_code']]
        distinct = len(set(people))
        smallest = distinct if smallest is None else min(smallest, distinct)
        if distinct < k:
            faults.append(f'group {number} has {distinct} distinct {manifest.get("unit")}')
        if (part['count_centers'] != len(part)).any():
            faults.append(f'group {number} has {len(part)} rows and says otherwise')
        if part['release_name'].nunique() != 1:
            faults.append(f'group {number} has several release names')
        if manifest.get('policy') == 'distinct' and distinct < len(people):
            twice.append(f'group {number}')
    double = kept['id_code'][kept['id_code'].duplicated()]
    if len(double):
        faults.append(f'in more than one group: {_listed(sorted(set(double)))}')
    if source_table is not None and set(source_table.ids) != set(groups['id_code']):
        faults.append('the group table does not hold the ids of the source table')
    named = kept.groupby('release_name')['centers'].nunique()
    if (named > 1).any():
        faults.append(f'one picture for several groups: {_listed(named[named > 1].index)}')
    stems = {p.stem for p in pictures}
    if wrong := sorted(set(kept['release_name']) ^ stems):
        faults.append(f'pictures and groups do not match: {_listed(wrong)}')
    unit = manifest.get('unit', 'patients')
    return [Check(f'every group has at least k distinct {unit}, groups are disjoint', not faults,
                  '; '.join(faults) or f'{kept["centers"].nunique()} groups, smallest {smallest}'),
            Check('no patient is counted twice in a group', not twice,
                  _listed(twice) or f'policy {manifest.get("policy")}')]


def _check_grades(groups, release, facts):
    """Attribute disclosure: never fails, but is said in words."""
    if 'diagnosis' not in groups:
        return Check('grades within groups', True, 'no grades were given')
    kept = groups[groups['centers'] > 0]
    counts = pd.crosstab(kept['centers'], kept['diagnosis'].astype(int))
    counts = counts.reindex(columns=range(5), fill_value=0).to_numpy(dtype=float)
    shares, overall = counts / counts.sum(1, keepdims=True), counts.sum(0) / counts.sum()
    distinct = (counts > 0).sum(1)
    t = np.abs(np.cumsum(shares - overall, 1))[:, :-1].sum(1) / 4
    facts['grade_diversity'] = {
        'homogeneous_groups': int((distinct == 1).sum()), 'l_min': int(distinct.min()),
        'l_mean': float(distinct.mean()), 't_closeness_max': float(t.max()),
        't_closeness_mean': float(t.mean())}
    one = int((distinct == 1).sum())
    majority = dict(zip(sorted(kept['centers'].unique()), counts.argmax(1)))
    labels = pd.read_csv(release / LABELS, dtype=str)
    if 'label' in labels:
        given = dict(zip(labels['image'], labels['label'].astype(int)))
        name = dict(zip(kept['centers'], kept['release_name']))
        wrong = [n for c, n in name.items() if given.get(n) != majority[c]]
        if wrong:
            return Check('grades within groups', False,
                         f'labels that are not the majority grade: {_listed(sorted(wrong))}')
    words = (f'{one} of {len(counts)} groups hold one single grade: whoever knows that a person is '
             f'in such a group knows the grade. ' if one else '')
    return Check('grades within groups', True,
                 f'{words}l-diversity {distinct.min()} to {distinct.max()} (mean '
                 f'{distinct.mean():.1f}), t-closeness at most {t.max():.2f} (mean {t.mean():.2f})')


# -- copies of sources ----------------------------------------------------------------------


def _small(path, side):
    """A picture at side x side, float32 [side, side, 3], and its perceptual hash."""
    image = load_rgb(path)
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BOX), dtype=np.float32)
    return pixels, np.packbits(imagehash.phash(image, hash_size=16).hash)


def _views(pixels):
    """The picture and its three mirror images, [4, side * side * 3]."""
    return np.stack([pixels, pixels[:, ::-1], pixels[::-1], pixels[::-1, ::-1]]).reshape(4, -1)


def _difference(query, pool):
    """RMSE [n] of a picture to each of a pool under mirroring, in grey levels.

    Brightness and contrast are fitted first, so that a copy that was only toned is near.
    query [side, side, 3]; pool: rows as _centred makes them, and their squared lengths.
    """
    rows, squared = pool
    views = _views(query)
    views = views - views.mean(1, keepdims=True)
    explained = np.maximum(views @ rows.T, 0) ** 2 / squared      # [4, n]
    left = (views ** 2).sum(1, keepdims=True) - explained
    return np.sqrt(np.maximum(left.min(0), 0) / rows.shape[1])


def _centred(pixels):
    rows = pixels.reshape(len(pixels), -1)
    rows = rows - rows.mean(1, keepdims=True)
    return rows, np.maximum(np.einsum('ij,ij->i', rows, rows), 1e-6)


def _check_copies(pictures, groups, source_table, audit):
    name = 'no release picture is a source picture'
    try:
        side = min([SIDE, *(min(load_rgb(p).size) for p in pictures[:1])])
        with ThreadPoolExecutor(4) as pool:
            sources = list(progress(pool.map(lambda p: _small(p, side), source_table.paths),
                                    total=len(source_table), desc='comparing', unit='img'))
            released = list(pool.map(lambda p: _small(p, side), pictures))
    except UserError as error:
        return Check(name, False, str(error))
    pixels = np.stack([p for p, _ in sources])
    hashes = np.stack([h for _, h in sources])
    pool = _centred(pixels)
    people = np.array(source_table.patients or source_table.ids)
    yardstick = []
    for i in np.linspace(0, len(pixels) - 1, min(300, len(pixels))).astype(int):
        others = _difference(pixels[i], pool)[people != people[i]]
        yardstick.append(others.min(initial=np.inf))
    yardstick = np.array(yardstick)
    faults, distances = [], []
    for path, (picture, code) in zip(pictures, released):
        far = _difference(picture, pool)
        bits = np.unpackbits(hashes ^ code, axis=1).sum(1)
        nearest, alike = int(far.argmin()), int(np.where(far < ALIKE, bits, 999).argmin())
        distances.append(far[nearest])
        second = far[people != people[nearest]].min(initial=np.inf)
        if far[nearest] < max(NEAR, min(ALIKE, NEAR_RATIO * second)):
            faults.append(f'{path.name} equals {source_table.ids[nearest]} (difference '
                          f'{far[nearest]:.1f} of 255, to the next person {second:.1f})')
        elif bits[alike] <= NEAR_BITS and far[alike] < ALIKE:
            faults.append(f'{path.name} looks like {source_table.ids[alike]} (hash differs in '
                          f'{bits[alike]} of 256 bits)')
    distances = np.array(distances)
    audit.distances, audit.yardstick = distances, yardstick
    audit.facts['nearest_source_rmse'] = _quantiles(distances)
    audit.facts['nearest_other_patient_rmse'] = _quantiles(yardstick)
    return Check(name, not faults, _listed(faults) or (
        f'difference to the nearest source {distances.min():.1f} to {distances.max():.1f} of 255, '
        f'median {np.median(distances):.1f}; two patients\' sources differ by a median of '
        f'{np.median(yardstick):.1f}'))


def _quantiles(values):
    points = (0, 5, 25, 50, 75, 95, 100)
    return {f'p{q}': round(float(v), 2) for q, v in zip(points, np.percentile(values, points))}


def report_text(audit):
    """The verdict as lines of text."""
    lines = [f'{"ok  " if c.passed else "FAIL"}  {c.name}: {c.detail}' for c in audit.checks]
    if 'note' in audit.facts:
        lines.append(f'note  {audit.facts["note"]}')
    return '\n'.join(lines)


def report_dict(audit):
    """The verdict as a JSON-able dict."""
    return {'passed': audit.passed, 'checks': [dataclasses.asdict(c) for c in audit.checks],
            'facts': audit.facts}


def plot_distances(audit, axes):
    """Histogram of distances to the nearest source, beside that between patients' sources."""
    values = [audit.distances, audit.yardstick]
    bins = np.linspace(0, max(v.max() for v in values) * 1.02, 40)
    axes.hist(values, bins=bins, density=True, histtype='stepfilled', alpha=0.6,
              label=['release picture to nearest source', 'source to nearest other patient'])
    axes.axvline(NEAR, color='black', linestyle=':', label='taken for a copy')
    axes.set(xlabel='difference after the best brightness and contrast, grey levels of 255',
             ylabel='density')
    axes.legend()
