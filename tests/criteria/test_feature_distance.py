"""Losses of the encoder training on pretrained networks, chosen by name."""

import pytest
import torch

from training.reconstruction import ContentTerm, LpipsTerm


@pytest.mark.parametrize('term', [ContentTerm, LpipsTerm])
def test_distances_on_lite0(term):
    made = term('lite0', 'cpu')
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 64, 64, generator=draw) * 2 - 1
    near = (x + 0.02 * torch.randn(x.shape, generator=draw)).requires_grad_(True)
    targets = made.targets(x)
    assert made.distance(x, targets).abs().max() < 1e-5
    distance = made.distance(near, targets)
    far = made.distance(x.flip(0), targets)
    assert distance.shape == (2,) and (distance > 0).all() and (distance < far).all()
    (grad,) = torch.autograd.grad(distance.sum(), near)
    assert torch.isfinite(grad).all() and grad.abs().amax((1, 2, 3)).min() > 0
