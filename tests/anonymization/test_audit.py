"""The independent check of a release: everything that was altered is caught, without tracebacks."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from audit_memory import remember_pictures
from conftest import ROOT, load_script
from picture_tampering import PAYLOADS, PICTURES, reconstruction
from PIL import Image
from release_fixture import Spoiled, arguments, save_networks, save_photographs
from release_tampering import FACTS, FILES, PATIENT, TEXTS

from anonymization import audit as auditing
from anonymization.audit import audit_release, derive, pictures, recompute, report_dict
from anonymization.audit.checks import report_text
from anonymization.release import OLDER_FORMATS, png_encoder
from datasets.table import read_table
from utils.errors import UserError
from utils.images import load_rgb, save_png

k_salsa, verify = load_script('k-SALSA'), load_script('verify_release')
GROUPS = 'every group has at least k = 5 distinct patients, groups are disjoint'
# Altered where only the records in private/ can tell.
_INVISIBLE = {
    *PICTURES,
    *(n for n in PAYLOADS if n.endswith('low bits')),
    'one wrong grade',
    'policy',
    'clustering',
    'strata',
    'n_suppressed',
    'sizes in images',
    'diversity',
    't-closeness',
    'settings',
    'versions',
    'networks',
    'unit',
    'k lowered',
    'a group below k',
    'sizes in patients',
    'another licence',
    'a patient as contact',
}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A verified run over 24 photographs of 12 patients, two eyes each."""
    folder = tmp_path_factory.mktemp('audit')
    save_networks(folder)
    save_photographs(folder / 'data', 24, patients=[f'person{i // 2:02d}z' for i in range(24)])
    (folder / 'card.yaml').write_text('license: cc-by-4.0\ncontact: "eyes@example.org | Köln"\n')
    k_salsa.main(
        arguments(folder, folder / 'data', folder / 'run')
        + ['--soft_labels', f'--card={folder / "card.yaml"}']
    )
    return folder


def test_the_page_names_all_files_of_a_run(finished):
    page = (ROOT / 'docs' / 'architecture.md').read_text(encoding='utf-8')
    page = page[page.index('## A run folder') : page.index('## A training')]
    named = {name.rstrip('/') for name in re.findall(r'`([\w.]+/?)', page)}
    for part in ('private', 'release'):
        found = {f.name for f in (finished / 'run' / part).iterdir() if f.suffix != '.sha256'}
        assert found <= named, found - named


@pytest.fixture(scope='module', autouse=True)
def remembered():
    with pytest.MonkeyPatch.context() as patch:
        remember_pictures(patch)
        yield


@pytest.fixture
def spoiled(finished, tmp_path):
    """A copy of the run to spoil, with the photographs where they were."""
    shutil.copytree(finished / 'run', tmp_path / 'run')
    return Spoiled(tmp_path / 'run', finished / 'data/images', finished)


def audited(spoiled, **options):
    table = read_table(spoiled.photographs.parent / 'labels.csv', spoiled.photographs)
    return audit_release(spoiled.release, private=spoiled.private, source_table=table, **options)


def failed(audit):
    return {c.name: c.detail for c in audit.checks if not c.passed}


def assert_says_no_id(audit):
    text = report_text(audit) + json.dumps(report_dict(audit))
    assert not re.search(r'eye0|person\d', text)


def test_untouched_release_passes(spoiled):
    audit = audited(spoiled, recompute_n=None)
    assert failed(audit) == {}
    assert audit.facts['recomputed'] == {'n': 4, 'equal': 4, 'largest_difference': 0}
    assert failed(audit_release(spoiled.release)) == {}
    assert_says_no_id(audit)


FAMILIES = {
    'pictures': (PICTURES, pictures.MADE),
    'payloads': (PAYLOADS, pictures.FORM),
    'texts': (TEXTS, auditing.CONTENT),
    'facts': (FACTS, auditing.CONTENT),
    'files': (FILES, auditing.FILES),
}
# Kinds that another check of the family's own catches.
_CAUGHT_BY = {
    **{n: pictures.MADE for n in PAYLOADS if n.endswith('low bits')},
    'altered picture': pictures.MADE,
    'id as a name': GROUPS,
}


@pytest.mark.parametrize(
    ('family', 'kind'),
    [pytest.param(f, k, id=f'{f}: {k}') for f, (kinds, _) in FAMILIES.items() for k in kinds],
)
def test_tampering_is_caught(spoiled, family, kind):
    kinds, check = FAMILIES[family]
    try:
        kinds[kind](spoiled)
    except OSError as error:
        if kind != 'extended attribute':
            raise
        pytest.skip(f'the file system knows no extended attributes: {error.strerror}')
    audit = audited(spoiled)
    assert _CAUGHT_BY.get(kind, check) in failed(audit), failed(audit)
    assert_says_no_id(audit)
    alone = audit_release(spoiled.release)
    assert alone.passed == (kind in _INVISIBLE), failed(alone)
    assert_says_no_id(alone)


def test_enough_kinds_of_tampering():
    assert sum(len(kinds) for kinds, _ in FAMILIES.values()) >= 140


def test_pictures_of_another_encoder(spoiled):
    """Where another library compressed them, their bytes are not compared, and it says so."""
    PAYLOADS['other compression'](spoiled)
    seen = pictures.look_at(spoiled.release, [p.stem for p in spoiled.pictures], 32)
    assert not pictures.check_form(seen, png_encoder()).passed
    check = pictures.check_form(seen, 'pillow 9.9, zlib 1.1')
    assert check.passed and '1 could not be compared byte by byte' in check.detail


# -- private records altered too ------------------------------------------------------------


def edit(spoiled, name, change):
    """Alters a sealed JSON record in private/ and seals it again."""
    path = spoiled.private / name
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=2) + '\n')
    spoiled.reseal_private(name)


def record_as_made(spoiled):
    """pictures.json says of the pictures that are there that the optimisation made them."""

    def change(recorded):
        for path in spoiled.pictures:
            recorded[path.stem] = {'pixels': pictures.pixel_digest(np.asarray(load_rgb(path)))}

    edit(spoiled, 'pictures.json', change)


@pytest.mark.parametrize(
    'kind',
    [
        'gamma 0.4',
        'JPEG 3',
        'thumbnail',
        'all black',
        'two pictures swapped',
        'mean of two eyes of one person',
    ],
)
def test_pictures_synthesised_anew(spoiled, kind):
    PICTURES[kind](spoiled)
    record_as_made(spoiled)
    assert pictures.MADE not in failed(audited(spoiled))
    assert recompute.RECOMPUTED in failed(audited(spoiled, recompute_n=None))


@pytest.mark.parametrize('rows', [[7], [6, 7]], ids=['one photograph', 'two eyes'])
def test_latent_of_one_person_in_place_of_a_groups(spoiled, rows):
    """All of it consistent: latent, digest, picture, manifest."""
    number = json.loads((spoiled.private / 'pictures.json').read_text())
    first = list(number).index(spoiled.pictures[0].stem)
    path = spoiled.private / 'group_latents.npy'
    latents = np.load(path)
    latents[first] = np.load(spoiled.private / 'latents.npy')[rows].mean(0)
    np.save(path, latents)
    spoiled.reseal_private('group_latents.npy')
    save_png(reconstruction(spoiled, rows), spoiled.pictures[0])
    record_as_made(spoiled)
    spoiled.seal()
    audit = audited(spoiled, recompute_n=None)
    assert list(failed(audit)) == [recompute.ONE_PERSON]
    assert_says_no_id(audit)


def test_some_pictures_synthesised_anew(spoiled):
    assert audited(spoiled, recompute_n=2).facts['recomputed']['n'] == 2


@pytest.mark.parametrize('name', ['groups.csv', 'pictures.json', 'group_latents.npy', 'facts.json'])
def test_checksums_of_private_records(spoiled, name):
    path = spoiled.private / name
    path.with_name(f'{name}.sha256').write_text(64 * '0' + f'  {name}\n')
    assert list(failed(audited(spoiled))) == [derive.RECORDS]
    path.with_name(f'{name}.sha256').unlink()
    assert list(failed(audited(spoiled))) == [derive.RECORDS]


@pytest.mark.parametrize(
    'name',
    [
        'groups.csv',
        'pictures.json',
        'group_latents.npy',
        'facts.json',
        'options.json',
        'latents.npy',
    ],
)
@pytest.mark.parametrize(
    'damage', ['missing', 'empty', 'list', 'deep', 'cut', 'pipe', 'folder', 'no numbers']
)
def test_damaged_private_record(spoiled, name, damage):
    path = spoiled.private / name
    data = path.read_bytes()
    path.unlink()
    if damage == 'folder':
        path.mkdir()
    elif damage == 'pipe':
        os.mkfifo(path)
    elif damage != 'missing':
        path.write_bytes(
            {
                'empty': b'',
                'list': b'[]',
                'deep': b'[' * 100_000,
                'cut': data[: len(data) // 2],
                'no numbers': data[:-4] + b'\0\0\xc0\x7f',  # ends with a float32 that is none
            }[damage]
        )
    with pytest.raises(UserError, match=name.replace('.', r'\.')):
        audited(spoiled)


def edit_groups(spoiled, change):
    path = spoiled.private / 'groups.csv'
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    changed = change(table)
    (table if changed is None else changed).to_csv(path, index=False)
    spoiled.reseal_private('groups.csv')


def test_group_of_too_few_patients(spoiled):
    def change(table):
        rows = table.index[table.centers == '1']
        table.loc[rows[4:], ['centers', 'count_centers', 'release_name']] = ['0', '0', '']
        table.loc[rows[:4], 'count_centers'] = '4'

    edit_groups(spoiled, change)
    audit = audited(spoiled)
    assert '4 distinct patients' in failed(audit)[GROUPS]
    assert_says_no_id(audit)
    assert any('eye0' in text for c in audit.checks for text in c.private)


def test_patient_counted_twice(spoiled):
    """Swaps one member for the fellow eye of another member of the same group."""

    def change(table):
        group = table.index[table.centers == '1']
        stays, leaves = group[0], group[1]
        fellow = stays ^ 1  # rows 2i and 2i + 1 are one person
        columns = ['centers', 'release_name', 'count_centers']
        values = table.loc[[fellow, leaves], columns].to_numpy()
        table.loc[leaves, columns], table.loc[fellow, columns] = values[0], values[1]

    edit_groups(spoiled, change)
    assert 'group 1' in failed(audited(spoiled))[derive.TWICE]


@pytest.mark.parametrize(
    ('change', 'check'),
    [
        (lambda t: t.assign(patient_id='person00z'), derive.RECORDS),
        (lambda t: t.assign(diagnosis='2'), derive.RECORDS),
        (lambda t: t.assign(id_code=t.id_code[::-1].to_numpy()), derive.RECORDS),
        (lambda t: t.assign(id_code=[t.id_code[1], *t.id_code[1:]]), GROUPS),
        (lambda t: t.assign(count_centers='9'), GROUPS),
        (lambda t: t.assign(release_name=t.release_name.where(t.index > 0, 'bcdfghjk')), GROUPS),
        (lambda t: t.replace(t.release_name[0], 'bcdfghjk'), GROUPS),
    ],
    ids=['patients', 'grades', 'order of ids', 'id twice', 'counts', 'a name', 'a name throughout'],
)
def test_group_table_altered(spoiled, change, check):
    edit_groups(spoiled, change)
    assert check in failed(audited(spoiled))


@pytest.mark.parametrize(
    'change',
    [
        lambda t: t.iloc[1:],
        lambda t: t.assign(centers='0'),
        lambda t: t.assign(centers='x'),
        lambda t: t.replace({'centers': {'1': '9'}}),
        lambda t: t.replace({'centers': {'1': '-1'}}),
        lambda t: t.drop(columns='patient_id'),
        lambda t: pd.concat([t, t.iloc[:1]]),
    ],
    ids=['row less', 'no group', 'text', 'gap', 'negative', 'no patients', 'row more'],
)
def test_group_table_that_is_none(spoiled, change):
    edit_groups(spoiled, change)
    with pytest.raises(UserError, match='groups.csv'):
        audited(spoiled)


def test_identical_photographs_are_found_in_the_files(spoiled, tmp_path):
    """Two patients with one photograph are one person, whatever table and record say."""
    data = tmp_path / 'data'
    shutil.copytree(spoiled.photographs.parent, data)
    groups = pd.read_csv(spoiled.private / 'groups.csv')
    first = groups.id_code[groups.centers == 1].tolist()
    other = groups.id_code[groups.centers == 2].tolist()
    shutil.copy(data / f'images/{first[0]}.png', data / f'images/{first[1]}.png')
    spoiled = spoiled._replace(photographs=data / 'images')
    found = failed(audited(spoiled))
    assert 'not those of the run' in found[derive.RECORDS] and 'group 1' in found[derive.TWICE]
    Image.open(data / f'images/{first[0]}.png').save(
        data / f'images/{other[0]}.png', compress_level=1
    )
    assert 'identical photographs are in more than one group' in failed(audited(spoiled))[GROUPS]


@pytest.mark.parametrize(
    'change',
    [{'license': 'NO LICENCE'}, {'notes': 'x'}, {'contact': f'ask {PATIENT}, please'}],
    ids=['form', 'field', 'patient'],
)
def test_card_in_the_record(spoiled, change):
    edit(spoiled, 'facts.json', lambda facts: facts['facts']['card'].update(change))
    audit = audited(spoiled)
    assert 'the card' in failed(audit)[auditing.CONTENT]
    assert_says_no_id(audit)


# -- the diagnostic of copies ---------------------------------------------------------------


# -- the command ----------------------------------------------------------------------------


def test_command_and_exit_codes(spoiled, capsys):
    release, private = str(spoiled.release), str(spoiled.private)
    assert verify.main([release]) == 0
    assert 'with the private folder' in capsys.readouterr().out
    out = spoiled.run / 'v.json'
    assert (
        verify.main(
            [
                release,
                '--private',
                private,
                '--recompute',
                'all',
                '--device',
                'cpu',
                '--out',
                str(out),
            ]
        )
        == 0
    )
    assert json.loads(out.read_text())['passed'] and out.with_suffix('.png').exists()
    (spoiled.release / PATIENT).mkdir()
    assert verify.main([release, '--private', private, '--out', str(out)]) == 1
    shown = capsys.readouterr().out
    assert 'FAIL' in shown and PATIENT not in shown and PATIENT not in out.read_text()
    assert PATIENT in (spoiled.private / 'audit.json').read_text()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--private', 'RUN'], 'not the private folder'),
        (['--recompute', '2'], 'needs --private'),
        (['--recompute', 'all'], 'needs --private'),
        (['--df', 'x.csv'], 'needs --private'),
        (['--signature', 'x.sig'], 'needs --public_key'),
        (
            [
                '--private',
                'PRIVATE',
                '--recompute',
                '1',
                '--device',
                'cpu',
                '--checkpoint_path',
                'NONE',
            ],
            'not the checkpoint of the run',
        ),
    ],
    ids=lambda v: ' '.join(v) if isinstance(v, list) else '',
)
def test_wrong_flags(spoiled, flags, message):
    words = {'RUN': spoiled.run, 'PRIVATE': spoiled.private, 'NONE': spoiled.run / 'none.pt'}
    with pytest.raises(UserError, match=message):
        verify.main([str(spoiled.release), *(str(words.get(f, f)) for f in flags)])


@pytest.mark.parametrize('form', OLDER_FORMATS)
@pytest.mark.parametrize('private', [False, True])
def test_release_of_an_older_version(spoiled, form, private):
    spoiled.seal({**spoiled.manifest(), 'format': form})
    with pytest.raises(UserError, match=f'format {form} of an older version.*with that version'):
        verify.main([str(spoiled.release), *(['--private', str(spoiled.private)] * private)])


def test_no_release(tmp_path):
    (tmp_path / 'run/release').mkdir(parents=True)
    with pytest.raises(UserError, match=r'run is no release: .* or pictures$'):
        verify.main([str(tmp_path / 'run')])
    (tmp_path / 'run/release/manifest.json').touch()
    with pytest.raises(UserError, match='did you mean .*run/release'):
        verify.main([str(tmp_path / 'run')])
    with pytest.raises(UserError, match='release folder not found'):
        verify.main([str(Path('nowhere'))])
