"""Canaries: what a generator knows by heart is found, and what it never saw is not."""

import json

import numpy as np
import pytest
import torch
from conftest import load_script
from PIL import Image
from small_engine import small_engine

from evaluation.attacks.canaries import (
    drawing_errors,
    encoder_attack,
    generator_attack,
    sample_attacks,
)
from models.encoders import build_encoder
from models.psp import PSP, psp_checkpoint, redraw
from models.stylegan2 import Generator
from models.stylegan2.sampling import seed_styles
from utils.errors import UserError
from utils.images import to_uint8
from utils.io import save_torch

script = load_script('canaries', 'benchmarks')


@pytest.fixture(scope='module')
def generator():
    """Its pictures stay within [-1, 1], so that they can be drawn again."""
    net = small_engine().psp.decoder.eval().requires_grad_(False)
    for rgb in (net.to_rgb1, *net.to_rgbs):
        rgb.conv.weight.mul_(0.1)
    return net


def photographs(rng, n):
    """Smooth pictures of one kind."""
    coarse = rng.integers(40, 215, (n, 3, 4, 4))
    return np.kron(coarse, np.ones((8, 8))).astype(np.uint8)


def test_samples_that_repeat_the_planted_give_them_away():
    rng = np.random.default_rng(0)
    planted, held, reference, others = (photographs(rng, n) for n in (30, 30, 30, 60))
    noisy = np.clip(planted + rng.normal(0, 20, planted.shape), 0, 255).astype(np.uint8)
    found = sample_attacks(planted, held, np.concatenate([noisy, others]), reference, {})
    assert found['pixel']['auc']['value'] > 0.95
    nothing = sample_attacks(planted, held, others, reference, {})['pixel']['auc']
    assert nothing['low'] < 0.5 < nothing['high']


def test_who_has_the_generator_finds_what_it_can_draw(generator):
    """Planted: pictures that it draws; held: the same upside down, which it never draws."""
    with torch.no_grad():
        drawn = to_uint8(generator.synthesis(seed_styles(generator, range(8)))).numpy()
    found = generator_attack(generator, drawn, drawn[:, :, ::-1], n_steps=60)
    assert found['auc']['value'] > 0.8
    first, best = drawing_errors(generator, drawn, n_steps=30)
    assert (best <= first).all() and best.mean() < 0.5 * first.mean()


def test_who_has_encoder_and_generator_finds_what_they_draw_again():
    """Planted: pictures that come out as they went in; held: the same upside down."""
    psp = small_engine().psp.eval().requires_grad_(False)
    for rgb in (psp.decoder.to_rgb1, *psp.decoder.to_rgbs):
        rgb.conv.weight.mul_(0.1)
    drawn = photographs(np.random.default_rng(0), 12)
    for _ in range(4):
        drawn, _ = redraw(psp, drawn, n_iters=2)
    halves = {'left half': lambda pictures: pictures[..., :16].reshape(len(pictures), -1) / 255}
    found = encoder_attack(psp, drawn, drawn[:, :, ::-1], halves, n_iters=2)
    assert set(found) == {'pixel', 'left half'}
    assert all(r['auc']['value'] > 0.9 and r['n_members'] == 12 for r in found.values())
    swapped = encoder_attack(psp, drawn[:, :, ::-1], drawn, halves, n_iters=2)
    assert swapped['pixel']['auc']['value'] < 0.1


def test_the_commands(tmp_path, monkeypatch):
    (tmp_path / 'photos').mkdir()
    for i in range(3):
        Image.new('RGB', (64, 64), (i, 0, 0)).save(tmp_path / f'photos/{i}.png')
    flags = [f'--out_dir={tmp_path / "run"}', '--device=cpu']
    planting = ['plant', f'--image_dir={tmp_path / "photos"}', '--n=4', '--copies=2', *flags]
    monkeypatch.setattr(script, '_TEACHERS', 4)
    assert script.main(planting) == 0
    names = sorted(p.name for p in (tmp_path / 'run/train').iterdir())
    assert len(names) == 3 + 4 * 2 and sum('canary' in n for n in names) == 8
    masks = sorted((tmp_path / 'run/canaries/masks').iterdir())
    assert len(masks) == 12
    with pytest.raises(UserError, match='exists'):
        script.main(planting)
    with pytest.raises(UserError, match='needs --generator, --encoder'):
        script.main(['attack', *flags])
    torch.manual_seed(0)
    decoder = Generator(64, style_dim=16, n_mlp=2, channels=dict.fromkeys((4, 8, 16, 32, 64), 8))
    encoder = build_encoder('LightEncoder', n_styles=10, input_size=64, style_dim=16, width=8)
    save_torch(tmp_path / 'generator.pt', {'g_ema': decoder.state_dict()})
    psp = PSP(encoder, decoder, torch.zeros(16), 64)
    save_torch(tmp_path / 'restyle.pt', psp_checkpoint(psp, {'n_iters_per_batch': 1}))
    kinds = {'samples, pixel', 'samples, features', 'samples, identity', 'generator'}
    for name, more in (('generator', set()), ('encoder', {'encoder, pixel', 'encoder, features'})):
        weights = 'generator' if name == 'generator' else 'restyle'
        asked = [f'--{name}={tmp_path / weights}.pt', '--n_samples=8', '--n_steps=1']
        assert script.main(['attack', *flags, *asked]) == 0
        found = json.loads((tmp_path / f'run/attack-{weights}.json').read_text())['attacks']
        assert kinds | more <= set(found)
        table = (tmp_path / f'run/attack-{weights}.md').read_text()
        assert all(f'| {attacker} | ' in table for attacker in found)
        assert ('encoder, pixel' in found) == (name == 'encoder')
        assert all(r['n_members'] == r['n_others'] == 4 for r in found.values())
