"""Texts, facts and files of a release spoiled, each made consistent as an insider would do it.

Each kind is a function of a Spoiled run.
"""

import base64
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from picture_tampering import ID, Kind
from release_fixture import Spoiled

from utils.images import save_png
from utils.io import sha256_file

PATIENT = 'person03z'

# -- texts ----------------------------------------------------------------------------------


def _append(page: str, text: str) -> Kind:
    def spoil(spoiled: Spoiled) -> None:
        with open(spoiled.release / page, 'a', encoding='utf-8') as file:
            file.write(f'\n{text}\n')
        spoiled.seal()

    return spoil


def _field(name: str, value: Any, *, render: bool = True) -> Kind:
    """A field of the manifest, by dotted name, and pages that go with it."""

    def spoil(spoiled: Spoiled) -> None:
        manifest = spoiled.manifest()
        place = manifest
        *path, last = name.split('.')
        for part in path:
            place = place[part]
        place[last] = value
        spoiled.seal(manifest, render=render)

    return spoil


def _photograph_hash(spoiled: Spoiled) -> None:
    manifest = spoiled.manifest()
    manifest['settings']['source'] = sha256_file(spoiled.photographs / f'{ID}.png')
    spoiled.seal(manifest)


def _member_rows(spoiled: Spoiled) -> None:
    manifest = spoiled.manifest()
    manifest['groups'] = pd.read_csv(spoiled.private / 'groups.csv').to_dict('records')
    spoiled.seal(manifest)


def _inline_photograph(spoiled: Spoiled) -> None:
    data = base64.b64encode((spoiled.photographs / f'{ID}.png').read_bytes()).decode()
    _append('report.html', f'<img src="data:image/png;base64,{data}">')(spoiled)


def _manifest_text(change: Callable[[str], str]) -> Kind:
    def spoil(spoiled: Spoiled) -> None:
        path = spoiled.release / 'manifest.json'
        path.write_text(change(path.read_text()), encoding='utf-8')

    return spoil


def _manifest_folder(spoiled: Spoiled) -> None:
    (spoiled.release / 'manifest.json').unlink()
    (spoiled.release / 'manifest.json').mkdir()


def _no_page(name: str) -> Kind:
    def spoil(spoiled: Spoiled) -> None:
        (spoiled.release / name).unlink()
        spoiled.seal()

    return spoil


def _in_page(name: str, old: str, new: str) -> Kind:
    def spoil(spoiled: Spoiled) -> None:
        path = spoiled.release / name
        text = path.read_text(encoding='utf-8')
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding='utf-8')
        spoiled.seal()

    return spoil


TEXTS: dict[str, Kind] = {
    'id in the datasheet': _append('DATASHEET.md', f'The nicest one is of {PATIENT}.'),
    'id glued': _append('DATASHEET.md', f'madefrom{ID}andothers'),
    'id spaced': _append('DATASHEET.md', ' '.join(ID)),
    'id reversed': _append('DATASHEET.md', ID[::-1]),
    'id in camel case': _append('report.html', 'madeFromEye007x'),
    'id in base64': _append('report.html', base64.b64encode(ID.encode()).decode()),
    'id in full width': _append('DATASHEET.md', ''.join(chr(ord(c) + 0xFEE0) for c in ID)),
    'id with zero width': _append('DATASHEET.md', '\u200b'.join(ID)),
    'id as HTML entities': _append('report.html', ''.join(f'&#{ord(c)};' for c in ID)),
    'short numbers in the report': _append('report.html', '33019 33020 33021'),
    'number in a manifest field': _field('clustering', 'made from patient 33021'),
    'list of numbers in the manifest': _field('people', [33019, 33020, 33021]),
    'id as a key of the manifest': _field(f'settings.{ID}', 1),
    'ids among the strata': _field('strata', [ID]),
    'member rows in the manifest': _member_rows,
    'hash of a photograph': _photograph_hash,
    'path in the manifest': _field('settings.data_path', '/data/hospital/' + PATIENT),
    'inline photograph': _inline_photograph,
    'inline script': _append('report.html', '<script>alert(1)</script>'),
    'remote script': _append('report.html', '<script src="https://example.org/a.js"></script>'),
    'remote picture': _append('report.html', '<img src="https://example.org/a.png">'),
    'no datasheet': _no_page('DATASHEET.md'),
    'no report': _no_page('report.html'),
    'no labels': _no_page('labels.csv'),
    'no metadata': _no_page('metadata.csv'),
    'no card': _no_page('README.md'),
    'no croissant': _no_page('croissant.json'),
    'id in the card': _append('README.md', f'Made from {ID}.'),
    'remote picture in the card': _append('README.md', '![](https://example.org/a.png)'),
    'id in croissant': _in_page('croissant.json', '"retina"', f'"{ID}"'),
    'croissant from elsewhere': _in_page(
        'croissant.json', '"contentUrl": "', '"contentUrl": "https://example.org/'
    ),
    'another hash in croissant': _in_page('croissant.json', '"sha256": "', '"sha256": "0'),
    'doubled keys': _manifest_text(lambda t: t.replace('{', f'{{\n  "k": "{ID}",', 1)),
    'escaped letters': _manifest_text(lambda t: t.replace('"format"', '"\\u0066ormat"')),
    'other spacing': _manifest_text(lambda t: t.replace('\n', '\n ')),
    'bytes after the manifest': _manifest_text(lambda t: t + ' ' * 7),
    'nested deep': _manifest_text(lambda t: '[' * 100_000 + ']' * 100_000),
    'nested deep in a field': _manifest_text(
        lambda t: t.replace('{', '{"a": ' + '[' * 100_000 + ']' * 100_000 + ',', 1)
    ),
    'not a number': _manifest_text(lambda t: t.replace('"k": 5', '"k": NaN')),
    'a list': _manifest_text(lambda t: '[]\n'),
    'not JSON': _manifest_text(lambda t: t[:-9]),
    'a folder named manifest': _manifest_folder,
}

# -- facts ----------------------------------------------------------------------------------


def _labels(
    change: Callable[[pd.DataFrame], pd.DataFrame | None],
    *,
    page: str = 'labels.csv',
    **options: Any,
) -> Kind:
    def spoil(spoiled: Spoiled) -> None:
        path = spoiled.release / page
        table = pd.read_csv(path)
        changed = change(table)
        (table if changed is None else changed).to_csv(path, **{'index': False, **options})
        spoiled.seal()

    return spoil


def _in_group_order(spoiled: Spoiled) -> None:
    groups = pd.read_csv(spoiled.private / 'groups.csv')
    order = groups.drop_duplicates('centers').sort_values('centers')['release_name'].tolist()
    _labels(lambda t: t.set_index('image').loc[order].reset_index())(spoiled)


def _in_input_order(spoiled: Spoiled) -> None:
    groups = pd.read_csv(spoiled.private / 'groups.csv')
    order = groups['release_name'].drop_duplicates().tolist()
    if order == sorted(order):
        order = order[::-1]
    _labels(lambda t: t.set_index('image').loc[order].reset_index())(spoiled)


def _wrong_grade(spoiled: Spoiled) -> None:
    """One label altered, with everything that follows from it in manifest and pages."""
    path = spoiled.release / 'labels.csv'
    labels = pd.read_csv(path)
    columns = ['p0', 'p1', 'p2', 'p3', 'p4']
    shares = labels[columns].to_numpy()
    shares[0] = np.roll(shares[0], 1)
    labels[columns], labels['label'] = shares, shares.argmax(1)
    labels.to_csv(path, index=False)
    manifest = spoiled.manifest()
    manifest['grades'] = {
        str(k): int(v) for k, v in labels['label'].value_counts().sort_index().items()
    }
    spoiled.seal(manifest, render=True)


def _k_in_the_report(spoiled: Spoiled) -> None:
    path = spoiled.release / 'report.html'
    path.write_text(path.read_text().replace('k = 5', 'k = 12').replace('least 5', 'least 12'))
    spoiled.seal()


def _small_group(spoiled: Spoiled) -> None:
    """A group of four people, with k lowered in the manifest to match."""
    path = spoiled.private / 'groups.csv'
    table = pd.read_csv(path, keep_default_na=False)
    rows = table.index[table.centers == 1]
    table.loc[rows[4:], ['centers', 'count_centers', 'release_name']] = [0, 0, '']
    table.loc[rows[:4], 'count_centers'] = 4
    table.to_csv(path, index=False)
    spoiled.reseal_private('groups.csv')
    _field('k', 4)(spoiled)


FACTS: dict[str, Kind] = {
    'k lowered': _field('k', 2),
    'k as text': _field('k', '5'),
    'k as a number': _field('k', 5.0),
    'k in the report': _k_in_the_report,
    'a group below k': _small_group,
    'unit': _field('unit', 'images'),
    'policy': _field('policy', 'together'),
    'clustering': _field('clustering', 'published'),
    'strata': _field('strata', ['eyes']),
    'n_images': _field('n_images', 9),
    'n_suppressed': _field('n_suppressed', 3),
    'image_size': _field('image_size', 64),
    'sizes in images': _field('images_per_group', {'6': 4}),
    'sizes in patients': _field('patients_per_group', {'6': 4}),
    'grades': _field('grades', {'0': 4}),
    'diversity': _field('grade_diversity.homogeneous', 0.25),
    't-closeness': _field('grade_diversity.t_max', 0.5),
    'settings': _field('settings.n_steps', 100),
    'seed': _field('settings.seed', 0),
    'noise': _field(
        'noise',
        {
            'epsilon': 1.0,
            'delta': 1e-5,
            'clip': 1.5,
            'directions': 4,
            'groups_per_person': 1,
            'sigma': 9.0,
        },
    ),
    'networks': _field('networks.style', 'vgg19-relu1_2 ' + 64 * 'a'),
    'versions': _field('versions.torch', '2.0.0'),
    'format': _field('format', 'k-salsa-release-9'),
    'labels of 9': _labels(lambda t: t.assign(label=9)),
    'labels as text': _labels(lambda t: t.assign(label='mild')),
    'labels as floats': _labels(lambda t: t.assign(label=t.label.astype(float))),
    'no label column': _labels(lambda t: t.drop(columns='label')),
    'ages in p0': _labels(lambda t: t.assign(p0=61.5)),
    'more decimals': _labels(lambda t: t.assign(p0=t.p0 + 1e-9)),
    'a foreign column': _labels(lambda t: t.assign(age=60)),
    'an index column': _labels(lambda t: None, index=True),
    'other line ends': _labels(lambda t: None, lineterminator='\r\n'),
    'quoted': _labels(lambda t: None, quoting=1),
    'rows in group order': _in_group_order,
    'rows in input order': _in_input_order,
    'a row twice': _labels(lambda t: pd.concat([t, t.iloc[:1]])),
    'a row less': _labels(lambda t: t.iloc[1:]),
    'one wrong grade': _wrong_grade,
    'another licence': _field('card.license', 'cc0-1.0'),
    'a patient as contact': _field('card.contact', PATIENT),
    'a list in the card': _field('card.contact', [PATIENT], render=False),
    'a script as address': _field('card.url', 'javascript:alert(1)'),
    'a day that is none': _field('card.date_published', '2026-02-30'),
    'a field more in the card': _field('card.notes', 'x'),
    'metadata: other grades': _labels(lambda t: t.assign(label=4 - t.label), page='metadata.csv'),
    'metadata: a foreign column': _labels(lambda t: t.assign(age=60), page='metadata.csv'),
    'metadata: rows turned': _labels(lambda t: t.iloc[::-1], page='metadata.csv'),
    'metadata: private files': _labels(
        lambda t: t.assign(file_name='../private/contact_sheet.png'), page='metadata.csv'
    ),
}

# -- files ----------------------------------------------------------------------------------


def _link(name: str, target: str) -> Kind:
    def spoil(spoiled: Spoiled) -> None:
        path = spoiled.release / name if name else spoiled.pictures[0]
        (spoiled.private / 'kept').mkdir(exist_ok=True)
        kept = spoiled.private / 'kept' / path.name
        shutil.move(path, kept)
        path.symlink_to(kept if target == 'kept' else spoiled.private / target)

    return spoil


def _socket(spoiled: Spoiled) -> None:
    here = os.getcwd()
    os.chdir(spoiled.release)  # the name of a socket may have 100 characters only
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind('s')
    finally:
        os.chdir(here)


def _instead(name: str, make: Callable[[Path], None]) -> Kind:
    def spoil(spoiled: Spoiled) -> None:
        path = spoiled.release / name
        path.unlink(missing_ok=True)
        make(path)

    return spoil


def _renamed(spoiled: Spoiled) -> None:
    """A source id as the name of a picture, consistently in the private table too."""
    path = spoiled.pictures[0]
    path.rename(path.with_name(f'synthetic_{ID}.png'))
    for file in (
        spoiled.release / 'labels.csv',
        spoiled.private / 'groups.csv',
        spoiled.private / 'pictures.json',
    ):
        file.write_text(file.read_text().replace(path.stem, f'synthetic_{ID}'))
    for name in ('groups.csv', 'pictures.json'):
        spoiled.reseal_private(name)
    spoiled.seal(render=True)


def _attribute(spoiled: Spoiled) -> None:
    os.setxattr(spoiled.pictures[0], 'user.comment', ID.encode())


FILES: dict[str, Kind] = {
    'link to the same picture': _link('', 'kept'),
    'link to the same page': _link('DATASHEET.md', 'kept'),
    'link to the same card': _link('README.md', 'kept'),
    'link into private': _link('DATASHEET.md', 'README.txt'),
    'link in place of images': _link('images', 'kept'),
    'pipe': _instead('pipe', os.mkfifo),
    'pipe as manifest': _instead('manifest.json', os.mkfifo),
    'pipe as labels': _instead('labels.csv', os.mkfifo),
    'pipe as croissant': _instead('croissant.json', os.mkfifo),
    'metadata of another kind': lambda s: (s.release / 'metadata.jsonl').write_text(ID),
    'pipe as datasheet': _instead('DATASHEET.md', os.mkfifo),
    'socket': _socket,
    'empty folder of a patient': lambda s: (s.release / PATIENT).mkdir(),
    'folder in images': lambda s: (s.release / 'images' / PATIENT).mkdir(),
    'hidden picture': lambda s: (save_png(s.photograph(), s.release / 'images/.a.png'), s.seal()),
    'hidden file': lambda s: (s.release / '.a').write_text(ID),
    'group table': lambda s: (shutil.copy(s.private / 'groups.csv', s.release), s.seal()),
    'one picture more': lambda s: (
        save_png(s.photograph(), s.release / 'images/bcdfghjk.png'),
        s.seal(),
    ),
    'picture of another suffix': lambda s: (
        s.photograph().save(s.release / 'images/a.jpg'),
        s.seal(),
    ),
    'missing picture': lambda s: s.pictures[0].unlink(),
    'missing picture, not listed': lambda s: (s.pictures[0].unlink(), s.seal()),
    'missing manifest': lambda s: (s.release / 'manifest.json').unlink(),
    'altered picture': lambda s: save_png(s.photograph(), s.pictures[0]),
    'id as a name': _renamed,
    'extended attribute': _attribute,
}
