"""Inverting a folder: files, quality table, refinement that never makes a picture worse."""
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import load_script
from release_fixture import save_networks, save_photographs

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
    flags = {'checkpoint_path': data / 'psp.pt', 'data_path': data / 'data/images',
             'out_dir': out, 'test_batch_size': 2, 'device': 'cpu', **options}
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
