"""The share of a picture on dark ridges: as the evaluation measures it, and with gradients."""

import numpy as np
import torch

from criteria.ridges import ridge_share
from datasets.phantoms.render import render_phantom
from evaluation.vessel_amount import vessel_amount
from utils.images import from_uint8


def phantoms(n: int, size: int) -> np.ndarray:
    options = {'seed': 5, 'eye': 'right', 'visit': 0, 'size': size}
    drawn = [render_phantom(patient=i, grade=i % 5, **options) for i in range(n)]
    return np.stack([p.image.transpose(2, 0, 1) for p in drawn])


def test_it_follows_the_evaluations_vessel_amount() -> None:
    for size in (64, 128):
        u8 = phantoms(10, size)
        soft, hard = ridge_share(from_uint8(torch.from_numpy(u8))).numpy(), vessel_amount(u8).area
        assert np.corrcoef(soft, hard)[0, 1] > 0.9
        assert 0.7 < soft.mean() / hard.mean() < 1.5


def test_lines_count_and_shades_do_not() -> None:
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 128)] * 2, indexing='ij')
    disc = ((x**2 + y**2) < 0.8).float()
    plain = (0.3 + 0.2 * x) * disc - (1 - disc)
    line = ((x - 0.2 * y).abs() < 0.015).float() * disc
    pictures = torch.stack([plain, plain - 0.2 * line, plain - 0.5 * line])[:, None]
    none, faint, dark = ridge_share(pictures.expand(-1, 3, -1, -1)).tolist()
    assert none < 0.02 < none + 0.01 < faint < dark


def test_gradients_deepen_lines() -> None:
    u8 = phantoms(1, 64)
    x = from_uint8(torch.from_numpy(u8))
    faint = (0.5 * x + 0.5 * torch.nn.functional.avg_pool2d(x, 9, 1, 4)).requires_grad_(True)
    before = ridge_share(faint)
    (slope,) = torch.autograd.grad(before.sum(), faint)
    after = ridge_share(faint + 0.02 * slope / slope.abs().max())
    assert slope[:, 1].abs().max() > 0 and not slope[:, 0].any()
    assert float(after.detach()) > float(before.detach())
