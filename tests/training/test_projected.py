"""The projected discriminator: what is frozen, one step by hand, exact resume, two processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from PIL import Image
from torch import Tensor
from two_processes import run_together

from datasets.archive import ImageArchive
from models.features.pretrained import load_feature_network
from models.projected import STRIDES, ProjectedDiscriminator
from scripts import train_stylegan2_ada
from training.augment import PIPES, AugmentPipe, RandomDraws
from training.stylegan2_config import make_config
from training.stylegan2_loop import Trainer
from training.stylegan2_run import snapshots
from utils.errors import UserError
from utils.io import load_weights
from utils.logs import read_jsonl
from utils.seeds import torch_generator

CHANNELS = {4: 8, 8: 8, 16: 8, 32: 8, 64: 4}


def make_archive(folder: Path, n: int = 8, size: int = 64) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        spots = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        spots.resize((size, size)).save(folder / f'img{i:08d}.png')
    return folder


@pytest.fixture(scope='module')
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp('projected') / 'archive')


@pytest.fixture(scope='module')
def net() -> ProjectedDiscriminator:
    torch.manual_seed(0)
    return ProjectedDiscriminator(load_feature_network('lite0'), channels=8)


def make_trainer(archive: Path, **options) -> Trainer:
    config = make_config(
        'small',
        64,
        1,
        batch=4,
        batch_gpu=2,
        channels=CHANNELS,
        style_dim=16,
        discriminator='projected',
        d_lr=1e-3,
    )
    return Trainer(
        ImageArchive(archive), config, device='cpu', augment_names=PIPES['diff'], **options
    )


def test_only_the_heads_are_learnt_and_kept(net: ProjectedDiscriminator) -> None:
    assert not any('_features' in name for name in net.state_dict())
    learnt = {id(p) for p in net.learnt()}
    assert learnt == {id(p) for p in net.parameters() if p.requires_grad}
    assert {name.split('.')[0] for name, p in net.named_parameters() if id(p) in learnt} == {
        'heads'
    }
    assert not any(p.requires_grad for p in net._features[0].parameters())


def test_mixing_is_that_of_the_paper_by_hand(net: ProjectedDiscriminator) -> None:
    x = torch.rand(2, 3, 64, 64, generator=torch_generator(0)) * 2 - 1
    maps = load_feature_network('lite0').maps(x, STRIDES)
    above = torch.zeros(2, 8, 2, 2)
    for stride in (32, 16, 8, 4):
        y = torch.einsum(
            'oi,nihw->nohw', net.across_channels[str(stride)].weight[:, :, 0, 0], maps[stride]
        )
        side = y.shape[-1]
        y = y + F.interpolate(above, size=(side, side), mode='bilinear', align_corners=False)
        above = F.conv2d(y, net.across_scales[str(stride)].weight, padding=1)
        assert torch.allclose(net.mixed(maps)[stride], above, atol=1e-4)
        assert above.shape == (2, 8, 128 // stride, 128 // stride)
        assert 0.3 < float(above.std()) < 3  # no scale drowns another
    assert net(x).shape == (2, 4 * 16)


def test_norms_stay_at_one_and_move_in_refresh_alone(net: ProjectedDiscriminator) -> None:
    layer = net.heads['8'].mix
    before = layer.weight.detach().clone()
    net.train()
    net(torch.zeros(1, 3, 64, 64))
    assert torch.equal(layer.weight, before)
    for _ in range(30):
        net.refresh_norms()
    norm = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
    assert float(norm) == pytest.approx(1, abs=0.01)


def test_one_step_by_hand(archive: Path) -> None:
    trainer, by_hand = (make_trainer(archive, augment='noaug') for _ in range(2))
    stats = trainer.step()
    t = by_hand
    t.d.requires_grad_(False)
    loss_g = []
    for draw in t._passes('g_main'):
        loss_g.append(-t.d(t.g.synthesis(t._latents(draw, 2), noise='none')).mean())
    sum(loss_g).div(2).backward()
    t.g_optim.step()
    t.g_optim.zero_grad()
    for p in t.d.learnt():
        p.requires_grad_(True)
    t.d.refresh_norms()
    loss_d: list[Tensor] = []
    reals = iter(t._next_reals, None)
    for draw in t._passes('d_main'):
        fake = t.g.synthesis(t._latents(draw, 2), noise='none').detach()
        loss_d.append(
            (1 + t.d(fake)).clamp(min=0).mean() + (1 - t.d(next(reals))).clamp(min=0).mean()
        )
    sum(loss_d).div(2).backward()
    t.d_optim.step()
    assert float(stats['loss_g']) == pytest.approx(float(sum(loss_g).detach()) / 2, rel=1e-5)
    assert float(stats['loss_d']) == pytest.approx(float(sum(loss_d).detach()) / 2, rel=1e-5)
    assert 'r1' not in stats and 'loss_pl' not in stats
    for a, b in ((trainer.g, t.g), (trainer.d, t.d)):
        for (name, p), q in zip(a.named_parameters(), b.parameters()):
            # Adam's first step is the sign of the gradient, which rounding turns where it is 0.
            assert float((p - q).detach().abs().mean()) < 1e-5, name
    rates = [o.param_groups[0]['lr'] for o in (t.g_optim, t.d_optim)]
    assert rates == pytest.approx([0.002 * 4 / 5, 1e-3 * 16 / 17])


def test_resumed_training_equals_uninterrupted(archive: Path, tmp_path: Path) -> None:
    straight, first, second = (
        make_trainer(archive, augment='fixed', augment_p=0.8) for _ in range(3)
    )
    for _ in range(4):
        straight.step()
    for _ in range(2):
        first.step()
    snapshots(tmp_path).save(first.n_img, first.state())
    second.load_state(snapshots(tmp_path).latest()[0])
    for _ in range(2):
        second.step()
    one, two = straight.state(), second.state()
    for part in ('g', 'g_ema', 'd'):
        assert all(torch.equal(one[part][k], two[part][k]) for k in one[part]), part


def test_discriminator_of_the_other_kind_is_left_out_of_a_transfer(archive: Path) -> None:
    projected = make_trainer(archive)
    config = make_config('small', 64, 1, batch=4, channels=CHANNELS, style_dim=16)
    plain = Trainer(ImageArchive(archive), config, device='cpu', augment='noaug')
    before = {k: v.clone() for k, v in projected.d.state_dict().items()}
    projected.transfer(plain.state())
    assert torch.equal(projected.g.conv1.conv.weight, plain.g.conv1.conv.weight)
    assert all(torch.equal(v, before[k]) for k, v in projected.d.state_dict().items())


def test_command_one_and_two_processes_agree(archive: Path, tmp_path: Path) -> None:
    flags = [
        '--data',
        str(archive),
        '--cfg=small',
        '--discriminator=projected',
        '--batch=4',
        '--batch-gpu=2',
        '--kimg=0.012',
        '--cbase=256',
        '--cmax=8',
        '--device=cpu',
    ]
    rows, runs = {}, {}
    for gpus in (1, 2):
        out = tmp_path / f'gpus{gpus}'
        asked = ['--outdir', str(out), *flags]
        run_together(gpus, tmp_path / f'{gpus}.log', train_stylegan2_ada.main, asked)
        (runs[gpus],) = out.iterdir()
        rows[gpus] = read_jsonl(runs[gpus] / 'stats.jsonl')
    assert 'projected-fixed-diff' in runs[1].name
    assert len(rows[1]) == len(rows[2]) == 3
    for one, two in zip(rows[1], rows[2]):
        for name in ('loss_g', 'loss_d', 'score_real'):
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-4), name
    main = load_script('train_stylegan2_ada').main
    with pytest.raises(UserError, match='always frozen'):
        main(
            [
                '--outdir',
                str(tmp_path),
                *flags,
                '--freezed=2',
                '--resume',
                str(next(runs[1].glob('network*.pt'))),
                '--transfer=1',
            ]
        )
    # Growing keeps the heads, which see features of the same strides at any size.
    big = make_archive(tmp_path / 'big', n=4, size=128)
    snapshot = next(runs[1].glob('network*.pt'))
    main(
        [
            '--outdir',
            str(tmp_path / 'grown'),
            *flags,
            '--data',
            str(big),
            '--grow',
            str(snapshot),
            '--kimg=0.004',
        ]
    )
    grown = load_weights(next((tmp_path / 'grown').glob('*/network*.pt')))
    old = load_weights(snapshot)
    assert torch.equal(grown['d']['across_scales.4.weight'], old['d']['across_scales.4.weight'])


def test_shifts_by_whole_pixels_equal_the_filtered_warp() -> None:
    x = torch.rand(6, 3, 24, 20, generator=torch_generator(0))
    pipe = AugmentPipe(('xint',), 'cpu')
    inverse = pipe._geometry(RandomDraws(6, 'cpu', torch_generator(3)), 0.9, 24, 20)
    assert inverse[:, :2, 2].abs().max() > 1
    moved = pipe(x, 0.9, generator=torch_generator(3))
    assert torch.allclose(moved, pipe._warp(x, *pipe._aim(inverse, 24, 20)), atol=1e-4)
