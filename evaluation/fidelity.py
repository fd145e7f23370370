"""How much synthetic pictures look like real ones: Fréchet distance, KID, precision, coverage.

Features are those of evaluation/features.py: of Inception ('fid') or of the content encoder
('fd_fundus').

Shapes: n_r real and n_f synthetic pictures, feature dimension d.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Num, Shaped

from evaluation.bootstrap import People, draw_weights, unit_numbers
from evaluation.features import Network, extract_features, read_pictures
from utils.errors import UserError
from utils.seeds import numpy_generator

log = logging.getLogger(__name__)

METRICS = ('fd_fundus', 'kid_fundus', 'fid', 'kid')
PR_NEIGHBOURS = 3  # Kynkäänniemi et al. 2019
DC_NEIGHBOURS = 5  # Naeem et al. 2020
N_SPLITS = 5


def scaled(features: Float[np.ndarray, 'n d']) -> Float[np.ndarray, 'n d']:
    """Unit vectors [n, d] of a feature network at mean square 1 per dimension, as KID wants."""
    return features * np.sqrt(features.shape[1])


def feature_statistics(
    features: Float[np.ndarray, 'n d'],
) -> tuple[Float64[np.ndarray, ' d'], Float64[np.ndarray, 'd d']]:
    """Mean [d] and covariance [d, d] (n - 1) of features [n, d], float64."""
    features = np.asarray(features, dtype=np.float64)
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(
    mu1: Float[np.ndarray, ' d'],
    cov1: Float[np.ndarray, 'd d'],
    mu2: Float[np.ndarray, ' d'],
    cov2: Float[np.ndarray, 'd d'],
) -> float:
    """Squared Fréchet distance of two Gaussians (Heusel et al. 2017).

    |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the last trace from the eigenvalues of the
    symmetric C1^(1/2) C2 C1^(1/2), which stays exact for rank-deficient covariances.
    """
    mu1, mu2 = np.asarray(mu1, np.float64), np.asarray(mu2, np.float64)
    values, vectors = np.linalg.eigh(np.asarray(cov1, np.float64))
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ np.asarray(cov2, np.float64) @ root)
    shared = np.sqrt(np.clip(inner, 0, None)).sum()
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * shared)


def distance_of_samples(real: Float[np.ndarray, 'n d'], fake: Float[np.ndarray, 'm d']) -> float:
    """`frechet_distance` of the statistics of two samples, the faster way round.

    With centred rows X, Y the trace of (C1 C2)^(1/2) is the sum of the singular values of X Y^T,
    so few samples need no d x d matrices.
    """
    if min(len(real), len(fake)) > real.shape[1]:
        return frechet_distance(*feature_statistics(real), *feature_statistics(fake))
    x, y = real - real.mean(0), fake - fake.mean(0)
    x, y = x / np.sqrt(len(x) - 1), y / np.sqrt(len(y) - 1)
    shared = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    shift = np.sum((real.mean(0) - fake.mean(0)) ** 2)
    return float(shift + np.sum(x**2) + np.sum(y**2) - 2 * shared)


def _kernel(a: Float[np.ndarray, 'n d'], b: Float[np.ndarray, 'm d']) -> Float[np.ndarray, 'n m']:
    """The polynomial kernel of KID (Bińkowski et al. 2018)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def kernel_distance(real: Float[np.ndarray, 'n d'], fake: Float[np.ndarray, 'm d']) -> float:
    """KID on given features: unbiased squared maximum mean discrepancy, cubic kernel."""
    return float(_kernel_distances(real, fake, np.ones((1, len(real))), np.ones((1, len(fake))))[0])


def _kernel_distances(
    real: Float[np.ndarray, 'n d'],
    fake: Float[np.ndarray, 'm d'],
    weights_real: Num[np.ndarray, 'b n'],
    weights_fake: Num[np.ndarray, 'b m'],
) -> Float[np.ndarray, ' b']:
    """Unbiased MMD^2 with rows counted [b, n] times; a row is never paired with itself."""

    def within(x: Float[np.ndarray, 'n d'], w: Num[np.ndarray, 'b n']) -> Float[np.ndarray, ' b']:
        kernel = _kernel(x, x)
        pairs = np.einsum('bi,ij,bj->b', w, kernel, w, optimize=True) - (w**2) @ kernel.diagonal()
        return pairs / (w.sum(1) ** 2 - (w**2).sum(1))

    between = np.einsum(
        'bi,ij,bj->b', weights_real, _kernel(real, fake), weights_fake, optimize=True
    )
    between /= weights_real.sum(1) * weights_fake.sum(1)
    return within(real, weights_real) + within(fake, weights_fake) - 2 * between


def _distances(
    a: Float[np.ndarray, 'n d'], b: Float[np.ndarray, 'm d']
) -> Float[np.ndarray, 'n m']:
    return torch.cdist(
        torch.from_numpy(a), torch.from_numpy(b), compute_mode='donot_use_mm_for_euclid_dist'
    ).numpy()


def neighbourhood_scores(
    real: Float[np.ndarray, 'n d'], fake: Float[np.ndarray, 'm d']
) -> dict[str, Float[np.ndarray, ' _']]:
    """Per-picture terms of precision, recall, density and coverage.

    Returns {'precision': [n_f], 'recall': [n_r], 'density': [n_f], 'coverage': [n_r]}; a score is
    the mean of its terms. Precision and recall after Kynkäänniemi et al. 2019 (3 neighbours),
    density and coverage after Naeem et al. 2020 (5). UserError with too few pictures.
    """
    if min(len(real), len(fake)) <= DC_NEIGHBOURS:
        raise UserError(
            f'{len(real)} real and {len(fake)} synthetic pictures are too few for '
            f'precision and coverage; give at least {DC_NEIGHBOURS + 1} of each'
        )
    radius_real = np.sort(_distances(real, real), axis=1)  # column 0 is the picture itself
    radius_fake = np.sort(_distances(fake, fake), axis=1)[:, PR_NEIGHBOURS]
    between = _distances(real, fake)
    wide = radius_real[:, DC_NEIGHBOURS, None]
    return {
        'precision': (between <= radius_real[:, PR_NEIGHBOURS, None]).any(0).astype(float),
        'recall': (between <= radius_fake).any(1).astype(float),
        'density': (between <= wide).sum(0) / DC_NEIGHBOURS,
        'coverage': (between.min(1) <= wide[:, 0]).astype(float),
    }


def _canonical(
    features: Float[np.ndarray, 'n d'],
) -> tuple[Float[np.ndarray, 'n d'], Int[np.ndarray, ' n']]:
    """Rows in an order that depends on their values only, and that order."""
    features = np.asarray(features, dtype=np.float64)
    order = np.lexsort(features[:, :8].T[::-1])
    return features[order], order


def _interval(
    value: float,
    draws: Sequence[float] | Float[np.ndarray, ' b'],
    level: float,
    most: float | None = None,
) -> dict[str, float]:
    """Bootstrap interval around `value`, within 0 to `most` where a `most` is given.

    Resampling repeats pictures, which shifts Fréchet distances upward; the spread of the draws
    is therefore centred on the estimate.
    """
    low, high = np.quantile(np.asarray(draws) - np.mean(draws), [(1 - level) / 2, (1 + level) / 2])
    low, high = value + low, value + high
    if most is not None:
        low, high = np.clip([low, high], 0, most)
    return {'value': float(value), 'low': float(low), 'high': float(high)}


def fidelity(
    real_features: Float[np.ndarray, 'n d'],
    fake_features: Float[np.ndarray, 'm d'],
    *,
    real_people: People = None,
    n_bootstrap: int = 100,
    seed: int = 0,
    level: float = 0.95,
) -> dict:
    """All statistics of two feature sets [n_r, d] and [n_f, d], with bootstrap intervals.

    real_people [n_r]: whose photograph each real picture is (None: each its own), the unit that
    is resampled and split; synthetic pictures are nobody's.

    Returns n_real, n_fake, dim, rank_deficient (fewer pictures than dimensions: the Fréchet
    distance is biased upward, prefer KID), fd, kid, precision, recall, density and coverage as
    {'value', 'low', 'high'}, and real_split: {'n_reference', 'n_sample', 'fd', 'kid'} of real
    pictures against other real ones, the best that could be reached at those sizes (None with
    fewer than 12 real pictures). The neighbourhood scores are resampled over the scored pictures,
    at fixed neighbourhoods.
    """
    real, order = _canonical(real_features)
    fake, _ = _canonical(fake_features)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f'features {real.shape} and {fake.shape} differ in dimension')
    terms = neighbourhood_scores(real, fake)
    n_real, n_fake, dim = len(real), len(fake), real.shape[1]
    deficient = min(n_real, n_fake) <= dim
    if deficient:
        log.warning(
            '%d real and %d synthetic pictures for %d feature dimensions: the Fréchet '
            'distance is biased upward; read it beside the real-against-real split, and '
            'prefer KID',
            n_real,
            n_fake,
            dim,
        )
    rng = numpy_generator(seed, 'bootstrap')
    people = None if real_people is None else np.asarray(real_people, dtype=str)[order]
    counts_real, counts_fake = (
        np.concatenate(list(draw_weights(who, n, n_bootstrap, rng)))
        for who, n in ((people, n_real), (None, n_fake))
    )
    result = {'n_real': n_real, 'n_fake': n_fake, 'dim': dim, 'rank_deficient': bool(deficient)}
    result |= _intervals(real, fake, terms, counts_real, counts_fake, level)
    result['real_split'] = _real_split(real, people, n_fake, seed)
    return result


def _intervals(
    real: Float[np.ndarray, 'n d'],
    fake: Float[np.ndarray, 'm d'],
    terms: dict[str, Float[np.ndarray, ' _']],
    counts_real: Num[np.ndarray, 'b n'],
    counts_fake: Num[np.ndarray, 'b m'],
    level: float,
) -> dict[str, dict[str, float]]:
    """fd, kid and the neighbourhood scores with the intervals of b draws of the pictures."""
    result = {}
    result['fd'] = _interval(
        distance_of_samples(real, fake),
        [
            distance_of_samples(
                np.repeat(real, r.astype(int), axis=0), np.repeat(fake, f.astype(int), axis=0)
            )
            for r, f in zip(counts_real, counts_fake)
        ],
        level,
        most=np.inf,
    )
    result['kid'] = _interval(
        kernel_distance(real, fake), _kernel_distances(real, fake, counts_real, counts_fake), level
    )
    for name, term in terms.items():
        counts = counts_real if name in ('recall', 'coverage') else counts_fake
        result[name] = _interval(
            term.mean(),
            counts @ term / counts.sum(1),
            level,
            most=np.inf if name == 'density' else 1,
        )
    return result


def _real_split(
    real: Float[np.ndarray, 'n d'], people: Shaped[np.ndarray, ' n'] | None, n_fake: int, seed: int
) -> dict[str, float] | None:
    """Mean statistics of random real-against-real splits at the synthetic sample's size.

    Nobody is on both sides: who is in the sample is left out of the reference.
    """
    n_sample = min(n_fake, len(real) // 2)
    if n_sample <= DC_NEIGHBOURS:
        return None
    rng, unit = numpy_generator(seed, 'real split'), unit_numbers(people, len(real))
    parts = []
    for _ in range(N_SPLITS):
        place = np.argsort(rng.permutation(unit.max() + 1))  # of every person in a random order
        sample = np.argsort(place[unit], kind='stable')[:n_sample]
        parts.append((real[~np.isin(unit, unit[sample])], real[sample]))
    n_reference = min(len(a) for a, _ in parts)
    if n_reference <= DC_NEIGHBOURS:
        return None
    return {
        'n_reference': n_reference,
        'n_sample': n_sample,
        'fd': float(np.mean([distance_of_samples(a, b) for a, b in parts])),
        'kid': float(np.mean([kernel_distance(a, b) for a, b in parts])),
    }


def check_metric_names(names: Iterable[str]) -> None:
    """UserError that lists unknown metric names."""
    unknown = [n for n in names if n not in METRICS]
    if unknown:
        raise UserError(
            f'unknown metric {", ".join(map(repr, unknown))}; known are '
            f'{", ".join(METRICS)}, or none (fid50k_full is fid here)'
        )


def compare_pictures(
    real: str | Path,
    fake: str | Path,
    network: Network,
    *,
    n_bootstrap: int = 100,
    seed: int = 0,
    device: torch.device | str = 'cpu',
    batch_size: int = 32,
) -> dict[str, Any]:
    """`fidelity` of two folders or ZIPs of pictures under one network."""
    features = [
        extract_features(
            network,
            read_pictures(Path(path), network.input_size),
            device=device,
            batch_size=batch_size,
        )
        for path in (real, fake)
    ]
    return fidelity(*features, n_bootstrap=n_bootstrap, seed=seed)
