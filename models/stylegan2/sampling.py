"""Latents for pictures: from seeds, mixed by layer, and on a closed path; and their rendering."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from scipy.interpolate import CubicSpline
from torch import Tensor

from models.stylegan2.model import Generator, truncate
from utils.seeds import torch_generator

NOISE_MODES = {'const': 'stored', 'random': 'random', 'none': 'none'}


def seed_latents(seeds: Iterable[int], dim: int) -> Float32[Tensor, 'N D']:
    """z [N, dim] of integer seeds; the same numbers as StyleGAN2-ADA draws for them."""
    return torch.from_numpy(
        np.stack([np.random.RandomState(seed).standard_normal(dim) for seed in seeds])
    ).float()


@torch.no_grad()
def seed_styles(
    net: Generator,
    seeds: Iterable[int],
    *,
    psi: float = 1.0,
    latent_avg: Float[Tensor, ' D'] | None = None,
) -> Float[Tensor, 'N L D']:
    """ws [N, L, D] of integer seeds, truncated towards `latent_avg` [D] when psi is not 1."""
    w = net.mapping(seed_latents(seeds, net.style_dim).to(net.input.input.device))
    if psi != 1:
        if latent_avg is None:
            raise ValueError('psi other than 1 needs latent_avg')
        w = truncate(w, latent_avg, psi)
    return net.broadcast(w)


@torch.no_grad()
def _fixed_draws(net: Generator, n: int) -> Float[Tensor, 'N D']:
    """The latents w [n, D] of n fixed draws."""
    return net.mapping(seed_latents(range(n), net.style_dim).to(net.input.input.device))


def latent_spread(net: Generator, n: int = 1000) -> float:
    """Standard deviation of the latents w of n fixed draws, averaged over their components."""
    return float(_fixed_draws(net, n).std(0).mean())


class Leading(NamedTuple):
    """Where a generator's latents w lie.

    middle: [D], their mean. directions: [R, D], orthonormal, those of most variance first.
    codes: [n, R], the draws along the directions, in their own standard deviations. deviations:
    [R], these.
    """

    middle: Float32[Tensor, ' D']
    directions: Float64[Tensor, 'R D']
    codes: Float64[Tensor, 'n R']
    deviations: Float64[Tensor, ' R']


@torch.no_grad()
def leading_directions(net: Generator, rank: int, n: int = 4000) -> Leading:
    """The `rank` first principal directions of the latents w of n fixed draws.

    ValueError for a rank above D.
    """
    if not 1 <= rank <= net.style_dim:
        raise ValueError(f'rank {rank} of latents of {net.style_dim} numbers')
    w = _fixed_draws(net, n)
    middle = w.mean(0)
    away = (w - middle).double()
    _, vectors = torch.linalg.eigh(away.T @ away)  # in ascending order
    directions = vectors[:, -rank:].T.flip(0).contiguous()
    along = away @ directions.T
    deviations = along.std(0, correction=0)
    return Leading(middle, directions, along / deviations, deviations)


def mix_styles(
    coarse: Float[Tensor, 'N L D'], donor: Float[Tensor, 'N L D'], layers: Sequence[int] | slice
) -> Float[Tensor, 'N L D']:
    """ws [N, L, D] of `coarse` with the layers in `layers` taken from `donor` [N, L, D]."""
    mixed = coarse.clone()
    mixed[:, layers] = donor[:, layers]
    return mixed


def loop_styles(ws: Float[Tensor, 'K L D'], n_between: int) -> Float[Tensor, 'M L D']:
    """A smooth closed path through ws [K, L, D] (K >= 2): [K * n_between, L, D].

    Every n_between-th frame is one of the given points; a periodic cubic spline joins them.
    """
    points = torch.cat([ws, ws[:1]]).cpu().numpy()
    spline = CubicSpline(np.arange(len(points)), points, bc_type='periodic')
    path = spline(np.arange(len(ws) * n_between) / n_between)
    return torch.from_numpy(path).to(ws)


@torch.no_grad()
def render(
    net: Generator,
    ws: Float[Tensor, 'N L D'],
    *,
    noise: str = 'const',
    seeds: Sequence[int] | None = None,
    batch: int = 8,
) -> Iterator[Float[Tensor, '3 R R']]:
    """Yields images [3, R, R] of ws [N, L, D], computed `batch` at a time.

    noise: 'const' (the stored maps), 'random' (drawn from `seeds[i]`, by default i, for image i,
    so that a picture does not depend on the batch), or 'none'.
    """
    for start in range(0, len(ws), batch):
        part = ws[start : start + batch]
        maps: str | list[Tensor] = NOISE_MODES[noise]
        if noise == 'random':
            numbers = (
                range(start, start + len(part))
                if seeds is None
                else seeds[start : start + len(part)]
            )
            drawn = [
                net.noise_maps('random', 1, 'cpu', torch_generator(s, 'noise')) for s in numbers
            ]
            maps = [torch.cat(level).to(ws.device) for level in zip(*drawn)]
        yield from net.synthesis(part, noise=maps)
