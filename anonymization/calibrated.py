"""Calibrated noise on the few numbers in which a group is told: a stated epsilon.

The code of a person is where his photographs in the group lie, on average, along the leading
directions of the generator's own latents, in standard deviations of its samples (of nobody's
photograph). It is clipped to a length, so that another person in his place moves the mean over the
k or more people of a group by at most 2 clip / k, and one who is in m groups all of them together
by sqrt(m) times that. The noise is that of the analytic Gaussian mechanism (Balle and Wang 2018)
for this distance. What follows, the length that the generator's codes have and the picture, sees
the noisy code alone.

Shapes: R directions, m photographs of a group, L styles, D style dimension.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from scipy.optimize import brentq
from scipy.special import log_ndtr
from torch import Tensor

from anonymization.optimize import OptimizeConfig
from anonymization.starts import secret_normals
from models.stylegan2.model import Generator
from models.stylegan2.sampling import leading_directions
from utils.errors import UserError
from utils.kinds import number, positive_float
from utils.options import option

# Of the clipping length over the square root of R: the generator's own samples, in groups of 5 and
# 20 alike or dealt out, keep most through the noise of epsilon 2 to 32 (docs/making.md).
CLIP = 0.75
# Noisy codes are rounded to this, so that their last digits say nothing (Mironov 2012).
STEP = 2.0**-10
DELTA = 1e-5
EPSILON = number(lambda v: 0 < v <= 500, 'a number above 0, at most 500')
_DECIMALS = 6  # of sigma and the clipping length; sigma is rounded up
_HEADING = 'noise with a stated epsilon'


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """Settings of the noise; without epsilon there is none.

    epsilon, delta: of differential privacy, for exchanging one person of a group. clip: how far
    from the generator's mean one person counts, in standard deviations of its samples; None: CLIP
    times the square root of the number of directions.
    """

    epsilon: float | None = option(
        None,
        EPSILON,
        'secret noise on the `latent_rank` numbers of every group, so much that the pictures are '
        '(epsilon, delta)-differentially private for exchanging one person of a group '
        '(docs/privacy.md says what that is)',
        group=_HEADING,
        metavar='FLOAT',
    )
    delta: float = option(
        DELTA,
        number(lambda v: 0 < v < 1, 'a number between 0 and 1'),
        'how likely more may leak',
        group=_HEADING,
        metavar='FLOAT',
    )
    clip: float | None = option(
        None,
        positive_float,
        "how far from the generator's mean one person counts, in standard deviations of its "
        f'samples (default: {CLIP} times the root of `latent_rank`)',
        group=_HEADING,
        metavar='SD',
    )

    def check(self, optimize: OptimizeConfig, start_noise: float) -> None:
        """UserError for what would break the guarantee, and settings without effect."""
        if self.epsilon is None:
            for name, given in (('clip', self.clip is not None), ('delta', self.delta != DELTA)):
                if given:
                    raise UserError(f'`{name}` belongs to `epsilon`, which is not given; give both')
            return
        if not optimize.latent_rank:
            raise UserError(
                '`epsilon` needs `latent_rank`: noise on all numbers of a latent would leave '
                'nothing; tell groups in a few directions, such as 4'
            )
        if optimize.n_steps:
            raise UserError(
                f"`epsilon` needs `n_steps` 0, not {optimize.n_steps}: steps look at the members' "
                'photographs again, which no noise covers'
            )
        if start_noise:
            raise UserError(
                '`epsilon` and `start_noise` are both noise on the start, and the latter has no '
                'guarantee; leave it out'
            )

    def check_people(self, n: int) -> None:
        """UserError for a delta with which one of `n` people may be given away altogether."""
        if self.epsilon is not None and self.delta * n >= 1:
            raise UserError(
                f'`delta` {self.delta:g}: one of {n} people may be given away altogether; use much '
                f'less than 1 / {n}'
            )


class Noise(NamedTuple):
    """What a release says of its noise; sigma in standard deviations of the generator's samples.

    directions: R. groups_per_person: the most groups that hold photographs of one person.
    """

    epsilon: float
    delta: float
    clip: float
    directions: int
    groups_per_person: int
    sigma: float


def spent_delta(epsilon: float, sigma: float) -> float:
    """The delta of normal noise of deviation `sigma` on what moves by 1 (Balle and Wang, th. 8)."""
    near, far = 0.5 / sigma, epsilon * sigma
    return math.exp(log_ndtr(near - far)) - math.exp(epsilon + log_ndtr(-near - far))


def noise_deviation(epsilon: float, delta: float) -> float:
    """The least deviation of normal noise on what moves by 1 for (epsilon, delta)."""
    low = high = 1.0
    while spent_delta(epsilon, low) < delta:
        low /= 2
    while spent_delta(epsilon, high) > delta:
        high *= 2
    if low == high:
        return low
    return brentq(lambda sigma: spent_delta(epsilon, sigma) - delta, low, high, xtol=1e-12)


def noise_of(config: NoiseConfig, *, rank: int, k: int, groups_per_person: int) -> Noise | None:
    """The noise of groups of at least k people; None without an epsilon."""
    if config.epsilon is None:
        return None
    clip = round(config.clip or CLIP * math.sqrt(rank), _DECIMALS)
    moves = 2 * clip / k * math.sqrt(groups_per_person)
    least = moves * noise_deviation(config.epsilon, config.delta)
    sigma = (math.floor(least * 10**_DECIMALS) + 1) / 10**_DECIMALS
    return Noise(float(config.epsilon), float(config.delta), clip, rank, groups_per_person, sigma)


def most_groups(groups: Iterable[Sequence[Hashable]]) -> int:
    """In how many groups the person is who is in most. groups: who is on each photograph."""
    counts = Counter(person for people in groups for person in set(people))
    return max(counts.values())


def clipped(codes: Float64[np.ndarray, 'n R'], length: float) -> Float64[np.ndarray, 'n R']:
    """Codes shortened to at most `length`."""
    lengths = np.linalg.norm(codes, axis=1, keepdims=True)
    return codes * np.minimum(1, length / np.maximum(lengths, 1e-300))


class Teller:
    """Draws the noisy codes of groups, and says which latents they are.

    key: secret. salt: what else the noise depends on, such as the networks: the same noise on two
    different codes would give their difference away.
    """

    def __init__(self, decoder: Generator, noise: Noise, key: bytes, salt: str) -> None:
        self.noise, self._key, self._salt = noise, key, salt
        self._leading = leading_directions(decoder, noise.directions)
        self._styles = decoder.n_latent
        # The codes of single samples, clipped and with this noise, get their deviation, 1.
        own = clipped(self._leading.codes.cpu().numpy(), noise.clip)
        self.scale = 1 / math.sqrt((own**2).mean() + noise.sigma**2)

    def code(
        self, ws: Float[Tensor, 'm L D'], people: Sequence[Hashable]
    ) -> Float64[np.ndarray, ' R']:
        """Mean over people, [R], without noise. people: who is on each photograph of a group."""
        middle, directions, _, deviations = (part.cpu() for part in self._leading)
        away = (ws.cpu() - middle).double().mean(1)
        codes = (away @ directions.T / deviations).numpy()
        own = [[i for i, p in enumerate(people) if p == person] for person in dict.fromkeys(people)]
        return clipped(np.stack([codes[rows].mean(0) for rows in own]), self.noise.clip).mean(0)

    def tell(
        self, ids: Sequence[str], ws: Float[Tensor, 'm L D'], people: Sequence[Hashable]
    ) -> Float32[Tensor, 'L D']:
        """The latent of a group, all that a picture of it may depend on.

        ids, people: of its photographs. The noise depends on all that comes in, so that whatever
        is done again with anything else has other noise.
        """
        order = sorted(range(len(ids)), key=lambda i: ids[i])
        told = json.dumps([self._salt, self.noise, [ids[i] for i in order]]).encode()
        context = told + ws.cpu()[order].numpy().tobytes()
        normals = secret_normals(self._key, context, self.noise.directions)
        return self.latent(self.code(ws, people) + self.noise.sigma * normals)

    def latent(self, code: Float64[np.ndarray, ' R']) -> Float32[Tensor, 'L D']:
        """The latent [L, D] of a noisy code: rounded, and of the length of the generator's own."""
        middle, directions, _, deviations = (part.cpu() for part in self._leading)
        scaled = torch.from_numpy(self.scale * STEP * np.rint(code / STEP)) * deviations
        return (middle.double() + scaled @ directions).float().expand(self._styles, -1).clone()


def stated(noise: Noise | None) -> dict[str, Any] | None:
    """The noise as the manifest has it."""
    return None if noise is None else noise._asdict()
