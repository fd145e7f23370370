"""Intermediate files of the main job: damaged ones are computed anew or refused, never used."""

import hashlib
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import load_script
from release_fixture import arguments, save_networks, save_photographs, tree_bytes

from anonymization import inversion, pipeline
from models.psp import FrozenPSP, load_psp
from utils.errors import UserError
from utils.images import load_rgb
from utils.io import check_intact, has_seal, is_intact, sealing

k_salsa = load_script('k-SALSA')


class Stop(Exception):
    """Stands for a kill."""


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    """Folders of runs stopped in the inversion, before the optimisation, in it; and finished."""
    folder = tmp_path_factory.mktemp('stopped')
    save_networks(folder)
    save_photographs(folder / 'data', 13)

    def stop(*args, **kwargs):
        raise Stop

    def run(name, module, stage):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            patch.setattr(module, stage, stop)
            k_salsa.main(command(folder, folder / name))

    run('inverting', inversion, '_collect')
    run('grouped', pipeline, 'optimise')
    run('optimised', pipeline, 'write')
    assert k_salsa.main(command(folder, folder / 'whole')) == 0
    return folder


def command(folder, exp_dir):
    return arguments(folder, folder / 'data', exp_dir, test_batch_size=4, group_batch=1)


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def reverse_rows(path):
    np.save(path, np.load(path)[::-1])


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def empty(path):
    path.write_bytes(b'')


def swap(path):
    """Another chunk's file and seal under this one's name."""
    other = path.with_name(path.name.replace('000001', '000000'))
    shutil.copy(other, path)
    shutil.copy(other.with_name(f'{other.name}.sha256'), path.with_name(f'{path.name}.sha256'))


def test_a_run_goes_on_with_another_batch(stopped, tmp_path):
    """As after an inversion that did not fit the memory."""
    shutil.copytree(stopped / 'inverting', tmp_path / 'run')
    assert k_salsa.main([*command(stopped, tmp_path / 'run'), '--test_batch_size=3']) == 0
    assert tree_bytes(tmp_path / 'run/release') == tree_bytes(stopped / 'whole/release')


@pytest.mark.parametrize('harm', [flip_byte, cut, empty, swap, lambda p: p.unlink()])
@pytest.mark.parametrize(
    ('state', 'name'), [('inverting', 'inversion_000001.pt'), ('optimised', 'groups_000001.pt')]
)
def test_damaged_pieces_are_computed_anew(stopped, tmp_path, state, name, harm):
    shutil.copytree(stopped / state, tmp_path / 'run')
    harm(tmp_path / 'run/private/work' / name)
    assert k_salsa.main(command(stopped, tmp_path / 'run')) == 0
    assert tree_bytes(tmp_path / 'run/release') == tree_bytes(stopped / 'whole/release')


@pytest.mark.parametrize(
    ('name', 'harm'),
    [
        ('latents.npy', flip_byte),
        ('latents.npy', reverse_rows),
        ('latents.npy', empty),
        ('latents.npy', lambda p: p.unlink()),
        ('content.npy', flip_byte),
        ('content.npy', cut),
        ('groups.csv', flip_byte),
        ('groups.csv', lambda p: p.unlink()),
    ],
)
@pytest.mark.parametrize('state', ['grouped', 'optimised'])
def test_damaged_results_are_refused_with_a_remedy(stopped, tmp_path, state, name, harm):
    shutil.copytree(stopped / state, tmp_path / 'run')
    path = tmp_path / 'run/private' / name
    harm(path)
    with pytest.raises(UserError, match=f'{name} is (damaged|missing)(.|\n)*remove it and its'):
        k_salsa.main(command(stopped, tmp_path / 'run'))
    path.unlink(missing_ok=True)
    path.with_name(f'{name}.sha256').unlink()
    assert k_salsa.main(command(stopped, tmp_path / 'run')) == 0
    assert tree_bytes(tmp_path / 'run/release') == tree_bytes(stopped / 'whole/release')


def test_group_results_belong_to_what_they_were_computed_from(stopped, tmp_path):
    """Sound results of other latents are not taken for this run's."""
    shutil.copytree(stopped / 'optimised', tmp_path / 'run')
    private = tmp_path / 'run/private'
    latents = np.load(private / 'latents.npy')
    with sealing(private / 'latents.npy'):
        np.save(private / 'latents.npy', latents[::-1])
    assert k_salsa.main(command(stopped, tmp_path / 'run')) == 0
    assert tree_bytes(tmp_path / 'run/release') != tree_bytes(stopped / 'whole/release')


def test_records_tell_the_release(stopped):
    private, release = stopped / 'whole/private', stopped / 'whole/release'
    groups = pd.read_csv(private / 'groups.csv').drop_duplicates('centers').set_index('centers')
    pictures = json.loads((private / 'pictures.json').read_text())
    latents = np.load(private / 'group_latents.npy')
    assert list(pictures) == [groups.release_name[c + 1] for c in range(len(groups))]
    assert latents.shape == (len(groups), 8, 16) and latents.dtype == np.float32
    psp = FrozenPSP(load_psp(stopped / 'psp.pt'))
    for name, w in zip(pictures, torch.from_numpy(latents)):
        u8 = np.asarray(load_rgb(release / f'images/{name}.png'))
        assert hashlib.sha256(u8.tobytes()).hexdigest() == pictures[name]['pixels']
        drawn = psp.decode(w[None])[0].mul(127.5).add(127.5).round().clamp(0, 255)
        assert np.abs(drawn.permute(1, 2, 0).numpy() - u8).max() <= 1
    facts = json.loads((private / 'facts.json').read_text())
    manifest = json.loads((release / 'manifest.json').read_text())
    assert {k: manifest[k] for k in facts['facts']} == facts['facts']
    for name in ('pictures.json', 'group_latents.npy', 'facts.json', 'groups.csv', 'latents.npy'):
        assert is_intact(private / name), name


def test_seals(tmp_path):
    path = tmp_path / 'a.txt'
    with pytest.raises(Stop), sealing(path):
        path.write_text('half')
        raise Stop
    assert not has_seal(path) and not is_intact(path)
    with sealing(path, 'b'):
        path.write_text('whole')
    assert is_intact(path, 'b') and not is_intact(path) and not is_intact(path, 'c')
    digest, name = (tmp_path / 'a.txt.sha256').read_text().splitlines()[0].split()
    assert digest == hashlib.sha256(b'whole').hexdigest() and name == 'a.txt'
    path.write_text('other')
    with pytest.raises(UserError, match='a.txt is damaged(.|\n)*run again'):
        check_intact(path, remedy='run again')
