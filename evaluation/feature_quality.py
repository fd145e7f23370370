"""What do image features carry: the disease, or the person?

Shapes: features [n, F] unit vectors; labels int64 [n]; patients, eyes lists of n strings.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from datasets.table import REFERABLE_FROM
from evaluation.scores import auc, quadratic_kappa


def nearest_neighbours(
    features: Float[np.ndarray, 'n F'],
    *,
    groups: Shaped[np.ndarray, ' n'] | None = None,
    block: int = 2048,
) -> Int[np.ndarray, ' n']:
    """Index of each row's most similar other row, [n]; -1 when there is none.

    groups [n]: neighbours of the row's own group do not count.
    """
    found = np.full(len(features), -1)
    for start in range(0, len(features), block):
        rows = np.arange(start, min(start + block, len(features)))
        similarity = features[rows] @ features.T
        similarity[np.arange(len(rows)), rows] = -np.inf
        if groups is not None:
            similarity[groups[rows][:, None] == groups] = -np.inf
        best = similarity.argmax(1)
        usable = np.isfinite(similarity[np.arange(len(rows)), best])
        found[rows] = np.where(usable, best, -1)
    return found


def chance_to_share(values: Shaped[np.ndarray, ' n']) -> float:
    """Probability that a randomly drawn other row has the row's own value."""
    _, counts = np.unique(values, return_counts=True)
    n = counts.sum()
    return float((counts * (counts - 1)).sum() / (n * (n - 1)))


def neighbour_quality(
    features: Float[np.ndarray, 'n F'],
    *,
    labels: Int[np.ndarray, ' n'] | None = None,
    patients: Sequence[str] | None = None,
    eyes: Sequence[str] | None = None,
) -> dict:
    """Shares of nearest neighbours (cosine) with the same grade, patient and eye, and by chance.

    'grade_other_patients' leaves out images of the same patient, whose grade is no surprise.
    """
    values = {'grade': labels, 'patient': patients}
    if patients is not None and eyes is not None:
        values['eye_of_patient'] = [f'{p}/{e}' for p, e in zip(patients, eyes)]
    nearest, result = nearest_neighbours(features), {}
    for name, given in values.items():
        if given is not None:
            given = np.asarray(given)
            result[name] = {
                'share': float((given[nearest] == given).mean()),
                'chance': chance_to_share(given),
            }
    if labels is not None and patients is not None:
        groups = np.unique(np.asarray(patients), return_inverse=True)[1]
        others = nearest_neighbours(features, groups=groups)
        has = others >= 0
        if has.any():
            result['grade_other_patients'] = {
                'share': float((labels[others[has]] == labels[has]).mean()),
                'chance': _chance_among_others(labels, groups),
            }
    return result


def _chance_among_others(
    labels: Shaped[np.ndarray, ' n'], groups: Shaped[np.ndarray, ' n']
) -> float:
    """Probability that a random image of another patient has the row's grade."""

    def ordered_pairs(*keys: Shaped[np.ndarray, ' n']) -> int:
        counts = np.unique(np.stack(keys), axis=1, return_counts=True)[1]
        return int((counts**2).sum())

    same = ordered_pairs(labels) - ordered_pairs(labels, groups)
    return float(same / (len(labels) ** 2 - ordered_pairs(groups)))


def linear_probe(
    features: Float[np.ndarray, 'n F'],
    labels: Int[np.ndarray, ' n'],
    *,
    patients: Sequence[str] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> dict:
    """Logistic regression from frozen features to grades, every image predicted by a model that
    saw none of its patient.

    Returns {accuracy, majority (accuracy of always the commonest grade), kappa (quadratic), auc
    (mean one-against-rest), referable_auc (grade 2 or more)}, or {} when fewer than two grades
    have an image in every fold. Grades rarer than `folds` patients are left out. AUC entries are
    None where undefined.
    """
    groups = (
        np.arange(len(labels))
        if patients is None
        else np.unique(np.asarray(patients), return_inverse=True)[1]
    )
    grades = [g for g in np.unique(labels) if len(np.unique(groups[labels == g])) >= folds]
    keep = np.isin(labels, grades)
    if len(grades) < 2:
        return {}
    x, y, groups = features[keep], labels[keep], groups[keep]
    probability = np.zeros((len(y), len(grades)))
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, test in split.split(x, y, groups):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', ConvergenceWarning)
            model.fit(x[train], y[train])
        columns = np.searchsorted(grades, model.classes_)
        probability[np.ix_(test, columns)] = model.predict_proba(x[test])
    guess = np.asarray(grades)[probability.argmax(1)]
    areas = [auc(p[y == g], p[y != g]) for g, p in zip(grades, probability.T)]
    confusion = np.zeros((1, max(grades) + 1, max(grades) + 1))
    np.add.at(confusion[0], (y, guess), 1)
    referable, severe = y >= REFERABLE_FROM, np.asarray(grades) >= REFERABLE_FROM
    score = probability[:, severe].sum(1)
    both = referable.any() and not referable.all()
    return {
        'images': int(keep.sum()),
        'accuracy': float((guess == y).mean()),
        'majority': float(max((y == g).mean() for g in grades)),
        'kappa': float(quadratic_kappa(confusion)[0]),
        'auc': float(np.mean(areas)),
        'referable_auc': auc(score[referable], score[~referable]) if both else None,
    }


def feature_quality(
    features: Float[np.ndarray, 'n F'],
    *,
    labels: Int[np.ndarray, ' n'] | None = None,
    patients: Sequence[str] | None = None,
    eyes: Sequence[str] | None = None,
    seed: int = 0,
) -> dict:
    """{'images': n, 'neighbours': ..., 'linear_probe': ...} of what labels and patients allow."""
    features = np.asarray(features, dtype=np.float32)
    result = {
        'images': len(features),
        'neighbours': neighbour_quality(features, labels=labels, patients=patients, eyes=eyes),
    }
    if labels is not None:
        result['linear_probe'] = linear_probe(features, labels, patients=patients, seed=seed)
    return result


def describe_quality(quality: dict) -> list[str]:
    """The numbers of `feature_quality` as lines of text."""
    words = {
        'grade': 'has the same grade',
        'patient': 'is of the same patient',
        'eye_of_patient': 'is of the same eye of the same patient',
        'grade_other_patients': 'among other patients has the same grade',
    }
    lines = [
        f'the nearest neighbour {words[name]}: {v["share"]:.1%} (chance {v["chance"]:.1%})'
        for name, v in quality['neighbours'].items()
    ]
    probe = quality.get('linear_probe')
    if probe:
        text = (
            f'linear probe for the grade: accuracy {probe["accuracy"]:.3f} (always the '
            f'commonest grade: {probe["majority"]:.3f}), kappa {probe["kappa"]:.3f}, '
            f'AUC {probe["auc"]:.3f}'
        )
        if probe['referable_auc'] is not None:
            text += f', referable AUC {probe["referable_auc"]:.3f}'
        lines.append(text)
    return lines
