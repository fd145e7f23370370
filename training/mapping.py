"""A mapping network for latents that an encoder found.

A generator trained together with its encoder knows the encoder's latents; those of its mapping
network mean nothing to it. Here the mapping is trained to give latents of the same distribution,
by the energy distance (Szekely and Rizzo 2013), which is 0 for equal distributions alone, and by
the covariance, which in many dimensions moves that distance little.

Shapes: N latents, D style dimension.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from models.stylegan2 import Generator
from utils.errors import UserError
from utils.seeds import torch_generator

# The mapping's layers multiply their weights by 0.01; the rate makes up for it.
_RATE = 1.0
_BETAS = (0.9, 0.99)
_SHAPE = 10.0  # weight of the covariance's squared error, relative


def energy_distance(x: Float[Tensor, 'N D'], y: Float[Tensor, 'M D']) -> Float[Tensor, '']:
    """Energy distance of two samples, without bias: about 0 for samples of one distribution."""

    def within(a: Tensor) -> Tensor:
        return torch.cdist(a, a).sum() / (len(a) * (len(a) - 1))

    return 2 * torch.cdist(x, y).mean() - within(x) - within(y)


def _covariance(x: Float[Tensor, 'N D']) -> Float[Tensor, 'D D']:
    away = x - x.mean(0)
    return away.T @ away / len(x)


def fit_mapping(
    generator: Generator,
    latents: Float[Tensor, 'N D'],
    *,
    steps: int = 2000,
    batch: int = 512,
    seed: int = 0,
) -> list[float]:
    """Trains the mapping network of `generator` in place; nothing else of it changes.

    latents: at least 2, on the generator's device. The rate falls to 0 along half a cosine.
    Returns the energy distance of every step. UserError when there are fewer than 2 latents.
    """
    if len(latents) < 2:
        raise UserError('the mapping network learns from at least two latents')
    batch = min(batch, len(latents))
    parameters = list(generator.style.parameters())
    states = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    adam = torch.optim.Adam(parameters, lr=_RATE, betas=_BETAS)
    wanted = _covariance(latents)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    found = []
    for step in range(steps):
        draw = torch_generator(seed, 'mapping', step)
        chosen = torch.randperm(len(latents), generator=draw)[:batch].to(latents.device)
        z = torch.randn(batch, generator.style_dim, generator=draw).to(latents.device)
        w = generator.mapping(z)
        loss = energy_distance(w, latents[chosen])
        shape = (_covariance(w) - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)
        adam.zero_grad(set_to_none=True)
        (loss + _SHAPE * shape).backward()
        adam.step()
        schedule.step()
        found.append(float(loss.detach()))
    for p, state in zip(parameters, states):
        p.requires_grad_(state)
    return found
