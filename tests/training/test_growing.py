"""Growing: a larger generator and discriminator that start from those of half the size."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_script
from PIL import Image

from models.stylegan2 import Discriminator, Generator
from training.stylegan2_growing import grow_discriminator, grow_generator
from utils.errors import UserError
from utils.io import load_weights, save_torch

SMALL = {4: 8, 8: 8, 16: 8, 32: 4}
LARGE = {**SMALL, 64: 4}


def generator(size: int, channels: dict[int, int], seed: int = 0) -> Generator:
    torch.manual_seed(seed)
    net = Generator(size, style_dim=16, n_mlp=2, channels=channels)
    for layer in [net.conv1, *net.convs]:
        layer.noise.weight.data.fill_(0.1)
    return net.requires_grad_(False)


@pytest.mark.parametrize('noise', ['none', 'stored'])
def test_pictures_start_as_the_smaller_ones_enlarged(noise: str) -> None:
    small, large = generator(32, SMALL), generator(64, LARGE, seed=1)
    before = copy.deepcopy(large.state_dict())
    grow_generator(large, small.state_dict(), source='f')
    ws = torch.randn(2, large.n_latent, 16)
    wanted = large.to_rgbs[-1].upsample(small.synthesis(ws[:, :-2], noise=noise), up=2, pad=(2, 1))
    assert torch.allclose(large.synthesis(ws, noise=noise), wanted, atol=1e-5)
    z = torch.randn(3, 16)
    assert torch.equal(large.mapping(z), small.mapping(z))
    # The new block itself is as initialised, so that there is something to learn with.
    assert torch.equal(large.convs[-1].conv.weight, before['convs.7.conv.weight'])


def test_discriminator_starts_as_the_smaller_one_behind_a_reduction_by_half() -> None:
    torch.manual_seed(0)
    small = Discriminator(32, channels=SMALL).requires_grad_(False)
    large = Discriminator(64, channels=LARGE).requires_grad_(False)
    grow_discriminator(large, small.state_dict(), source='f')
    x = torch.rand(4, 3, 64, 64) * 2 - 1
    halved = large.convs[1].skip[0](small.convs[0](x), down=2, pad=(1, 1))
    assert torch.allclose(large.convs[:2](x), halved, atol=1e-6)
    smooth = torch.nn.functional.interpolate(torch.rand(4, 3, 4, 4), size=64, mode='bilinear')
    logits = small(torch.nn.functional.avg_pool2d(smooth, 2))
    assert torch.allclose(large(smooth), logits, atol=0.1 * float(logits.std()) + 0.05)


def test_other_widths_leave_the_new_blocks_as_they_are() -> None:
    torch.manual_seed(0)
    small = Discriminator(32, channels=SMALL)
    large = Discriminator(64, channels={**SMALL, 64: 2})
    before = copy.deepcopy(large.state_dict())
    grow_discriminator(large, small.state_dict(), source='f')
    after, old = large.state_dict(), small.state_dict()
    for name in ('convs.0.0.weight', 'convs.1.skip.1.weight', 'convs.1.conv2.1.weight'):
        assert torch.equal(after[name], before[name])
    assert torch.equal(after['convs.2.conv1.0.weight'], old['convs.1.conv1.0.weight'])
    assert torch.equal(after['final_conv.0.weight'], old['final_conv.0.weight'])


def test_networks_that_do_not_fit_are_named() -> None:
    small = generator(32, SMALL)
    with pytest.raises(UserError, match='`grow` x.pt: holds networks of 32 px with channels'):
        grow_generator(generator(64, {**LARGE, 32: 8}), small.state_dict(), source='`grow` x.pt')
    with pytest.raises(UserError, match='grows from 64 px'):
        grow_generator(generator(128, {**LARGE, 128: 4}), small.state_dict(), source='f')
    deeper = Generator(64, style_dim=16, n_mlp=3, channels=LARGE)
    with pytest.raises(UserError, match='`map_depth`'):
        grow_generator(deeper, small.state_dict(), source='f')


def archive(folder: Path, size: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        small = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((size, size)).save(folder / f'img{i:08d}.png')
    return folder


def test_command_grows_and_resumes_exactly(tmp_path: Path) -> None:
    main = load_script('train_stylegan2_ada').main
    flags = ['--cfg=small', '--batch=4', '--device=cpu', '--aug=noaug', '--cbase=256', '--cmax=8']
    main(
        [
            *flags,
            '--data',
            str(archive(tmp_path / 'a32', 32)),
            '--outdir',
            str(tmp_path / 'r32'),
            '--kimg=0.004',
        ]
    )
    (first,) = (tmp_path / 'r32').iterdir()
    snapshot = first / 'network-snapshot-00000.004.pt'
    grown = [*flags, '--data', str(archive(tmp_path / 'a64', 64)), '--grow', str(snapshot)]
    main([*grown, '--outdir', str(tmp_path / 'straight'), '--kimg=0.016'])
    main([*grown, '--outdir', str(tmp_path / 'parts'), '--kimg=0.008'])
    (run_dir,) = (tmp_path / 'parts').iterdir()
    assert '-grow' in run_dir.name
    main(['--resume', str(run_dir), '--kimg=0.016'])
    (straight,) = (tmp_path / 'straight').iterdir()
    name = 'network-snapshot-00000.016.pt'
    one, two = load_weights(straight / name), load_weights(run_dir / name)
    for part in ('g', 'g_ema', 'd'):
        assert all(torch.equal(one[part][key], two[part][key]) for key in one[part]), part
    # The mapping network started as the smaller run's, four small steps ago.
    old = load_weights(snapshot)['g']['style.1.weight']
    assert (one['g']['style.1.weight'] - old).abs().mean() < 0.3 * old.abs().mean()
    with pytest.raises(UserError, match='choose one'):
        main([*grown, '--outdir', str(tmp_path / 'x'), '--resume', str(snapshot)])
    save_torch(tmp_path / 'bad.pt', {'w': torch.zeros(1)})
    with pytest.raises(UserError, match='--grow .*bad.pt: neither a generator file'):
        main([*grown[:-1], str(tmp_path / 'bad.pt'), '--outdir', str(tmp_path / 'x')])
    assert not (tmp_path / 'x').exists()
