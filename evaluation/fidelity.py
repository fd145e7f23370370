"""How much synthetic pictures look like real ones: Fréchet distance, KID, precision, coverage.

Features are those of evaluation/features.py: of Inception ('fid') or of the content encoder
('fd_fundus').

Shapes: n_r real and n_f synthetic pictures, feature dimension d.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Num, Shaped, UInt8
from torch import Tensor

from datasets.archive import ImageArchive
from evaluation.bootstrap import People, draw_weights, unit_numbers
from evaluation.features import Network, extract_features, load_feature_network, read_pictures
from models.stylegan2 import Generator
from utils import distributed
from utils.errors import UserError
from utils.images import to_uint8
from utils.io import save_npy, sha256_bytes
from utils.seeds import numpy_generator, torch_generator

log = logging.getLogger(__name__)

METRICS = ('fd_fundus', 'kid_fundus', 'fid', 'kid')
PR_NEIGHBOURS = 3  # Kynkäänniemi et al. 2019
DC_NEIGHBOURS = 5  # Naeem et al. 2020
N_SPLITS = 5
_PART = 512  # pictures that a process takes at a time


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


def _distance_of_samples(real: Float[np.ndarray, 'n d'], fake: Float[np.ndarray, 'm d']) -> float:
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
        _distance_of_samples(real, fake),
        [
            _distance_of_samples(
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
        'fd': float(np.mean([_distance_of_samples(a, b) for a, b in parts])),
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


def _feature_file(network: Network, dataset: ImageArchive, folder: Path) -> Path:
    """Where the archive's features are kept, named after its content and the network's weights."""
    weights = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        weights.update(name.encode() + value.cpu().numpy().tobytes())
    key = sha256_bytes(f'{dataset.digest()} {weights.hexdigest()} {network.input_size}'.encode())
    return folder / f'real-features-{key[:16]}.npy'


def _kept_features(path: Path | None) -> Float[np.ndarray, 'n d'] | None:
    """What `path` holds, or None where it cannot be read."""
    if path is None or not path.is_file():
        return None
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        log.warning('%s cannot be read (%s) and is made again', path, error)
        return None


def _real_features(
    network: Network,
    dataset: ImageArchive,
    folder: Path | None,
    *,
    device: torch.device,
    batch_size: int,
) -> Float[np.ndarray, 'n d'] | None:
    """Features [n, d] of the archive's pictures, in process 0; None in the others.

    Computed by all processes, and kept in `folder` under their content's name.
    """
    main = distributed.is_main()
    path = _feature_file(network, dataset, Path(folder)) if main and folder is not None else None
    kept = _kept_features(path)
    if distributed.from_main(lambda: kept is not None):
        return kept
    n = len(dataset.names)
    parts = distributed.by_turns(
        np.array_split(np.arange(n), -(-n // _PART)),
        lambda part: extract_features(
            network, dataset.images(part), device=device, batch_size=batch_size
        ),
    )
    found = _in_main(parts)
    if path is not None and found is not None:
        save_npy(path, found)
    return found


def _in_main(parts: Iterable[Float[np.ndarray, '_ d']]) -> Float[np.ndarray, 'n d'] | None:
    """All rows in process 0; the others only take part."""
    kept = [part for part in parts if distributed.is_main()]
    return np.concatenate(kept) if kept else None


@torch.no_grad()
def _features_of_samples(
    networks: dict[str, Network],
    generator: Generator,
    z: Float[Tensor, 'n D'],
    device: torch.device,
    batch_size: int,
) -> dict[str, Float[np.ndarray, 'n d']]:
    """What every network sees of the pictures of z."""
    pictures = torch.cat([to_uint8(generator(p.to(device))).cpu() for p in z.split(batch_size)])
    return {
        kind: extract_features(network, pictures, device=device, batch_size=batch_size)
        for kind, network in networks.items()
    }


def training_metric(
    names: Sequence[str],
    dataset: ImageArchive,
    *,
    n_images: int,
    content_weights: Path | None = None,
    inception_weights: Path | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> Callable[..., dict[str, float]]:
    """A function (generator, device, folder=None) -> {name: number}, for snapshots of a training.

    All processes of a training call it and share the work; process 0 gets the numbers, the others
    nothing.

    names: of METRICS. dataset: ImageArchive with the real pictures, all of which are used once,
    without the mirror images that a training adds.
    n_images generated pictures from fixed seeds, stored noise. Networks are read here, so that
    missing files fail before training; real features are computed on the first call and kept, in
    memory and, named after their content, as files of `folder`, for a resumed training.
    """
    check_metric_names(names)
    kinds = {name: 'fundus' if name.endswith('_fundus') else 'inception' for name in names}
    networks = {
        kind: load_feature_network(
            metric=name, content_weights=content_weights, inception_weights=inception_weights
        )
        for name, kind in kinds.items()
    }
    real: dict[str, np.ndarray | None] = {}

    def metric(
        generator: Generator, device: torch.device, folder: Path | None = None
    ) -> dict[str, float]:
        z = torch.randn(
            n_images, generator.style_dim, generator=torch_generator(seed, 'metric images')
        )

        def features(part: Float[Tensor, 'n D']) -> dict[str, np.ndarray]:
            return _features_of_samples(networks, generator, part, device, batch_size)

        for kind, network in networks.items():
            if kind not in real:
                real[kind] = _real_features(
                    network, dataset, folder, device=device, batch_size=batch_size
                )
        # Whole batches, so that the number of processes changes none.
        parts = distributed.by_turns(z.split(batch_size * max(1, _PART // batch_size)), features)
        found = [part for part in parts if distributed.is_main()]
        for network in networks.values():
            network.cpu()
        if not found:
            return {}
        return {
            name: (_distance_of_samples if name.startswith('f') else kernel_distance)(
                cast(np.ndarray, real[kind]), np.concatenate([part[kind] for part in found])
            )
            for name, kind in kinds.items()
        }

    return metric


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
