"""The reading of the photographs: once, on the right side, and noticed when it goes wrong."""

import dataclasses
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from decodes import count_decodes
from PIL import Image
from release_fixture import save_networks, save_photographs, tree_bytes

from anonymization import Networks, OptimizeConfig, Settings, anonymize, job, photographs
from datasets.phantoms.dataset import make_dataset
from datasets.sides import find_disc
from datasets.table import read_table
from utils.errors import PrivacyError, UserError
from utils.images import load_rgb, resize
from utils.io import sealing

SETTINGS = Settings(optimize=OptimizeConfig(n_steps=1, n_crop=2))


@pytest.fixture(scope='module')
def nets(tmp_path_factory):
    folder = tmp_path_factory.mktemp('nets')
    save_networks(folder)
    return folder


def make(nets, data, run, settings=SETTINGS, **options):
    networks = Networks(nets / 'psp.pt', nets / 'content.pt')
    table = read_table(data / 'labels.csv', data / 'images')
    return anonymize(table, networks, settings, run, workers=0, **options)


@pytest.fixture
def decoded(monkeypatch):
    """Sizes of the pictures that were decoded, in a list that grows."""
    return count_decodes(monkeypatch)


@pytest.mark.parametrize('kind', ['png', 'jpg'])
def test_every_photograph_is_decoded_once_and_once_by_the_audit(nets, tmp_path, decoded, kind):
    save_photographs(tmp_path / 'data', 11)  # 40 px, and 32 px pictures in the release
    if kind == 'jpg':
        for path in list((tmp_path / 'data/images').iterdir()):
            load_rgb(path).save(path.with_suffix('.jpg'))
            path.unlink()
        decoded.clear()
    make(nets, tmp_path / 'data', tmp_path / 'run')
    assert decoded.count((40, 40)) == 2 * 11
    make(nets, tmp_path / 'data', tmp_path / 'run')
    assert decoded.count((40, 40)) == 2 * 11  # a finished run is not read again
    shutil.rmtree(tmp_path / 'run/release')
    make(nets, tmp_path / 'data', tmp_path / 'run')
    assert decoded.count((40, 40)) == 3 * 11  # only looked at


def test_reading_goes_on_where_it_stopped(nets, tmp_path, monkeypatch, decoded):
    monkeypatch.setattr(photographs, '_BLOCK', 4)
    save_photographs(tmp_path / 'data', 11)
    make(nets, tmp_path / 'data', tmp_path / 'whole')
    broken = tmp_path / 'data/images/eye009x.png'
    good = broken.read_bytes()
    broken.write_bytes(b'no picture')
    with pytest.raises(UserError, match=r'1 of 11 images cannot be read(.|\n)*eye009x\.png'):
        make(nets, tmp_path / 'data', tmp_path / 'run')
    broken.write_bytes(good)
    decoded.clear()
    make(nets, tmp_path / 'data', tmp_path / 'run')
    assert decoded.count((40, 40)) == 3 + 11  # the block of the bad one, and the audit
    assert tree_bytes(tmp_path / 'run/release') == tree_bytes(tmp_path / 'whole/release')


@pytest.mark.parametrize('finished', [True, False])
def test_changed_photographs_are_named(nets, tmp_path, monkeypatch, finished):
    save_photographs(tmp_path / 'data', 11)
    images = tmp_path / 'data/images'
    if finished:
        make(nets, tmp_path / 'data', tmp_path / 'run')
    else:
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(job, 'run_stages', lambda *_: 1 / 0)
            make(nets, tmp_path / 'data', tmp_path / 'run')
    for path in images.iterdir():  # copied somewhere else: other times, the same bytes
        os.utime(path, ns=(1, 1))
    make(nets, tmp_path / 'data', tmp_path / 'run')
    for name in ('eye002x', 'eye005x'):
        Image.new('RGB', (40, 40), 'red').save(images / f'{name}.png')
    with pytest.raises(UserError, match='2 photographs have changed(.|\n)*eye002x(.|\n)*eye005x'):
        make(nets, tmp_path / 'data', tmp_path / 'run')


def test_frames_that_show_nothing_are_listed_before_the_work(nets, tmp_path, monkeypatch):
    save_photographs(tmp_path / 'data', 11)
    images = tmp_path / 'data/images'
    Image.new('RGB', (40, 40)).save(images / 'eye001x.png')
    Image.new('RGB', (40, 40), 'orange').save(images / 'eye003x.png')
    load_rgb(images / 'eye004x.png').resize((10, 40)).save(images / 'eye005x.png')
    monkeypatch.delattr(job, 'run_stages')
    with pytest.raises(UserError) as error:
        make(nets, tmp_path / 'data', tmp_path / 'run')
    lines = str(error.value).splitlines()
    assert lines[0].startswith('3 of 11 images cannot be read or show no retina')
    assert 'eye001x.png: near-black' in lines[1] and 'eye003x.png: blank' in lines[2]
    assert 'eye005x.png: 10 x 40 px are too few' in lines[3]


def test_damaged_rows_are_refused(nets, tmp_path, monkeypatch):
    save_photographs(tmp_path / 'data', 11)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(job, 'run_stages', lambda *_: 1 / 0)
        make(nets, tmp_path / 'data', tmp_path / 'run')
    pixels = np.lib.format.open_memmap(tmp_path / 'run/private/photographs.npy', mode='r+')
    pixels[7] = pixels[6]
    pixels.flush()
    with pytest.raises(UserError, match='photographs.npy is damaged'):
        make(nets, tmp_path / 'data', tmp_path / 'run')


def test_one_picture_in_two_formats_is_one(nets, tmp_path):
    """A JPEG and a PNG of its pixels: compared whole, though JPEGs are decoded at scale."""
    save_photographs(tmp_path / 'data', 11)
    images = tmp_path / 'data/images'
    large = load_rgb(images / 'eye001x.png').resize((320, 320))
    for name in ('eye001x', 'eye006x'):
        (images / f'{name}.png').unlink()
    large.save(images / 'eye001x.jpg', quality=95)
    load_rgb(images / 'eye001x.jpg').save(images / 'eye006x.png')
    release = make(nets, tmp_path / 'data', tmp_path / 'run')
    assert release.groups.n_left_out == 1 and release.groups.of[6] == -1


# -- sides ----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def phantoms(tmp_path_factory):
    """Both eyes of 24 people, 64 px."""
    folder = tmp_path_factory.mktemp('phantoms')
    make_dataset(folder / 'data', n_patients=24, size=64, seed=5)
    return folder / 'data'


def read(data, private, *, sides, drop=()):
    """Reads the phantoms as the job does."""
    (private / 'work').mkdir(parents=True)
    table = read_table(data / 'labels.csv', data / 'images')
    table = dataclasses.replace(table, **dict.fromkeys(drop))
    return table, photographs.read_photographs(private, table, size=32, sides=sides, threads=1)


def upright(data, name):
    return np.asarray(resize(load_rgb(data / f'images/{name}.png'), 32))


def test_left_eyes_are_mirrored(phantoms, tmp_path):
    table, found = read(phantoms, tmp_path, sides='mirror')
    for i, (name, eye) in enumerate(zip(table.ids, table.eyes)):
        want = upright(phantoms, name)
        want = want[:, ::-1] if eye == 'left' else want
        assert np.array_equal(found[i].permute(1, 2, 0), want), name
    assert found.eyes == table.eyes


def test_without_a_column_the_picture_says_the_side(phantoms, tmp_path):
    table, found = read(phantoms, tmp_path, sides='mirror', drop=['eyes'])
    known = read_table(phantoms / 'labels.csv', phantoms / 'images').eyes
    assert np.mean([a == b for a, b in zip(found.eyes, known)]) > 0.85
    shown = [find_disc(Image.fromarray(x.permute(1, 2, 0).numpy())).x > 0 for x in found]
    assert np.mean(shown) > 0.85


def test_mixed_takes_photographs_as_they_are(phantoms, tmp_path):
    table, found = read(phantoms, tmp_path, sides='mixed', drop=['eyes'])
    assert set(found.eyes) == {''}
    for i, name in enumerate(table.ids):
        assert np.array_equal(found[i].permute(1, 2, 0), upright(phantoms, name))


def test_apart_keeps_sides_in_different_groups(nets, phantoms, tmp_path):
    settings = dataclasses.replace(SETTINGS, sides='apart')
    release = make(nets, phantoms, tmp_path / 'run', settings)
    eyes = np.array(read_table(phantoms / 'labels.csv', phantoms / 'images').eyes)
    assert all(len(set(eyes[rows])) == 1 for rows in release.groups.members)
    text = (release.folder / 'manifest.json').read_text()
    assert '"sides": "apart"' in text and 'left' not in (release.folder / 'labels.csv').read_text()


def test_photographs_that_were_mirrored_before_are_noticed(phantoms, tmp_path):
    shutil.copytree(phantoms, tmp_path / 'data')
    table = pd.read_csv(tmp_path / 'data/labels.csv')
    more = [table]
    for path in (tmp_path / 'data/images').iterdir():  # as dataset_tool.py --one_side does
        if path.stem in set(table.id_code[table.eye == 'left']):
            picture = load_rgb(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            picture.save(path)
            picture.resize((63, 63)).save(path.with_name(f'again-{path.name}'))
    again = table[table.eye == 'left'].assign(id_code=lambda t: 'again-' + t.id_code)
    pd.concat([*more, again]).to_csv(tmp_path / 'data/labels.csv', index=False)
    with pytest.raises(UserError, match='were they mirrored before'):
        read(tmp_path / 'data', tmp_path / 'private', sides='mirror')
    read(tmp_path / 'data', tmp_path / 'other', sides='mixed')


@pytest.mark.parametrize(
    ('column', 'value', 'message'),
    [
        ('eye', 'left', 'taken for an eye of the other side'),
        ('stored', 64 * 'a', 'not given to the networks as the settings say'),
        ('content', 64 * 'a', 'do not have the pixels'),
        ('file', 64 * 'a', 'not those of the run'),
    ],
)
def test_the_audit_looks_again(nets, tmp_path, monkeypatch, column, value, message):
    """A reading that recorded what is not so does not pass."""
    save_photographs(tmp_path / 'data', 11)
    real = job.run_stages

    def lie(run, staging):
        real(run, staging)
        path = run.private / 'photographs.csv'
        table = pd.read_csv(path, keep_default_na=False)
        row = int(np.flatnonzero(table[column] != value)[0])
        table.loc[row, column] = value
        with sealing(path):
            table.to_csv(path, index=False)

    monkeypatch.setattr(job, 'run_stages', lie)
    with pytest.raises(PrivacyError, match=message):
        make(nets, tmp_path / 'data', tmp_path / 'run')


def test_blank_results_are_refused(nets, tmp_path):
    save_photographs(tmp_path / 'data', 11)
    settings = dataclasses.replace(SETTINGS, optimize=OptimizeConfig(n_steps=3, n_crop=2, lr=1e30))
    with pytest.raises(UserError, match='diverged|blank picture'):
        make(nets, tmp_path / 'data', tmp_path / 'run', settings)
    assert not (tmp_path / 'run/release').exists()


def test_a_surplus_is_told_before_the_work(nets, tmp_path, monkeypatch):
    save_photographs(tmp_path / 'data', 12, patients=['many'] * 8 + list('abcd'))
    monkeypatch.delattr(job, 'run_stages')
    with pytest.raises(UserError, match='`policy` together, or `surplus` suppress'):
        make(nets, tmp_path / 'data', tmp_path / 'run')


def test_memory_is_not_shared(nets, tmp_path):
    """A picture that was handed out can be changed without harm."""
    save_photographs(tmp_path / 'data', 3)
    _, found = read(tmp_path / 'data', tmp_path / 'private', sides='mixed')
    found[0].zero_()
    assert found[0].any() and found[0].dtype == torch.uint8
