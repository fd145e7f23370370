"""Bootstrap intervals with people as the unit."""
from collections.abc import Sequence

import numpy as np

from utils.seeds import numpy_generator


def person_numbers(people: Sequence[str] | None, n: int) -> np.ndarray:
    """Whole numbers [n], equal where two of n pictures show one person.

    people: one id per picture; None counts every picture as a person of its own.
    """
    if people is None:
        return np.arange(n)
    if len(people) != n:
        raise ValueError(f'{len(people)} people for {n} pictures')
    return np.unique(np.asarray(people, dtype=str), return_inverse=True)[1]


def person_draws(people: Sequence[str] | None, n: int, n_bootstrap: int,
                 rng: np.random.Generator) -> np.ndarray:
    """How often each of n pictures counts in each draw, float64 [n_bootstrap, n].

    Whole people are drawn with replacement, so the pictures of a person come and go together.
    """
    person = person_numbers(people, n)
    count = int(person.max()) + 1
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=n_bootstrap)
    return drawn[:, person].astype(np.float64)


def ratio_of_means(release: np.ndarray, photographs: np.ndarray, *,
                   people: Sequence[str] | None = None, n_bootstrap: int = 1000, seed: int = 0,
                   level: float = 0.95) -> dict[str, float]:
    """Mean of release [n] over mean of photographs [m]: {value, low, high}.

    A percentile interval over release pictures (no two of which share a person) and people;
    NaN where the photographs have nothing to compare with.
    """
    release, photographs = np.asarray(release, float), np.asarray(photographs, float)
    if not photographs.mean() > 0:
        return dict.fromkeys(('value', 'low', 'high'), float('nan'))
    rng = numpy_generator(seed, 'ratio')
    drawn = [person_draws(who, len(values), n_bootstrap, rng) for values, who in
             ((release, None), (photographs, people))]
    above, below = ((weights @ values) / weights.sum(1)
                    for weights, values in zip(drawn, (release, photographs)))
    ratios = np.divide(above, below, out=np.full(n_bootstrap, np.nan), where=below > 0)
    low, high = np.nanquantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return {'value': float(release.mean() / photographs.mean()), 'low': float(low),
            'high': float(high)}
