"""Intervals by resampling, and of rates. The unit that is drawn is an argument: people.

Two photographs of a person are not two independent observations, so that whole people are drawn,
with all that was observed of them. Shapes: n observations, b draws.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Num
from scipy.stats import beta

from utils.seeds import numpy_generator

_WEIGHTS_AT_ONCE = 1_000_000

People = Sequence | np.ndarray | None


def unit_numbers(people: People, n: int) -> Int[np.ndarray, ' n']:
    """Numbers [n] from 0 of the unit of each observation; None makes each a unit of its own."""
    if people is None:
        return np.arange(n)
    if len(people) != n:
        raise ValueError(f'{len(people)} people for {n} observations')
    return np.unique(np.asarray(people, dtype=str), return_inverse=True)[1]


def draw_weights(
    people: People, n: int, n_draws: int, rng: np.random.Generator
) -> Iterator[Num[np.ndarray, 'b n']]:
    """How often each of n observations counts in `n_draws` draws of whole people.

    people [n]: the person behind each observation (None: each its own). Yields blocks of draws
    [b, n], so that memory stays bounded.
    """
    unit = unit_numbers(people, n)
    n_units = unit.max() + 1
    counts = rng.multinomial(n_units, np.full(n_units, 1 / n_units), size=n_draws)
    for part in np.array_split(counts, -(-n_draws * n // _WEIGHTS_AT_ONCE)):
        yield part[:, unit].astype(np.float64)


def percentiles(draws: Float[np.ndarray, ' b'], level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of the draws; those in which a score is undefined (NaN) do not count."""
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def rate_interval(
    hits: Sequence[bool] | Bool[np.ndarray, ' n'] | Int[np.ndarray, ' n'],
    people: People = None,
    level: float = 0.95,
) -> tuple[float, float]:
    """Exact binomial interval of the share of `hits` [n], for people with several observations.

    The number of observations is divided by the design effect, the variance of the share between
    people over that of independent observations (Korn and Graubard 1998), and is never below the
    number of people where all agree. With one observation per person it is Clopper and Pearson's.
    """
    hits = np.asarray(hits, dtype=np.float64)
    n, rate = len(hits), float(hits.mean())
    unit = unit_numbers(people, n)
    alone = np.sum((hits - rate) ** 2)
    if alone > 0:
        effect = np.sum(np.bincount(unit, weights=hits - rate) ** 2) / alone
        effective = n / max(float(effect), 1.0)
    else:
        effective = float(unit.max() + 1)
    found, tail = rate * effective, (1 - level) / 2
    low = beta.ppf(tail, found, effective - found + 1) if found > 0 else 0.0
    high = beta.ppf(1 - tail, found + 1, effective - found) if found < effective else 1.0
    return float(low), float(high)


def ratio_of_means(
    release: Num[np.ndarray, ' n'],
    photographs: Num[np.ndarray, ' m'],
    *,
    people: People = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, float]:
    """Mean of release [n] over mean of photographs [m]: {value, low, high}.

    A percentile interval over release pictures (no two of which share a person) and people;
    NaN where the photographs have nothing to compare with.
    """
    release, photographs = np.asarray(release, float), np.asarray(photographs, float)
    if not photographs.mean() > 0:
        return dict.fromkeys(('value', 'low', 'high'), float('nan'))
    rng = numpy_generator(seed, 'ratio')
    drawn = [
        np.concatenate(list(draw_weights(who, len(values), n_bootstrap, rng)))
        for values, who in ((release, None), (photographs, people))
    ]
    above, below = (
        (weights @ values) / weights.sum(1)
        for weights, values in zip(drawn, (release, photographs))
    )
    ratios = np.divide(above, below, out=np.full(n_bootstrap, np.nan), where=below > 0)
    low, high = percentiles(ratios, level)
    return {'value': float(release.mean() / photographs.mean()), 'low': low, 'high': high}
