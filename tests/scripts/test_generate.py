"""Pictures from a generator: seeds, truncation, mixing, interpolation, files and refusals."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image

from models.stylegan2 import Generator
from models.stylegan2.checkpoint import load_generator
from models.stylegan2.sampling import loop_styles, mix_styles, render, seed_latents, seed_styles
from scripts import generate
from utils.errors import UserError
from utils.images import load_rgb, load_tensor, to_uint8
from utils.io import save_torch

SMALL = {4: 8, 8: 8, 16: 8, 32: 8}


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    torch.manual_seed(0)
    net = Generator(32, style_dim=16, n_mlp=2, channels=SMALL)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name.endswith('noise.weight'):
                value.fill_(0.3)
    path = tmp_path_factory.mktemp('net') / 'g.pt'
    save_torch(path, {'g_ema': net.state_dict(), 'latent_avg': net.mean_latent(1000)})
    return path


@pytest.fixture
def run(network, tmp_path):
    def call(*options):
        out = tmp_path / 'out'
        assert (
            generate.main(
                ['--network', str(network), '--outdir', str(out), '--device', 'cpu', *options]
            )
            == 0
        )
        return out

    return call


def pixels(path):
    return to_uint8(load_tensor(path, 32)).int()


def shown(sheet, row, column):
    """The [32, 32, 3] cell of a contact sheet with 2 pixels between pictures."""
    array = np.asarray(Image.open(sheet)).astype(int)
    y, x = 2 + 34 * row, 2 + 34 * column
    return torch.from_numpy(array[y : y + 32, x : x + 32]).permute(2, 0, 1)


def test_seed_latents_are_the_original_ones():
    # The first draws of MT19937 seeded with 0 and 7, as numpy has given them since 1.0.
    want = torch.tensor([[1.7640523, 0.4001572], [1.6905257, -0.46593738]])
    assert torch.allclose(seed_latents([0, 7], 2), want)


def test_samples(run, network):
    out = run('--seeds', '0-2,9')
    assert sorted(p.name for p in out.iterdir()) == [
        'grid.png',
        'seed0000.png',
        'seed0001.png',
        'seed0002.png',
        'seed0009.png',
    ]
    net, _ = load_generator(network)
    want = to_uint8(net(seed_latents([9], 16)))[0].int()
    assert (pixels(out / 'seed0009.png') - want).abs().max() <= 1
    with Image.open(out / 'seed0009.png') as picture:
        assert picture.info == {}
    assert torch.equal(shown(out / 'grid.png', 0, 3), pixels(out / 'seed0009.png'))


def test_truncation_sweep(run, network):
    out = run('--seeds', '3,4', '--trunc', '0,0.5,1')
    names = {p.name for p in out.glob('seed*')}
    assert names == {f'seed000{s}-trunc{t}.png' for s in (3, 4) for t in ('0.00', '0.50', '1.00')}
    first, second = (pixels(out / f'seed000{s}-trunc0.00.png') for s in (3, 4))
    assert (first - second).abs().max() <= 1  # psi 0: everybody is the mean
    assert (pixels(out / 'seed0003-trunc1.00.png') - first).abs().max() > 10
    assert torch.equal(shown(out / 'grid.png', 1, 1), pixels(out / 'seed0004-trunc0.50.png'))
    net, mean = load_generator(network)
    half = net(seed_latents([4], 16), truncation=0.5, truncation_latent=mean)
    assert (pixels(out / 'seed0004-trunc0.50.png') - to_uint8(half)[0].int()).abs().max() <= 1


def test_style_mixing(run, network):
    out = run('--rows', '1,2', '--cols', '5-7', '--styles', '0-2', '--trunc', '0.8')
    sheet = out / 'grid.png'
    assert [p.name for p in out.iterdir()] == ['grid.png']
    assert load_rgb(sheet).size == (4 * 34 + 2, 3 * 34 + 2)
    net, mean = load_generator(network)
    ws = seed_styles(net, [2, 6], psi=0.8, latent_avg=mean)
    mixed = torch.cat([ws[1, :3], ws[0, 3:]])[None]
    want = to_uint8(net.synthesis(torch.cat([ws, mixed]))).int()
    for (row, column), picture in zip([(2, 0), (0, 2), (2, 2)], want):
        assert (shown(sheet, row, column) - picture).abs().max() <= 1
    assert shown(sheet, 0, 0).max() == 0
    same = mix_styles(ws[:1], ws[1:], list(range(net.n_latent)))
    assert torch.equal(same, ws[1:])


def test_interpolation_files(run):
    out = run('--seeds', '1,2', '--interpolate', 'webp', '--frames', '4', '--fps', '10')
    with Image.open(out / 'interpolation.webp') as film:
        assert film.n_frames == 8 and film.size == (32, 32)
    run('--seeds', '1,2', '--interpolate', 'gif', '--frames', '3')
    with Image.open(out / 'interpolation.gif') as film:
        assert film.n_frames == 6
    run('--seeds', '1,2', '--interpolate', 'frames', '--frames', '3', '--noise_mode', 'random')
    assert len(list(out.glob('frame*.png'))) == 6
    run('--seeds', '1,2', '--noise_mode', 'none')
    run(
        '--seeds',
        '1,2',
        '--interpolate',
        'frames',
        '--frames',
        '3',
        '--noise_mode',
        'none',
        '--overwrite',
    )
    assert (pixels(out / 'frame00003.png') - pixels(out / 'seed0002.png')).abs().max() <= 1


def test_loop_is_closed_and_smooth():
    ws = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    path = loop_styles(ws, 20)
    assert torch.allclose(path[::20], ws, atol=1e-6)
    steps = (torch.roll(path, -1, 0) - path).flatten(1).norm(dim=1)
    turns = (torch.roll(steps, -1) - steps).abs()
    assert turns.max() < 0.2 * steps.max()  # no jerk anywhere, the seam included


def test_random_noise_belongs_to_the_seed_not_the_batch(network):
    net, _ = load_generator(network)
    ws = seed_styles(net, [1, 2, 3])
    first = torch.stack(list(render(net, ws, noise='random', seeds=[1, 2, 3], batch=3)))
    second = torch.stack(list(render(net, ws[1:], noise='random', seeds=[2, 3], batch=1)))
    assert torch.allclose(first[1:], second, atol=1e-5)
    third = torch.stack(list(render(net, ws, noise='random', seeds=[4, 5, 6])))
    assert (first - third).abs().max() > 0.05


def test_projected_latents(run, network, tmp_path):
    net, _ = load_generator(network)
    ws = seed_styles(net, [4, 5]).numpy()
    np.savez(tmp_path / 'w.npz', w=ws)
    np.save(tmp_path / 'w.npy', ws[1])
    out = run('--projected_w', str(tmp_path / 'w.npz'))
    assert (out / 'latent0001.png').exists()
    run('--projected_w', str(tmp_path / 'w.npy'), '--overwrite')
    run('--seeds', '5', '--overwrite')
    assert (pixels(out / 'latent0000.png') - pixels(out / 'seed0005.png')).abs().max() <= 1


def test_existing_pictures_are_kept(run):
    out = run('--seeds', '1')
    before = (out / 'seed0001.png').read_bytes()
    with pytest.raises(UserError, match=r'seed0001.png already exists.*--overwrite'):
        run('--seeds', '1', '--trunc', '0.3')
    assert (out / 'seed0001.png').read_bytes() == before
    run('--seeds', '1', '--trunc', '0.3', '--overwrite')
    assert (out / 'seed0001.png').read_bytes() != before


@pytest.mark.parametrize(
    'options,words',
    [
        ([], 'exactly one'),
        (['--seeds', '1', '--rows', '1', '--cols', '2'], 'exactly one'),
        (['--rows', '1'], 'both'),
        (['--seeds', '1,1'], 'a value twice'),
        (['--seeds', '1', '--trunc', '0.5,0.504'], 'a value twice'),
        (['--seeds', '1', '--interpolate', 'gif'], 'two seeds'),
        (['--seeds', '1,2', '--interpolate', 'gif', '--trunc', '0.5,1'], 'sweep'),
        (['--rows', '1', '--cols', '2', '--styles', '0-8'], 'layers 0-7'),
        (['--projected_w', 'none.npz'], 'no such file'),
        (['--projected_w', 'none.npz', '--trunc', '0.5'], 'as they are'),
    ],
)
def test_bad_options(run, options, words):
    with pytest.raises(UserError, match=words):
        run(*options)


def test_bad_latents_and_networks(run, tmp_path):
    np.save(tmp_path / 'w.npy', np.zeros((3, 5), np.float32))
    with pytest.raises(UserError, match=r'shape \[3, 5\]'):
        run('--projected_w', str(tmp_path / 'w.npy'))
    np.savez(tmp_path / 'w.npz', latents=np.zeros(3))
    with pytest.raises(UserError, match='an array "w"'):
        run('--projected_w', str(tmp_path / 'w.npz'))
    np.save(tmp_path / 'w.npy', np.full((8, 16), np.nan, np.float32))
    with pytest.raises(UserError, match='not finite'):
        run('--projected_w', str(tmp_path / 'w.npy'))
    with pytest.raises(UserError, match='not found'):
        generate.main(['--network', str(tmp_path / 'no.pt'), '--outdir', 'x', '--seeds', '1'])


@pytest.mark.parametrize('text', ['', '1-', 'a', '1,,2', '-3', '5-2', '4294967296'])
def test_bad_number_lists(text):
    with pytest.raises(argparse.ArgumentTypeError):
        generate.number_list(text)


def test_number_lists():
    assert generate.number_list('0,3,5-7') == [0, 3, 5, 6, 7]
    with pytest.raises(argparse.ArgumentTypeError):
        generate.psi_list('0.5,x')
