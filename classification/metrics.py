"""Scores of a grader on labelled photographs."""
import warnings

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    cohen_kappa_score,
    confusion_matrix,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from utils.errors import UserError
from utils.seeds import numpy_generator

REFERABLE_FROM = 2    # referable diabetic retinopathy: moderate (grade 2) and worse


def check_test_labels(labels, *, positive_from=REFERABLE_FROM):
    """UserError when grades [n] cannot be scored: all alike, or on one side of the threshold."""
    found = sorted({int(v) for v in labels})
    if len(found) < 2:
        raise UserError(f'the test set holds only grade {found[0] if found else "(none)"}; kappa '
                        'and AUC need at least two grades, so add photographs of other grades')
    for threshold in sorted({positive_from, REFERABLE_FROM}):
        if found[-1] < threshold or found[0] >= threshold:
            raise UserError(f'the test set holds grades {", ".join(map(str, found))} only, all '
                            f'on one side of grade {threshold}, so the AUC is undefined; add '
                            'photographs of the other side')


def quadratic_kappa(labels, predicted, *, n_classes):
    """Quadratic weighted kappa; 0 where it is undefined (both constant and equal)."""
    with warnings.catch_warnings(), np.errstate(invalid='ignore', divide='ignore'):
        warnings.simplefilter('ignore')
        value = cohen_kappa_score(labels, predicted, labels=range(n_classes),
                                  weights='quadratic')
    return float(value) if np.isfinite(value) else 0.0


def grading_metrics(labels, predicted, score, *, n_classes=5, positive_from=None):
    """Scores of predictions on grades.

    labels: true grades [n]. predicted: predicted grades [n]; with `positive_from`, 0 or 1 for
    grade >= positive_from. score: any number [n] that grows with the severity. Returns accuracy,
    balanced_accuracy (mean recall of the grades that occur), kappa (quadratic), auc_referable
    (grade >= 2), with `positive_from` also auc (grade >= positive_from), n and confusion (row:
    truth). An AUC is None where the labels hold one side only.
    """
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    score = np.asarray(score, dtype=np.float64)
    truth = labels if positive_from is None else (labels >= positive_from).astype(np.int64)
    classes = n_classes if positive_from is None else 2
    values = {
        'n': len(labels),
        'accuracy': float(accuracy_score(truth, predicted)),
        'balanced_accuracy': float(recall_score(truth, predicted, labels=np.unique(truth),
                                                average='macro', zero_division=0)),
        'kappa': quadratic_kappa(truth, predicted, n_classes=classes),
        'auc_referable': _auc(labels >= REFERABLE_FROM, score),
    }
    if positive_from is not None:
        values['auc'] = _auc(truth == 1, score)
    values['confusion'] = confusion_matrix(truth, predicted, labels=range(classes)).tolist()
    return values


def _auc(positive, score):
    return float(roc_auc_score(positive, score)) if 0 < positive.sum() < len(positive) else None


def referable_roc(labels, score, *, positive_from=REFERABLE_FROM):
    """(false positive rates, true positive rates) for grade >= positive_from."""
    fpr, tpr, _ = roc_curve(np.asarray(labels) >= positive_from, score)
    return fpr, tpr


def bootstrap_intervals(labels, predicted, score, *, groups=None, n_bootstrap=500, seed=0,
                        level=0.95, **options):
    """Percentile intervals {metric: [low, high]} of `grading_metrics`, resampling people.

    groups: one hashable per image (the patient); whole groups are drawn, so that two eyes of a
    person are not counted as two independent observations. Draws with one class only are
    skipped for the AUC.
    """
    labels, predicted, score = np.asarray(labels), np.asarray(predicted), np.asarray(score)
    members = [np.array([i]) for i in range(len(labels))]
    if groups is not None:
        _, inverse = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        members = [np.flatnonzero(inverse == g) for g in range(inverse.max() + 1)]
    rng = numpy_generator(seed, 'bootstrap')
    draws = {}
    for _ in range(n_bootstrap):
        pick = np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))])
        found = grading_metrics(labels[pick], predicted[pick], score[pick], **options)
        for name, value in found.items():
            if isinstance(value, float):
                draws.setdefault(name, []).append(value)
    tail = (1 - level) / 2
    return {name: [float(v) for v in np.quantile(values, [tail, 1 - tail])]
            for name, values in draws.items()}


def summarise(values):
    """{'mean', 'std' (n - 1), 'values'} of one number per seed; None when one is missing."""
    if any(v is None for v in values):
        return None
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {'mean': float(np.mean(values)), 'std': spread, 'values': list(values)}
