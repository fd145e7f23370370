"""Graders for a few hundred pictures: linear models on frozen features, fitted in seconds.

A probe learns the referable share and the mean grade of pictures from their pooled features.
Targets are shares of the grades (soft labels; one-hot for a photograph). Class imbalance: the two
sides of the referable threshold weigh alike in the fit of the logistic probe, whose intercept is
then moved back, so that its probabilities have the training set's own frequency; grades are read
off with thresholds that give every grade the frequency it has in the training set. How strongly
the model is held back is chosen by cross-validation over people.

Shapes: n pictures, F features, C grades.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int, Int64, Num, UInt8
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold

from datasets.table import REFERABLE_FROM
from evaluation.bootstrap import People, draw_weights, percentiles, unit_numbers
from models.features.pretrained import FeatureNetwork
from utils.errors import UserError
from utils.images import from_uint8
from utils.logs import progress
from utils.seeds import numpy_generator

log = logging.getLogger(__name__)

KINDS = ('logistic', 'ridge')
_STRENGTHS = {
    'logistic': np.geomspace(1e-5, 1, 6),  # C
    'ridge': np.geomspace(1e5, 1e0, 6),
}  # alpha, from the strictest on as well
_FOLDS = 5
_TINY = 1e-9


@torch.no_grad()
def pooled_features(
    network: FeatureNetwork,
    pictures: UInt8[np.ndarray, 'n 3 S S'],
    *,
    device: torch.device | str = 'cpu',
    batch_size: int = 32,
) -> Float32[np.ndarray, 'n F']:
    """Unit vectors float32 [n, F] of uint8 pictures [n, 3, S, S], S at least 64 px (UserError)."""
    network = network.to(device)
    parts = [
        network.pooled(
            from_uint8(
                torch.as_tensor(np.ascontiguousarray(pictures[i : i + batch_size])).to(device)
            )
        ).cpu()
        for i in progress(range(0, len(pictures), batch_size), desc='features', unit='batch')
    ]
    return torch.cat(parts).numpy()


class Probe(NamedTuple):
    """A fitted probe: standardisation [F], two linear models and thresholds between the grades.

    kind: of the referable score. strength: chosen C (logistic) or alpha (ridge); grade_strength:
    alpha of the grades' ridge regression.
    """

    kind: str
    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray  # [F]
    intercept: float
    grade_weights: np.ndarray  # [F]
    grade_intercept: float
    thresholds: np.ndarray  # [C - 1]
    strength: float
    grade_strength: float

    def score(self, features: Float[np.ndarray, 'n F']) -> Float64[np.ndarray, ' n']:
        """How far pictures [n, F] look referable, float64 [n].

        A probability (logistic) or an estimate of the referable share that may leave 0 to 1
        (ridge).
        """
        raw = self._standard(features) @ self.weights + self.intercept
        return 1 / (1 + np.exp(-raw)) if self.kind == 'logistic' else raw

    def grades(self, features: Float[np.ndarray, 'n F']) -> Int64[np.ndarray, ' n']:
        """Grades int64 [n], 0 to C - 1."""
        raw = self._standard(features) @ self.grade_weights + self.grade_intercept
        return np.searchsorted(self.thresholds, raw, side='right').astype(np.int64)

    def directions(self, features: Float[np.ndarray, 'n F']) -> Float64[np.ndarray, 'F 2']:
        """Along which score and grade grow in features [n, F], each of spread 1 there."""
        found = np.stack([self.weights, self.grade_weights], 1) / self.scale[:, None]
        return found / np.maximum((features @ found).std(0), _TINY)

    def _standard(self, features: Float[np.ndarray, 'n F']) -> Float64[np.ndarray, 'n F']:
        return (np.asarray(features, np.float64) - self.mean) / self.scale


def fit_probe(
    features: Float[np.ndarray, 'n F'],
    shares: Num[np.ndarray, 'n C'],
    *,
    people: People = None,
    kind: str = 'logistic',
    seed: int = 0,
) -> Probe:
    """Fits a probe to features [n, F] and shares of the grades [n, C].

    people [n]: whom each picture shows (None: each its own), for the cross-validation. UserError
    where all pictures are on one side of the referable threshold, or all of one person.
    """
    if kind not in KINDS:
        raise ValueError(f'kind={kind!r}, want one of {KINDS}')
    shares = np.asarray(shares, np.float64)
    referable, grade = shares[:, REFERABLE_FROM:].sum(1), shares @ np.arange(shares.shape[1])
    if referable.max() < _TINY or referable.min() > 1 - _TINY or np.ptp(referable) < _TINY:
        raise UserError(
            f'all {len(shares)} training pictures have the same share of referable '
            f'retinopathy ({referable[0]:.2f}), so there is nothing to learn; add '
            'pictures of the other side'
        )
    x = np.asarray(features, np.float64)
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > _TINY, scale, 1.0)
    x = (x - mean) / scale
    folds = list(_folds(people, len(x), seed))
    strength = _chosen(_MODELS[kind], _STRENGTHS[kind], x, referable, folds)
    weights, intercept = _MODELS[kind](x, referable, strength)
    if kind == 'logistic':  # back from even odds to those of the training set
        rate = referable.mean()
        intercept += np.log(rate / (1 - rate))
    grade_strength = _chosen(_ridge, _STRENGTHS['ridge'], x, grade, folds)
    unseen = _unseen(_ridge, grade_strength, x, grade, folds)
    cuts = np.quantile(unseen, np.clip(np.cumsum(shares.mean(0))[:-1], 0, 1))
    return Probe(
        kind,
        mean,
        scale,
        weights,
        float(intercept),
        *_ridge(x, grade, grade_strength),
        thresholds=cuts,
        strength=float(strength),
        grade_strength=float(grade_strength),
    )


def _folds(
    people: People, n: int, seed: int
) -> Iterator[tuple[Int[np.ndarray, ' _'], Int[np.ndarray, ' _']]]:
    unit = unit_numbers(people, n)
    count = int(unit.max()) + 1
    if count < 2:
        raise UserError('all training pictures show one person; add pictures of others')
    split = GroupKFold(min(_FOLDS, count), shuffle=True, random_state=seed)
    return split.split(np.empty(n), groups=unit)


def _logistic(
    x: Float[np.ndarray, 'n F'], target: Float[np.ndarray, ' n'], strength: float
) -> tuple[Float[np.ndarray, ' F'], float]:
    """Weights and intercept of a logistic regression on shares, both sides weighing alike."""
    rows = [np.flatnonzero(part > _TINY) for part in (target, 1 - target)]
    parts = [target[rows[0]], (1 - target)[rows[1]]]
    sample = np.concatenate([p * len(x) / (2 * p.sum()) for p in parts])
    model = LogisticRegression(C=strength, max_iter=500)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ConvergenceWarning)
        model.fit(x[np.concatenate(rows)], np.repeat([1, 0], [len(r) for r in rows]), sample)
    return model.coef_[0], float(model.intercept_[0])


def _ridge(
    x: Float[np.ndarray, 'n F'], target: Float[np.ndarray, ' n'], strength: float
) -> tuple[Float[np.ndarray, ' F'], float]:
    model = Ridge(alpha=strength).fit(x, target)
    return model.coef_, float(model.intercept_)


_Model = Callable[[np.ndarray, np.ndarray, float], tuple[np.ndarray, float]]
_MODELS: dict[str, _Model] = {'logistic': _logistic, 'ridge': _ridge}


def _unseen(
    model: _Model,
    strength: float,
    x: Float[np.ndarray, 'n F'],
    target: Float[np.ndarray, ' n'],
    folds: list,
) -> Float[np.ndarray, ' n']:
    """Linear predictions [n], each by a model that saw none of the person."""
    found = np.full(len(x), np.nan)
    for train, test in folds:
        if model is _logistic and not 0 < target[train].mean() < 1:
            continue  # one side only: nothing to fit
        weights, intercept = model(x[train], target[train], strength)
        found[test] = x[test] @ weights + intercept
    return found


def _chosen(
    model: _Model,
    strengths: Float[np.ndarray, ' s'],
    x: Float[np.ndarray, 'n F'],
    target: Float[np.ndarray, ' n'],
    folds: list,
) -> float:
    """The strength with the least loss on unseen people; the strictest of equals."""
    losses = []
    for strength in strengths:
        raw = _unseen(model, strength, x, target, folds)
        known = np.isfinite(raw)
        raw, want = raw[known], target[known]
        if model is _logistic:
            up, down = want / max(want.sum(), _TINY), (1 - want) / max((1 - want).sum(), _TINY)
            loss = up @ np.logaddexp(0, -raw) + down @ np.logaddexp(0, raw)
        else:
            loss = np.mean((raw - want) ** 2)
        losses.append(loss)
    best = int(np.argmin(losses))
    log.debug('strengths %s, losses %s', strengths, losses)
    return float(strengths[best])


class Reading(NamedTuple):
    """How a grader trained on photographs reads a release; each entry {value, low, high}.

    correlation: of its score with the pictures' shares. slope: of the shares on the score (1:
    calibrated; 0: the score says nothing; above 1: it is too cautious). shift: mean score minus
    mean share.
    """

    correlation: dict[str, float]
    slope: dict[str, float]
    shift: dict[str, float]


def read_release(
    score: Float[np.ndarray, ' n'],
    share: Num[np.ndarray, ' n'],
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Reading:
    """Compares scores [n] of release pictures with the groups' referable shares [n].

    Intervals resample the pictures, behind each of which stand people of its own. A correlation
    or slope is NaN where scores or shares are all alike.
    """
    rng = numpy_generator(seed, 'reading')
    score, share = np.asarray(score, np.float64), np.asarray(share, np.float64)
    draws = np.concatenate(
        [_moments(score, share, w) for w in draw_weights(None, len(score), n_bootstrap, rng)], 1
    )
    values = _moments(score, share, np.ones((1, len(score))))[:, 0]
    # A value without a meaning has no interval either.
    return Reading(
        *(
            {
                'value': float(v),
                **dict(
                    zip(
                        ('low', 'high'),
                        percentiles(d, level) if np.isfinite(v) else (float('nan'),) * 2,
                    )
                ),
            }
            for v, d in zip(values, draws)
        )
    )


def _moments(
    score: Float[np.ndarray, ' n'], share: Num[np.ndarray, ' n'], weights: Num[np.ndarray, 'b n']
) -> Float[np.ndarray, '3 b']:
    """Correlation, slope and shift per weighting: [3, b]."""
    weights = weights / weights.sum(1, keepdims=True)
    means = weights @ score, weights @ share
    both = weights @ (score * share) - means[0] * means[1]
    spread = [weights @ v**2 - m**2 for v, m in zip((score, share), means)]
    with np.errstate(divide='ignore', invalid='ignore'):
        usable = (spread[0] > _TINY**2) & (spread[1] > _TINY**2)
        correlation = np.where(usable, both / np.sqrt(spread[0] * spread[1]), np.nan)
        slope = np.where(spread[0] > _TINY**2, both / spread[0], np.nan)
    return np.stack([correlation, slope, means[0] - means[1]])
