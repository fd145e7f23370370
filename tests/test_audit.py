"""The independent check of a release: every planted fault is caught, by the check it belongs to."""
import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import load_script
from PIL import Image, PngImagePlugin
from release_fixture import arguments, save_networks, save_photographs

from anonymization.audit import audit_release, png_chunks
from datasets.table import read_table
from utils.errors import UserError
from utils.images import load_rgb, save_png
from utils.io import sha256_file

k_salsa, verify = load_script('k-SALSA'), load_script('verify_release')

FILES = 'files are complete and unaltered'
PICTURES = 'every picture decodes and carries no metadata'
LABELS = 'labels belong to the pictures'
NAMES = 'names and texts hold no source or patient id'
GROUPS = 'every group has at least k distinct patients, groups are disjoint'
TWICE = 'no patient is counted twice in a group'
GRADES = 'grades within groups'
COPIES = 'no release picture is a source picture'


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A verified run over 24 photographs of 12 patients."""
    folder = tmp_path_factory.mktemp('audit')
    save_networks(folder)
    save_photographs(folder / 'data', 24, patients=[f'person{i // 2:02d}z' for i in range(24)])
    k_salsa.main(arguments(folder, folder / 'data', folder / 'run'))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run to spoil, with the photographs where they were."""
    shutil.copytree(finished / 'run', tmp_path / 'run')
    return tmp_path / 'run'


def reseal(run):
    """What a careful insider would do: the manifest lists the spoiled files as they are."""
    release = run / 'release'
    path = release / 'manifest.json'
    manifest = json.loads(path.read_text())
    manifest['files'] = {p.relative_to(release).as_posix(): sha256_file(p)
                         for p in release.rglob('*') if p.is_file() and p != path}
    path.write_text(json.dumps(manifest))


def failed(run, finished):
    table = read_table(finished / 'data/labels.csv', finished / 'data/images')
    audit = audit_release(run / 'release', private=run / 'private', source_table=table)
    return {c.name: c.detail for c in audit.checks if not c.passed}


def first_image(run):
    return sorted((run / 'release/images').iterdir())[0]


def edit_groups(run, change):
    path = run / 'private/groups.csv'
    table = pd.read_csv(path, dtype=str)
    change(table)
    table.to_csv(path, index=False)


def test_untouched_release_passes(run, finished):
    assert failed(run, finished) == {}


def test_source_id_in_a_file_name(run, finished):
    path = first_image(run)
    path.rename(path.with_name('synthetic_eye003x.png'))
    labels = run / 'release/labels.csv'
    labels.write_text(labels.read_text().replace(path.stem, 'synthetic_eye003x'))
    edit_groups(run, lambda t: t.replace({'release_name': {path.stem: 'synthetic_eye003x'}},
                                         inplace=True))
    reseal(run)
    found = failed(run, finished)
    assert list(found) == [NAMES] and 'eye003x' in found[NAMES]


def test_patient_id_in_the_datasheet(run, finished):
    with open(run / 'release/DATASHEET.md', 'a') as file:
        file.write('\nThe nicest picture is of person03z.\n')
    reseal(run)
    assert list(failed(run, finished)) == [NAMES]


def test_png_text_chunk(run, finished):
    info = PngImagePlugin.PngInfo()
    info.add_text('Comment', 'made from eye001x')
    path = first_image(run)
    Image.open(path).copy().save(path, pnginfo=info)
    reseal(run)
    found = failed(run, finished)
    assert list(found) == [PICTURES] and 'tEXt' in found[PICTURES]


def test_exif(run, finished):
    exif = Image.Exif()
    exif[0x010E] = 'eye001x'
    path = first_image(run)
    Image.open(path).copy().save(path, exif=exif)
    reseal(run)
    found = failed(run, finished)
    assert list(found) == [PICTURES] and 'eXIf' in found[PICTURES]


def test_bytes_after_the_picture(run, finished):
    with open(first_image(run), 'ab') as file:
        file.write(b'eye001x')
    reseal(run)
    assert list(failed(run, finished)) == [PICTURES]


def test_group_of_too_few_patients(run, finished):
    def change(table):
        sizes = table.groupby('centers').size()
        rows = table.index[table.centers == sizes.index[0]][:len(table) - 4]
        table.loc[rows[4:], ['centers', 'count_centers', 'release_name']] = ['0', '0', '']
        table.loc[rows[:4], 'count_centers'] = '4'
    edit_groups(run, change)
    found = failed(run, finished)
    assert '4 distinct patients' in found[GROUPS]


def test_patient_counted_twice(run, finished):
    """Swaps one member for the fellow eye of another member of the same group."""
    def change(table):
        group = table.index[table.centers == '1']
        stays, leaves = group[0], group[1]
        fellow = stays ^ 1                      # rows 2i and 2i + 1 are one person
        columns = ['centers', 'release_name', 'count_centers']
        values = table.loc[[fellow, leaves], columns].to_numpy()
        table.loc[leaves, columns], table.loc[fellow, columns] = values[0], values[1]
    edit_groups(run, change)
    found = failed(run, finished)
    assert TWICE in found and 'group 1' in found[TWICE]


def test_photograph_in_two_groups(run, finished):
    path = run / 'private/groups.csv'
    table = pd.read_csv(path, dtype=str)
    again = table[table.centers == '1'].iloc[:1].copy()
    other = table[table.centers == '2'].iloc[0]
    again[['centers', 'release_name']] = [other.centers, other.release_name]
    pd.concat([table, again]).to_csv(path, index=False)
    assert 'in more than one group' in failed(run, finished)[GROUPS]


@pytest.mark.parametrize('disguise', ['as it is', 'JPEG again', 'mirrored', 'upside down',
                                      'resized and brighter'])
def test_source_picture_slipped_in(run, finished, disguise):
    picture = load_rgb(finished / 'data/images/eye007x.png')
    if disguise == 'JPEG again':
        buffer = io.BytesIO()
        picture.save(buffer, format='JPEG', quality=60)
        picture = load_rgb(buffer)
    if disguise == 'mirrored':
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if disguise == 'upside down':
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if disguise == 'resized and brighter':
        u8 = np.asarray(picture.resize((72, 72))).astype(int) + 10
        picture = Image.fromarray(np.clip(u8, 0, 255).astype(np.uint8))
    size = Image.open(first_image(run)).size
    save_png(picture.resize(size), first_image(run))
    reseal(run)
    found = failed(run, finished)
    assert list(found) == [COPIES] and 'eye007x' in found[COPIES]


def test_missing_file(run, finished):
    first_image(run).unlink()
    assert 'missing' in failed(run, finished)[FILES]


def test_altered_file(run, finished):
    path = first_image(run)
    save_png(load_rgb(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT), path)
    found = failed(run, finished)
    assert list(found) == [FILES] and path.name in found[FILES]


def test_foreign_file(run, finished):
    shutil.copy(run / 'private/groups.csv', run / 'release/groups.csv')
    reseal(run)
    assert 'do not belong' in failed(run, finished)[FILES]


def test_wrong_label_and_foreign_column(run, finished):
    path = run / 'release/labels.csv'
    labels = pd.read_csv(path)
    labels['label'] = (labels['label'] + 1) % 5
    labels['age'] = 60
    labels.to_csv(path, index=False)
    reseal(run)
    found = failed(run, finished)
    assert set(found) == {LABELS, GRADES} and 'age' in found[LABELS]


def test_homogeneous_groups_are_said_in_words(run, finished):
    edit_groups(run, lambda t: t.__setitem__('diagnosis', '2'))
    labels = run / 'release/labels.csv'
    pd.read_csv(labels).assign(label=2).to_csv(labels, index=False)
    reseal(run)
    table = read_table(finished / 'data/labels.csv', finished / 'data/images')
    audit = audit_release(run / 'release', private=run / 'private', source_table=table)
    assert audit.passed
    detail = next(c.detail for c in audit.checks if c.name == GRADES)
    assert 'hold one single grade' in detail and 'knows the grade' in detail


def test_command_and_exit_codes(run, finished, capsys):
    release, private = str(run / 'release'), str(run / 'private')
    assert verify.main([release]) == 0
    assert 'need --private' in capsys.readouterr().out
    assert verify.main([release, '--private', private, '--out', str(run / 'v.json')]) == 0
    assert json.loads((run / 'v.json').read_text())['passed'] and (run / 'v.png').exists()
    first_image(run).unlink()
    assert verify.main([release, '--private', private]) == 1
    assert 'FAIL' in capsys.readouterr().out
    with pytest.raises(UserError, match='not the private folder'):
        verify.main([release, '--private', str(run)])
    with pytest.raises(UserError, match='release folder not found'):
        verify.main([str(run / 'nothing')])


def test_png_chunks_need_a_whole_png():
    with pytest.raises(ValueError, match='not a PNG'):
        png_chunks(b'JFIF')
    buffer = io.BytesIO()
    Image.new('RGB', (4, 4)).save(buffer, format='PNG')
    assert png_chunks(buffer.getvalue())[0] == b'IHDR'
    with pytest.raises(ValueError, match='truncated'):
        png_chunks(buffer.getvalue()[:-5])
