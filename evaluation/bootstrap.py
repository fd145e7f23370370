"""Intervals by resampling, and of rates. The unit that is drawn is an argument: people.

Two photographs of a person are not two independent observations, so that whole people are drawn,
with all that was observed of them. Shapes: n observations, b draws.
"""
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.stats import beta

_WEIGHTS_AT_ONCE = 1_000_000

People = Sequence | np.ndarray | None


def unit_numbers(people: People, n: int) -> np.ndarray:
    """Numbers [n] from 0 of the unit of each observation; None makes each a unit of its own."""
    if people is None:
        return np.arange(n)
    if len(people) != n:
        raise ValueError(f'{len(people)} people for {n} observations')
    return np.unique(np.asarray(people, dtype=str), return_inverse=True)[1]


def draw_weights(people: People, n: int, n_draws: int, rng: np.random.Generator
                 ) -> Iterator[np.ndarray]:
    """How often each of n observations counts in `n_draws` draws of whole people.

    people [n]: the person behind each observation (None: each its own). Yields blocks of draws
    [b, n], so that memory stays bounded.
    """
    unit = unit_numbers(people, n)
    n_units = unit.max() + 1
    counts = rng.multinomial(n_units, np.full(n_units, 1 / n_units), size=n_draws)
    for part in np.array_split(counts, -(-n_draws * n // _WEIGHTS_AT_ONCE)):
        yield part[:, unit].astype(np.float64)


def percentiles(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of the draws; those in which a score is undefined (NaN) do not count."""
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def rate_interval(hits: Sequence[bool] | np.ndarray, people: People = None, level: float = 0.95
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
        effective = n / max(effect, 1.0)
    else:
        effective = float(unit.max() + 1)
    found, tail = rate * effective, (1 - level) / 2
    low = beta.ppf(tail, found, effective - found + 1) if found > 0 else 0.0
    high = beta.ppf(1 - tail, found + 1, effective - found) if found < effective else 1.0
    return float(low), float(high)
