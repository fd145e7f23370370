"""Scores of a grader on labelled photographs.

One implementation serves single scores and bootstrap intervals: everything is computed for many
weightings of the photographs at once.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Num

from datasets.table import REFERABLE_FROM
from evaluation.bootstrap import People, draw_weights, percentiles
from evaluation.scores import quadratic_kappa, weighted_auc
from utils.errors import UserError
from utils.seeds import numpy_generator

Numbers = Sequence[float] | np.ndarray


def check_test_labels(
    labels: Sequence[int] | Int[np.ndarray, ' n'], *, positive_from: int = REFERABLE_FROM
) -> None:
    """UserError when grades [n] cannot be scored: all alike, or on one side of the threshold."""
    found = sorted({int(v) for v in labels})
    if len(found) < 2:
        raise UserError(
            f'the test set holds only grade {found[0] if found else "(none)"}; kappa '
            'and AUC need at least two grades, so add photographs of other grades'
        )
    for threshold in sorted({positive_from, REFERABLE_FROM}):
        if found[-1] < threshold or found[0] >= threshold:
            raise UserError(
                f'the test set holds grades {", ".join(map(str, found))} only, all '
                f'on one side of grade {threshold}, so the AUC is undefined; add '
                'photographs of the other side'
            )


def grading_metrics(
    labels: Numbers,
    predicted: Numbers,
    score: Numbers,
    *,
    n_classes: int = 5,
    positive_from: int | None = None,
) -> dict:
    """Scores of predictions on grades.

    labels: true grades [n]. predicted: predicted grades [n]; with `positive_from`, 0 or 1 for
    grade >= positive_from. score: any number [n] that grows with the severity. Returns accuracy,
    balanced_accuracy (mean recall of the grades that occur), kappa (quadratic, 0 where it is
    undefined), auc_referable (grade >= 2), with `positive_from` also auc (grade >=
    positive_from), n and confusion (row: truth). An AUC is None where the labels hold one side
    only.
    """
    found, confusion = _weighted_scores(
        labels, predicted, score, np.ones((1, len(labels))), n_classes, positive_from
    )
    values = {name: float(v[0]) if np.isfinite(v[0]) else None for name, v in found.items()}
    return {'n': len(labels), **values, 'confusion': confusion[0].astype(int).tolist()}


def _weighted_scores(
    labels: Numbers,
    predicted: Numbers,
    score: Numbers,
    weights: Num[np.ndarray, 'b n'],
    n_classes: int,
    positive_from: int | None,
) -> tuple[dict[str, Float[np.ndarray, ' b']], Num[np.ndarray, 'b C C']]:
    """Scores {name: [b]} and confusion [b, C, C] with photograph i counted weights[b, i] times."""
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    score = np.asarray(score, dtype=np.float64)
    truth = labels if positive_from is None else (labels >= positive_from).astype(np.int64)
    classes = n_classes if positive_from is None else 2
    cells = np.eye(classes**2)[truth * classes + predicted]
    confusion = (weights @ cells).reshape(-1, classes, classes)
    total, true = confusion.sum((1, 2)), confusion.sum(2)
    right = np.diagonal(confusion, axis1=1, axis2=2)
    recall = np.divide(right, true, out=np.full_like(right, np.nan), where=true > 0)
    found = {
        'accuracy': right.sum(1) / total,
        'balanced_accuracy': np.nanmean(recall, axis=1),
        'kappa': quadratic_kappa(confusion),
        'auc_referable': weighted_auc(labels >= REFERABLE_FROM, score, weights),
    }
    if positive_from is not None:
        found['auc'] = weighted_auc(truth == 1, score, weights)
    return found, confusion


def bootstrap_intervals(
    labels: Numbers,
    predicted: Numbers,
    score: Numbers,
    *,
    groups: People = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    n_classes: int = 5,
    positive_from: int | None = None,
) -> dict[str, list[float]]:
    """Percentile intervals {metric: [low, high]} of `grading_metrics`, resampling people.

    groups: one hashable per image (the patient); whole groups are drawn, so that two eyes of a
    person are not counted as two independent observations. Draws in which a score is undefined
    are left out of its interval.
    """
    found_by: dict[str, list[np.ndarray]] = {}
    rng = numpy_generator(seed, 'bootstrap')
    for weights in draw_weights(groups, len(labels), n_bootstrap, rng):
        found, _ = _weighted_scores(labels, predicted, score, weights, n_classes, positive_from)
        for name, values in found.items():
            found_by.setdefault(name, []).append(values)
    draws = {name: np.concatenate(values) for name, values in found_by.items()}
    return {
        name: list(percentiles(values, level))
        for name, values in draws.items()
        if np.isfinite(values).any()
    }


def summarise(values: Sequence[float | None]) -> dict | None:
    """{'mean', 'std' (n - 1), 'values'} of one number per seed; None when one is missing."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return None
    spread = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return {'mean': float(np.mean(known)), 'std': spread, 'values': known}
