"""Inverting a folder: files, quality table, refinement that never makes a picture worse."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import load_script
from release_fixture import save_networks, save_photographs, tree_bytes

from models.psp import load_psp, refine
from utils.errors import UserError

script = load_script('invert')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('invert')
    save_networks(folder)
    save_photographs(folder / 'data', 5)
    return folder


def command(data, out, **options):
    flags = {
        'checkpoint_path': data / 'psp.pt',
        'data_path': data / 'data/images',
        'out_dir': out,
        'test_batch_size': 2,
        'device': 'cpu',
        **options,
    }
    return [f'--{k}={v}' for k, v in flags.items()]


def test_folder_is_inverted_and_refined(data, tmp_path):
    assert script.main(command(data, tmp_path / 'out', refine=20, refine_above=0)) == 0
    table = pd.read_csv(tmp_path / 'out/quality.csv')
    latents = np.load(tmp_path / 'out/latents.npy')
    assert latents.shape == (5, 8, 16) and len(table) == 5
    assert (table.mse_refined <= table.mse_5).all() and (table.gain > 0).any()
    psp = load_psp(data / 'psp.pt')
    from utils.images import load_tensor

    x = torch.stack([load_tensor(data / 'data/images' / n, 32) for n in table.image])
    with torch.no_grad():
        error = (psp.pool(psp.decode(torch.from_numpy(latents))) - x).square().mean((1, 2, 3))
    assert np.allclose(error.numpy(), table.mse_refined, rtol=1e-4)
    assert len(list((tmp_path / 'out/reconstructions').iterdir())) == 5
    assert not (tmp_path / 'out/work').exists()
    assert script.main(command(data, tmp_path / 'out', refine=20, refine_above=0)) == 0
    with pytest.raises(UserError, match='refine'):
        script.main(command(data, tmp_path / 'out', refine=21, refine_above=0))


class Stop(Exception):
    """Stands for a kill."""


def test_damaged_pieces_are_computed_anew(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise Stop

    flags = {'n_iters_per_batch': 2, 'refine': 2, 'refine_above': 0}
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(script, 'draw', stop)  # when all pieces are there
        script.main(command(data, tmp_path / 'stopped', **flags))
    assert script.main(command(data, tmp_path / 'whole', **flags)) == 0
    want = {k: v for k, v in tree_bytes(tmp_path / 'whole').items() if 'options' not in str(k)}

    def flip_byte(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def replace(path: Path) -> None:  # by another, sound piece and its seal
        for suffix in ('', '.sha256'):
            shutil.copy(f'{path}{suffix}'.replace('0000002', '0000000'), f'{path}{suffix}')

    for harm in (flip_byte, replace, lambda p: p.write_bytes(p.read_bytes()[:-7])):
        out = Path(shutil.copytree(tmp_path / 'stopped', tmp_path / harm.__name__.strip('<>')))
        for name in ('batch_0000002.pt', 'refined_0000002.pt'):
            harm(out / 'work' / name)
        assert script.main(command(data, out, **flags)) == 0
        got = tree_bytes(out)
        assert {k: got[k] for k in want} == want, harm


def test_other_photographs_under_the_same_names_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise Stop

    monkeypatch.setattr(script, 'encode', stop)
    with pytest.raises(Stop):
        script.main(command(data, tmp_path / 'out'))
    photos = Path(shutil.copytree(data / 'data/images', tmp_path / 'photos'))
    with pytest.raises(Stop):  # moved, but the same
        script.main(command(data, tmp_path / 'out', data_path=photos))
    first, second, *_ = sorted(photos.iterdir())
    shutil.copy(first, second)
    with pytest.raises(UserError, match='images'):
        script.main(command(data, tmp_path / 'out', data_path=photos))


def test_refinement_keeps_the_best(data):
    psp = load_psp(data / 'psp.pt')
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    ws = psp.latent_avg.expand(2, -1, -1)
    with torch.no_grad():
        before = (psp.pool(psp.decode(ws)) - x).square().mean((1, 2, 3))
    wild, after = refine(psp, x, ws, n_steps=5, lr=1e3)
    assert (after <= before + 1e-6).all() and wild.shape == ws.shape


def test_damaged_photographs_are_listed(data, tmp_path):
    save_photographs(tmp_path / 'bad', 3)
    (tmp_path / 'bad/images/eye001x.png').write_text('x')
    with pytest.raises(UserError, match='1 of 3 images(.|\n)*eye001x'):
        script.main(command(data, tmp_path / 'out', data_path=tmp_path / 'bad/images'))
    assert not (tmp_path / 'out').exists()
