"""Inversions that runs share: found once, the same bytes, and never those of anything else."""

import dataclasses
import json
import shutil

import pytest
import torch
from release_fixture import save_networks, save_photographs, tree_bytes

from anonymization import Networks, OptimizeConfig, Settings, anonymize, inversion
from anonymization.sharing import RECORD
from datasets.table import read_table
from utils.errors import UserError
from utils.io import load_weights, save_torch

SETTINGS = Settings(k=2, n_iters=2, optimize=OptimizeConfig(n_steps=1, n_crop=2))
N = 8


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Networks, data/, and the run first/, which has left its inversions in shared/."""
    folder = tmp_path_factory.mktemp('made')
    save_networks(folder)
    save_photographs(folder / 'data', N)
    make(folder, 'first')
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / 'copy')


@pytest.fixture
def inverted(monkeypatch):
    """How many photographs were inverted, one number a call."""
    calls, invert = [], inversion.invert

    def counting(psp, x, **options):
        calls.append(len(x))
        return invert(psp, x, **options)

    monkeypatch.setattr(inversion, 'invert', counting)
    return calls


def make(folder, name, *, shared='shared', settings=SETTINGS, **changes):
    """A run in folder/name; its folder."""
    table = read_table(folder / 'data/labels.csv')
    networks = Networks(folder / 'psp.pt', folder / 'content.pt')
    settings = dataclasses.replace(settings, save_reconstructions=True, **changes)
    where = None if shared is None else folder / shared
    anonymize(table, networks, settings, folder / name, workers=0, inversions=where)
    return folder / name


def test_releases_of_the_same_photographs_invert_them_once(folder, inverted):
    alone = make(folder, 'alone', shared=None, k=3, seed=5)
    assert sum(inverted) == N and not (folder / 'fresh').exists()
    inverted.clear()
    make(folder, 'noisy', shared='fresh', start_noise=0.5)
    together = make(folder, 'together', shared='fresh', k=3, seed=5)
    assert sum(inverted) == N
    assert tree_bytes(together / 'release') == tree_bytes(alone / 'release')
    for name in (*inversion.ARRAYS, 'latents.npy.sha256', 'content.npy.sha256'):
        assert (together / 'private' / name).read_bytes() == (alone / 'private' / name).read_bytes()
    pictures = [tree_bytes(run / 'private/reconstructions') for run in (alone, together)]
    assert pictures[0] == pictures[1] and len(pictures[0]) == N
    assert (folder / 'fresh').stat().st_mode & 0o777 == 0o700


def other_photographs(folder):
    """The same files under each other's names."""
    first, second = (folder / f'data/images/eye00{i}x.png' for i in (1, 2))
    bytes_of = first.read_bytes(), second.read_bytes()
    first.write_bytes(bytes_of[1])
    second.write_bytes(bytes_of[0])


def other_networks(folder):
    checkpoint = load_weights(folder / 'psp.pt')
    checkpoint['latent_avg'] = checkpoint['latent_avg'] + torch.tensor(0.1)
    save_torch(folder / 'psp.pt', checkpoint)


@pytest.mark.parametrize(
    ('change', 'settings'),
    [
        (other_photographs, {}),
        (other_networks, {}),
        (None, {'n_iters': 1}),
        (None, {'precision': 'bf16'}),
    ],
)
def test_what_was_found_from_anything_else_is_not_taken(folder, inverted, change, settings):
    if change is not None:
        change(folder)
    make(folder, 'second', **settings)
    assert sum(inverted) == N
    assert len(list((folder / 'shared').iterdir())) == 2


@pytest.mark.parametrize(
    'what', ['latents.npy', 'reconstructions/eye003x.png', 'record', 'foreign']
)
def test_a_damaged_or_foreign_folder_is_refused(folder, inverted, what):
    (own,) = (folder / 'shared').iterdir()
    if what == 'foreign':  # the inversions of other settings under these ones' name
        make(folder, 'second', shared='others', n_iters=1)
        (other,) = (folder / 'others').iterdir()
        own.rename(folder / 'kept')
        other.rename(own)
    elif what == 'record':
        (own / RECORD).write_text('[1]')
    else:
        (own / what).write_bytes((own / what).read_bytes()[:-1] + b'x')
    inverted.clear()
    with pytest.raises(UserError, match='does not hold the inversions that were left there'):
        make(folder, 'third', k=4)
    assert not inverted and not list((folder / 'third/private').glob('latents.npy*'))


def test_what_a_killed_run_left_half_is_not_taken(folder, inverted):
    (own,) = (folder / 'shared').iterdir()
    assert set(json.loads((own / RECORD).read_text())['files']) >= set(inversion.ARRAYS)
    (own / RECORD).unlink()  # it is written last
    (own / 'content.npy').unlink()
    make(folder, 'second', k=4)
    assert sum(inverted) == N and (own / RECORD).exists() and (own / 'content.npy').exists()


@pytest.mark.parametrize('place', ['data/images', 'data/images/shared', 'first/release'])
def test_photographs_and_releases_are_no_place_for_them(folder, place):
    with pytest.raises(UserError, match='`inversions`'):
        make(folder, 'second', shared=place)
    assert not (folder / 'second').exists()
