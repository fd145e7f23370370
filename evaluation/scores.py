"""How well numbers separate two sides and grades agree: one AUC, ROC and kappa for all uses.

Shapes: n scored things, of which some are on the positive side; b weightings of them.
"""

import numpy as np
from jaxtyping import Bool, Float, Num


def weighted_auc(
    positive: Bool[np.ndarray, ' n'], score: Num[np.ndarray, ' n'], weights: Num[np.ndarray, 'b n']
) -> Float[np.ndarray, ' b']:
    """Area under the ROC curve per weighting [b], ties counted half; NaN with one side only.

    positive: bool [n]; score: float [n]; weights [b, n]: how often each thing counts, 0 or more.
    """
    order = np.argsort(score, kind='stable')
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf))
    pos, neg = (
        np.add.reduceat((weights * side)[:, order], starts, axis=1)
        for side in (positive, ~positive)
    )
    below = np.cumsum(neg, axis=1) - neg / 2
    pairs = pos.sum(1) * neg.sum(1)
    return np.divide((pos * below).sum(1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def auc(positive: Num[np.ndarray, ' n'], negative: Num[np.ndarray, ' m']) -> float:
    """Probability that a positive scores above a negative, ties counted half."""
    side = np.repeat([True, False], [len(positive), len(negative)])
    return float(
        weighted_auc(
            side, np.concatenate([positive, negative]).astype(np.float64), np.ones((1, len(side)))
        )[0]
    )


def roc(
    positive: Num[np.ndarray, ' n'], negative: Num[np.ndarray, ' m']
) -> tuple[Float[np.ndarray, ' t'], Float[np.ndarray, ' t']]:
    """(false positive rates, true positive rates) over all thresholds, from (0, 0) to (1, 1)."""
    cuts = np.unique(np.concatenate([positive, negative]))[::-1]
    fpr, tpr = (
        np.searchsorted(np.sort(-np.asarray(s, np.float64)), -cuts, side='right') / len(s)
        for s in (negative, positive)
    )
    return np.concatenate([[0.0], fpr]), np.concatenate([[0.0], tpr])


def quadratic_kappa(confusion: Num[np.ndarray, 'b C C']) -> Float[np.ndarray, ' b']:
    """Quadratic weighted kappa of confusion matrices [b, C, C], [b]; 0 where it is undefined.

    Row: truth.
    """
    grade = np.arange(confusion.shape[1])
    penalty = np.subtract.outer(grade, grade) ** 2
    total = confusion.sum((1, 2))
    chance = np.einsum('bi,bj->bij', confusion.sum(2), confusion.sum(1))
    seen, expected = ((penalty * m).sum((1, 2)) for m in (confusion, chance))
    # No penalty is possible by chance when truth and prediction are one and the same grade.
    return 1 - np.divide(seen * total, expected, out=np.ones_like(total), where=expected > 0)
