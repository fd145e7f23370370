"""Probes on frozen features, and how a grader of photographs reads a release."""

import numpy as np
import pytest
from scipy.stats import linregress
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from datasets.phantoms import render_phantom
from evaluation.probe import KINDS, fit_probe, pooled_features, read_release
from models.features.pretrained import load_feature_network
from utils.errors import UserError


def population(n, *, seed, noise=1.0, photographs=2):
    """(features [n * photographs, 40], grades, people): a severity hidden in noise."""
    rng = np.random.default_rng(seed)
    severity = np.repeat(rng.gamma(1.0, 1.0, n), photographs)
    x = rng.normal(size=(len(severity), 40)) * noise
    x[:, 3] += 3 * severity
    own = np.repeat(rng.normal(size=(n, 40)), photographs, axis=0)  # what a person looks like
    people = [f'p{i}' for i in range(n) for _ in range(photographs)]
    return x + own, np.minimum(severity, 4).astype(int), people


@pytest.mark.parametrize('kind', KINDS)
def test_probes_learn_hard_and_soft_labels(kind):
    x, grades, people = population(150, seed=0)
    test_x, test_grades, _ = population(300, seed=1, photographs=1)
    assert 0.05 < (grades >= 2).mean() < 0.25  # out of balance, as screening is
    probe = fit_probe(x, np.eye(5)[grades], people=people, kind=kind)
    score, found = probe.score(test_x), probe.grades(test_x)
    assert roc_auc_score(test_grades >= 2, score) > 0.9
    assert cohen_kappa_score(test_grades, found, weights='quadratic') > 0.5
    # The scores mean something in spite of the balancing, and rare grades do occur.
    assert score.mean() == pytest.approx((test_grades >= 2).mean(), abs=0.06)
    assert set(found) >= {0, 1, 2, 3}
    # Means of five people with the shares of their grades.
    groups = np.random.default_rng(2).permutation(len(x)).reshape(-1, 5)
    soft = fit_probe(x[groups].mean(1), np.eye(5)[grades][groups].mean(1), kind=kind)
    assert roc_auc_score(test_grades >= 2, soft.score(test_x)) > 0.75


def test_cross_validation_keeps_people_together():
    # Features that tell the person and nothing of the disease: four like photographs of each.
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(40, 60)), 4, axis=0) + 0.01 * rng.normal(size=(160, 60))
    shares = np.eye(5)[np.repeat(rng.integers(0, 5, 40), 4)]
    people = np.repeat(np.arange(40), 4)
    held, loose = (fit_probe(x, shares, people=who, kind='ridge') for who in (people, None))
    assert held.strength >= 10 * loose.strength  # by photograph it looks learnable


def test_the_same_probe_again():
    x, grades, people = population(40, seed=3)
    one, two = (fit_probe(x, np.eye(5)[grades], people=people) for _ in range(2))
    assert np.array_equal(one.score(x), two.score(x))


@pytest.mark.parametrize(
    'grades, people, message',
    [
        ([0, 0, 1, 1], 'abcd', 'nothing to learn'),
        ([4, 4, 2, 3], 'abcd', 'nothing to learn'),
        ([0, 4, 0, 4], 'aaaa', 'one person'),
    ],
)
def test_nothing_to_learn(grades, people, message):
    with pytest.raises(UserError, match=message):
        fit_probe(
            np.random.default_rng(0).normal(size=(4, 3)), np.eye(5)[grades], people=list(people)
        )


def test_reading_a_release():
    rng = np.random.default_rng(0)
    share = rng.choice([0, 0.2, 0.4, 0.6, 0.8, 1], 200)
    cautious = 0.3 + share / 2 + 0.05 * rng.normal(size=200)
    found = read_release(cautious, share)
    fit = linregress(cautious, share)
    assert found.correlation['value'] == pytest.approx(fit.rvalue)
    assert found.slope['value'] == pytest.approx(fit.slope)
    assert found.shift['value'] == pytest.approx((cautious - share).mean())
    for part in found:
        assert part['low'] < part['value'] < part['high']
    assert found.slope['low'] > 1.5
    blind = read_release(rng.random(200), share)
    assert blind.correlation['low'] < 0 < blind.correlation['high']
    assert np.isnan(read_release(share, np.full(200, 0.2)).correlation['value'])


def test_a_probe_on_lite_features_grades_phantoms():
    def phantoms(people):
        return np.stack(
            [
                np.asarray(
                    render_phantom(
                        seed=9, patient=p, eye='left', visit=0, grade=p % 5, size=64
                    ).image
                ).transpose(2, 0, 1)
                for p in people
            ]
        )

    network = load_feature_network('lite1')
    train, test = (pooled_features(network, phantoms(p)) for p in (range(40), range(40, 60)))
    assert np.linalg.norm(train, axis=1) == pytest.approx(1)
    probe = fit_probe(train, np.eye(5)[np.arange(40) % 5])
    referable = np.arange(40, 60) % 5 >= 2
    assert roc_auc_score(referable, probe.score(test)) > 0.85
