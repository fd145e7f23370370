"""The institution's fields, and a release in the tools of those who receive it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, load_script
from PIL import Image
from release_fixture import arguments, release_facts, save_networks, save_photographs, tree_bytes

from anonymization import job, publish
from anonymization.audit import audit_release, report_text
from anonymization.card import FIELDS, check_names, filled, read_card
from anonymization.release import CROISSANT, README, GroupFacts, describe_anew, write_release
from anonymization.signature import signature_path
from datasets.table import read_table
from utils.errors import UserError

k_salsa = load_script('k-SALSA')
CARD = {
    'pretty_name': 'Augen | Köln: <1> "a"',
    'license': 'cc-by-4.0',
    'creator': 'Eyes & Co.',
    'contact': 'eyes@example.org',
    'url': 'https://example.org/eyes?v=1',
    'citation': '@misc{eyes,\n  title={Eyes}}',
    'date_published': '2026-03-01',
    'version': '1.2.0',
}
COLOURS = {'bcdfghjk': (200, 0, 0), 'mnpqrstv': (0, 200, 0), 'zzxxwwvv': (0, 0, 200)}
GRADES = [(3, 2, 0, 0, 0), (0, 1, 4, 0, 0), (0, 0, 0, 0, 5)]


def make_release(
    folder: Path, card: Path | None = None, *, graded: bool = True, soft_labels: bool = False
) -> Path:
    """A release of three pictures of one colour each, with grades 0, 2 and 4."""
    groups = [
        GroupFacts(name, 5, 5, grades if graded else None) for name, grades in zip(COLOURS, GRADES)
    ]
    write_release(
        folder / 'release',
        groups,
        [(g.name, Image.new('RGB', (8, 8), COLOURS[g.name])) for g in groups],
        facts=release_facts(card),
        soft_labels=soft_labels,
    )
    return folder / 'release'


@pytest.fixture
def card(tmp_path: Path) -> Path:
    path = tmp_path / 'card.yaml'
    path.write_text(yaml.safe_dump(CARD, allow_unicode=True), encoding='utf-8')
    return path


def test_card_as_written(card):
    assert read_card(card) == CARD and list(read_card(card)) == list(FIELDS)
    assert read_card(None) == dict.fromkeys(FIELDS)
    card.write_text('date_published: 2026-03-01\nlicense: https://example.org/licence\n')
    assert {n: v for n, v in read_card(card).items() if v} == {
        'date_published': '2026-03-01',
        'license': 'https://example.org/licence',
    }
    assert filled(read_card(card))['creator'] == '[institution]'


def test_faults_of_a_card_are_listed_together(tmp_path):
    (tmp_path / 'c.yaml').write_text(
        'license: "<b>"\nlicence: mit\nversion: 1.0\nurl: "a b"\n'
        'date_published: 2026-02-30\ncontact: "a\\u200bb"\n'
        'creator: [a, b]\n'
    )
    with pytest.raises(UserError) as error:
        read_card(tmp_path / 'c.yaml')
    lines = str(error.value).splitlines()
    assert '7 fields' in lines[0] and len(lines) == 8
    assert 'licence: no such field (there are pretty_name, license' in lines[2]


@pytest.mark.parametrize('text', [None, '', 'a list', '- a\n', '{', 'a: b: c', '\0'])
def test_files_that_are_no_card(tmp_path, text):
    if text is not None:
        (tmp_path / 'c.yaml').write_text(text)
    with pytest.raises(UserError, match=r'`card` .*c\.yaml .*"field: text"'):
        read_card(tmp_path / 'c.yaml')


def test_a_card_names_nobody(tmp_path):
    (tmp_path / 'c.yaml').write_text('contact: ask person07z. In 2026\n')
    card = read_card(tmp_path / 'c.yaml')
    for ids, patients in ((['person07z', '2026'], None), (['2026'], ['person07z'])):
        with pytest.raises(UserError, match='names photographs or patients(.|\n)*person07z$'):
            check_names(card, ids, patients)
    check_names(card, ['2026', 'person07'], None)


def test_a_finished_release_gets_another_card(tmp_path, card, monkeypatch, capsys):
    """Its pages are written anew, as the run would have written them, and nothing is computed."""
    save_networks(tmp_path)
    save_photographs(tmp_path / 'data', 11)
    command = arguments(tmp_path, tmp_path / 'data', tmp_path / 'run')
    assert k_salsa.main([*command, '--soft_labels']) == 0
    release = tmp_path / 'run/release'
    before = tree_bytes(release)
    signature_path(release).write_bytes(b'x')
    monkeypatch.delattr(job, 'run_stages')
    command = [*command, '--soft_labels', f'--card={card}']
    assert k_salsa.main(command) == 0
    after = tree_bytes(release)
    assert {n for n in before if before[n] != after[n]} == {README, CROISSANT, 'manifest.json'}
    assert before.keys() == after.keys() and b'eyes@example.org' in after[README]
    assert 'sign the release again' in capsys.readouterr().err
    table = read_table(tmp_path / 'data/labels.csv', tmp_path / 'data/images')
    private = tmp_path / 'run/private'
    assert audit_release(release, private=private, source_table=table).passed
    assert not {'staging', 'former_release'} & {p.name for p in private.iterdir()}
    records = tree_bytes(private)
    assert k_salsa.main(command) == 0 and tree_bytes(release) == after
    monkeypatch.setattr(publish, 'publish', lambda *_: 1 / 0)
    card.write_text('creator: me\n')
    with pytest.raises(ZeroDivisionError):
        k_salsa.main(command)
    assert tree_bytes(release) == after
    assert tree_bytes(private)['facts.json'] == records['facts.json']


def test_no_other_card_for_a_release_of_another_version(tmp_path):
    release = make_release(tmp_path)
    path = release / 'manifest.json'
    path.write_text(path.read_text().replace('k-salsa-release-5', 'k-salsa-release-2'))
    with pytest.raises(UserError, match='made by another version'):
        describe_anew(release, tmp_path / 'new', read_card(None))
    assert not (tmp_path / 'new').exists()


def test_same_bytes(tmp_path, card):
    first, again = (make_release(tmp_path / name, card, soft_labels=True) for name in 'ab')
    assert tree_bytes(first) == tree_bytes(again)


@pytest.mark.parametrize('options', [{}, {'graded': False}, {'soft_labels': True}], ids=str)
@pytest.mark.parametrize('with_card', [True, False], ids=['card', 'brackets'])
def test_recipients_find_nothing_wrong(tmp_path, card, with_card, options):
    audit = audit_release(make_release(tmp_path, card if with_card else None, **options))
    assert audit.passed, report_text(audit)


def test_header_of_the_card(tmp_path, card):
    head, body = (
        (make_release(tmp_path / 'a', card) / README).read_text(encoding='utf-8').split('\n---\n')
    )
    header = yaml.safe_load(head)
    assert header['pretty_name'] == CARD['pretty_name'] and header['license'] == 'cc-by-4.0'
    assert header['size_categories'] == ['n<1K']
    assert header['task_categories'] == ['image-classification']
    assert '<1>' not in body and 'Eyes &amp; Co.' in body and '    title={Eyes}}' in body
    card.write_text('license: https://example.org/licence\n')
    release = make_release(tmp_path / 'b', card, graded=False)
    head, body = (release / README).read_text(encoding='utf-8').split('\n---\n')
    header = yaml.safe_load(head)
    assert header['license'] == 'other' and header['license_link'] == 'https://example.org/licence'
    assert header['task_categories'] == ['unconditional-image-generation']
    assert '[institution]' in body and 'timm' not in body and 'label' not in head


# -- in other tools -------------------------------------------------------------------------

# Runs what the card shows, and says what came out: per reader (grade, colour) of each picture.
_READ = """
import json, re, sys
import datasets, mlcroissant

def colour(picture):
    return picture.convert('RGB').getpixel((4, 4))

found, data = {}, None
blocks = re.findall(r'```python\\n(.*?)```', open('release/README.md').read(), re.S)
for name, block in zip(('imagefolder', 'torchvision', 'timm'), blocks):
    place = {'print': lambda shown: None}
    exec(block, place)
    rows = place['data']
    found[name] = [(row['label'], colour(row['image'])) if isinstance(row, dict) else
                   (row[1], colour(row[0])) for row in (rows[i] for i in range(len(rows)))]
named = datasets.load_dataset('./release', split='train')
found['names'] = named.features['label'].names
found['columns'] = named.column_names
croissant = mlcroissant.Dataset('release/croissant.json')
found['errors'] = list(croissant.metadata.ctx.issues.errors)
found['warnings'] = list(croissant.metadata.ctx.issues.warnings)
found['croissant'] = [(r['pictures/label'], colour(r['pictures/image']))
                      for r in croissant.records('pictures')]
print(json.dumps(found))
"""


def read_elsewhere(release: Path) -> dict:
    """What recipients' tools make of `release`, away from this project and from any network."""
    env = {
        **os.environ,
        'HF_HOME': str(release.parent / 'cache'),
        'HF_HUB_OFFLINE': '1',
        'HF_DATASETS_OFFLINE': '1',
    }
    env.pop('PYTHONPATH', None)  # the project's own `datasets` would hide the library
    done = subprocess.run(
        [sys.executable, '-c', _READ],
        cwd=release.parent,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('with_card', [True, False], ids=['card', 'brackets'])
def test_release_in_other_tools(tmp_path, card, with_card):
    release = make_release(tmp_path, card if with_card else None, soft_labels=with_card)
    found = read_elsewhere(release)
    want = [[grade, list(rgb)] for grade, rgb in zip((0, 2, 4), COLOURS.values())]
    for reader in ('imagefolder', 'torchvision', 'timm', 'croissant'):
        assert found[reader] == want, reader
    assert found['names'] == ['none', 'mild', 'moderate', 'severe', 'proliferative']
    shares = [f'p{g}' for g in range(5)] * with_card
    assert found['columns'] == ['image', 'label', *shares]
    assert found['errors'] == []
    missing = [w for w in found['warnings'] if 'datePublished' not in w]
    assert missing == [] and len(found['warnings']) == (not with_card)


def test_croissant_as_written(tmp_path, card):
    text = (make_release(tmp_path / 'a', card) / CROISSANT).read_text(encoding='utf-8')
    found = json.loads(text)
    assert found['conformsTo'].endswith('croissant/1.1')
    assert (
        found['name'],
        found['license'],
        found['url'],
        found['creator']['name'],
        found['datePublished'],
        found['version'],
        found['citeAs'],
    ) == tuple(
        CARD[name]
        for name in (
            'pretty_name',
            'license',
            'url',
            'creator',
            'date_published',
            'version',
            'citation',
        )
    )
    manifest = json.loads((tmp_path / 'a/release/manifest.json').read_text())
    hashes = {f['@id']: f['sha256'] for f in found['distribution'] if 'sha256' in f}
    assert hashes == {n: manifest['files'][n] for n in ('metadata.csv', 'labels.csv')}
    blank = json.loads((make_release(tmp_path / 'b') / CROISSANT).read_text())
    assert 'datePublished' not in blank and blank['license'] == '[licence]'


def test_documented_lines_are_those_of_the_card(tmp_path):
    """Which are run above."""
    shown = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/release.md').read_text(), re.S)
    card = (make_release(tmp_path) / README).read_text(encoding='utf-8')
    assert shown == re.findall(r'```python\n(.*?)```', card, re.S) and len(shown) == 3
