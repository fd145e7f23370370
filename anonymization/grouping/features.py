"""Features [n, d] on disk or in memory: order, reduction, squared errors."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from utils.errors import UserError
from utils.logs import progress
from utils.seeds import torch_generator

log = logging.getLogger(__name__)

AUTO_REDUCE_ELEMENTS = 2**28  # features above 1 GiB of float32 are reduced by 'auto'
AUTO_REDUCE_DIMS = 256


def as_matrix(
    features: Float[np.ndarray, 'n ...'] | Float[Tensor, 'n ...'],
) -> Float[np.ndarray, 'n d']:
    """[n, d] numpy view of the features, without reading a memory-mapped file."""
    if isinstance(features, torch.Tensor):
        features = features.detach().cpu().numpy()
    if not isinstance(features, np.ndarray):
        features = np.asarray(features)
    if features.ndim < 2 or 0 in features.shape:
        raise UserError(f'features must be [n, d] with n, d > 0, got shape {features.shape}')
    if features.dtype.kind not in 'fiu':
        raise UserError(f'features must be real numbers, got {features.dtype}')
    return features.reshape(len(features), -1)


def block_rows(features: Float[np.ndarray, 'n d'], itemsize: int) -> int:
    """Rows per block of about 64 MiB."""
    return max(1, 2**26 // (features.shape[1] * itemsize))


def row_hashes(features: Float[np.ndarray, 'n d']) -> Shaped[np.ndarray, ' n']:
    """[n] array of 16-byte digests: a canonical order that does not depend on the row order."""
    digests = np.empty(len(features), dtype='S32')
    bad = []
    step = block_rows(features, 4)
    for start in progress(range(0, len(features), step), desc='reading features'):
        block = np.ascontiguousarray(features[start : start + step])
        bad += (start + np.flatnonzero(~np.isfinite(block).all(1))).tolist()
        for i, row in enumerate(block):
            digests[start + i] = hashlib.blake2b(row, digest_size=16).hexdigest()
    if bad:
        raise UserError(
            f'features of {len(bad)} images are not finite, first rows {bad[:5]} (counted from 0)'
        )
    return digests


def load_features(
    features: Float[np.ndarray, 'n d'],
    hashes: Shaped[np.ndarray, ' n'],
    reduce: int | str | None,
    seed: int,
    device: torch.device | str,
) -> tuple[Float[np.ndarray, 'n D'], dict[str, Any] | None]:
    """(features to group by, reduction facts or None); reduced: scores of a randomised PCA."""
    n, d = features.shape
    if reduce == 'auto':
        reduce = AUTO_REDUCE_DIMS if n * d > AUTO_REDUCE_ELEMENTS else None
    if not isinstance(reduce, int) or reduce >= min(n, d):
        return features, None
    return _random_pca(features, np.argsort(hashes, kind='stable'), reduce, seed, device)


def _random_pca(
    features: Float[np.ndarray, 'n d'],
    order: Int[np.ndarray, ' n'],
    dims: int,
    seed: int,
    device: torch.device | str,
    sample: int = 20000,
    iterations: int = 3,
) -> tuple[Float[np.ndarray, 'n {dims}'], dict[str, Any]]:
    """Scores [n, dims] on the leading principal directions, and {dims, of, kept_variance}.

    Subspace iteration with the covariance (Halko, Martinsson and Tropp, 2011) on `sample` rows;
    `order` (by hash) makes the sample random and the result independent of the row order.
    """
    n, d = features.shape
    step = block_rows(features, 4)

    def blocks(
        rows: Int[np.ndarray, ' r'], mean: Float[Tensor, ' d'] | None = None
    ) -> Iterator[tuple[int, Float[Tensor, 'b d']]]:
        for start in range(0, len(rows), step):
            index = rows[start : start + step]
            block = torch.from_numpy(np.asarray(features[index], np.float32)).to(device)
            yield start, block if mean is None else block - mean

    chosen = order[:sample]
    mean = torch.zeros(d, dtype=torch.float64, device=device)
    for _, block in blocks(chosen):
        mean += block.double().sum(0)
    mean = (mean / len(chosen)).float()
    width = min(dims + 16, d, n)
    generator = torch_generator(seed, 'reduction')
    basis = torch.randn(d, width, generator=generator).to(device)
    for _ in progress(range(iterations), desc='reducing features'):
        product = torch.zeros(d, width, device=device)
        for _, block in blocks(chosen, mean):
            product += block.T @ (block @ basis)
        basis = torch.linalg.qr(product).Q
    small = torch.zeros(width, width, device=device, dtype=torch.float64)
    for _, block in blocks(chosen, mean):
        scores = (block @ basis).double()
        small += scores.T @ scores
    basis = basis @ torch.linalg.eigh(small).eigenvectors[:, -dims:].float()
    scores = torch.empty(n, dims, device=device)
    total, sums = 0.0, torch.zeros(d, dtype=torch.float64, device=device)
    for start, block in blocks(order, mean):
        scores[torch.from_numpy(order[start : start + step]).to(device)] = block @ basis
        total += block.double().square().sum().item()
        sums += block.double().sum(0)
    variance = total - (sums.square().sum() / n).item()
    kept = (scores - scores.mean(0)).double().square().sum().item() / variance
    log.info(
        'features reduced from %d to %d dimensions, %.2f %% of the variance kept',
        d,
        dims,
        100 * kept,
    )
    return scores.cpu().numpy(), {'dims': dims, 'of': d, 'kept_variance': kept}


def with_grades(
    features: Float[np.ndarray, 'n d'],
    grades: Sequence[int] | Int[np.ndarray, ' n'] | None,
    penalty: float,
) -> Float[np.ndarray, 'n e']:
    """Features [n, d + 1] with the grades [n] as one more direction.

    Its variance is `penalty` times the total variance of the features. UserError without grades.
    """
    if grades is None:
        raise UserError('`grade_penalty` needs a grade column in the table')
    if not 0 <= penalty < np.inf:
        raise UserError(f'`grade_penalty` {penalty}: want a number, 0 or more')
    x = np.asarray(features, np.float32)
    grade = np.asarray(grades, np.float64)
    total = float(x.var(axis=0, dtype=np.float64).sum())
    spread = grade.std()
    scale = np.sqrt(penalty * total) / spread if spread > 0 else 0.0
    return np.column_stack([x, (scale * (grade - grade.mean())).astype(np.float32)])


def squared_errors(
    features: Float[np.ndarray, 'n d'], numbers: Int[np.ndarray, ' n']
) -> tuple[float, float]:
    """(SSE, SST) of grouped rows in float64: within groups, and around the mean of all of them.

    Reads the rows group by group, so that a memory-mapped file stays on disk.
    """
    order = np.flatnonzero(numbers)
    order = order[np.argsort(numbers[order], kind='stable')]
    sse, square_sum, total = 0.0, 0.0, np.zeros(features.shape[1])
    starts = np.searchsorted(numbers[order], np.arange(1, numbers.max() + 2))
    first = 0
    while first < len(starts) - 1:
        last = max(
            np.searchsorted(starts, starts[first] + block_rows(features, 8), 'right') - 1, first + 1
        )
        rows = order[starts[first] : starts[last]]
        block = np.asarray(features[rows], np.float64)
        if first == 0:
            origin = block.mean(0)  # near the data, so that the difference of sums keeps digits
        block -= origin
        local = starts[first:last] - starts[first]
        sums = np.add.reduceat(block, local, axis=0)
        sizes = np.diff(np.append(local, len(rows)))
        squares = np.einsum('ij,ij->', block, block)
        means = np.repeat(sums / sizes[:, None], sizes, axis=0)
        block -= means
        sse += np.einsum('ij,ij->', block, block)
        square_sum += squares
        total += sums.sum(0)
        first = last
    return float(sse), float(square_sum - total @ total / len(order))
