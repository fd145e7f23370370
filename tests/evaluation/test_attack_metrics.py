"""Measures of attacks: against other implementations, with intervals of people."""

import numpy as np
import pytest
from scipy.stats import beta, binomtest
from sklearn.metrics import roc_auc_score

from evaluation.attacks.metrics import (
    _halves,
    attack_metrics,
    precision_at_k,
    reidentification_rates,
)
from evaluation.bootstrap import rate_interval
from evaluation.scores import auc, roc
from utils.errors import UserError


def test_metrics_equal_independent_implementations():
    rng = np.random.default_rng(0)
    member, other = rng.normal(0.7, 1, 300).round(1), rng.normal(0, 1, 500).round(1)
    truth, scores = np.r_[np.ones(300), np.zeros(500)], np.r_[member, other]
    assert auc(member, other) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    found = attack_metrics(member, other)
    assert found['auc']['low'] < found['auc']['value'] < found['auc']['high']
    # The threshold of 1 % lets 5 of 500 others through, and not 6.
    tpr = found['tpr_at_1pct_fpr']
    best = max((member >= t).mean() for t in np.unique(scores) if (other >= t).sum() <= 5)
    assert tpr['value'] == pytest.approx(best)
    hits = round(tpr['value'] * 300)
    assert tpr['low'] == pytest.approx(beta.ppf(0.025, hits, 300 - hits + 1))
    assert tpr['high'] == pytest.approx(beta.ppf(0.975, hits + 1, 300 - hits))
    assert tpr['resolved'] and not found['tpr_at_0.1pct_fpr']['resolved']
    fpr, rate = roc(member, other)
    assert np.trapezoid(rate, fpr) == pytest.approx(auc(member, other), abs=1e-9)
    assert abs(found['balanced_accuracy']['value'] - 0.63) < 0.06


def test_the_interval_covers_chance():
    rng = np.random.default_rng(1)
    inside = [
        v['auc']['low'] <= 0.5 <= v['auc']['high']
        for v in (
            attack_metrics(rng.normal(size=60), rng.normal(size=60), n_bootstrap=200)
            for _ in range(40)
        )
    ]
    assert sum(inside) >= 34


def test_intervals_are_of_people_not_photographs():
    """A second, equal photograph of everybody adds no evidence."""
    rng = np.random.default_rng(2)
    member, other = rng.normal(0.5, 1, 60), rng.normal(0, 1, 60)
    people = np.repeat(np.arange(60), 2)
    single = attack_metrics(member, other)
    double = attack_metrics(
        member.repeat(2), other.repeat(2), member_people=people, other_people=100 + people
    )
    blind = attack_metrics(member.repeat(2), other.repeat(2))
    assert double['n_members'] == 120 and double['n_member_people'] == 60
    for name in ('auc', 'balanced_accuracy', 'tpr_at_1pct_fpr'):
        width, twice, wrong = (v[name]['high'] - v[name]['low'] for v in (single, double, blind))
        assert twice == pytest.approx(width, rel=0.25) and wrong < 0.85 * width, name
    # Both photographs of a person are on one side of the halves that the threshold is made on.
    halves = _halves(people, people + 60, rng)
    assert (np.ptp(halves.reshape(-1, 2), axis=1) == 0).all()
    assert np.bincount(halves).tolist() == [120, 120]


def test_coverage_with_two_photographs_per_person():
    rng, inside = np.random.default_rng(3), []
    for _ in range(60):
        eyes = rng.normal(size=(120, 1)) * 0.95**0.5 + rng.normal(size=(120, 2)) * 0.05**0.5
        member, other = np.split(eyes, 2)
        people = np.repeat(np.arange(60), 2)
        found = attack_metrics(
            member.ravel(),
            other.ravel(),
            member_people=people,
            other_people=60 + people,
            n_bootstrap=200,
        )['auc']
        inside.append(found['low'] <= 0.5 <= found['high'])
    assert sum(inside) >= 52  # 95 % of 60 are 57; photographs as the unit reach 48


def test_rates_of_people():
    hits = np.array([True] * 3 + [False] * 17)
    exact = binomtest(3, 20).proportion_ci(method='exact')
    assert rate_interval(hits) == pytest.approx(tuple(exact), abs=1e-12)
    assert rate_interval(hits.repeat(2), np.repeat(np.arange(20), 2)) == pytest.approx(
        tuple(exact), abs=1e-12
    )
    assert rate_interval(np.zeros(40, bool), np.repeat(np.arange(20), 2)) == pytest.approx(
        tuple(binomtest(0, 20).proportion_ci(method='exact')), abs=1e-12
    )


def test_precision_and_ranks():
    scores = np.array([[0.9, 0.8, 0.1, 0.2], [0.5, 0.5, 0.5, 0.5]])
    same = np.array([[True, False, True, False], [False, False, True, True]])
    assert precision_at_k(scores, same, 2) == 0.25  # ties of the second go against the attacker
    rates = reidentification_rates(np.array([1, 1, 4, 9]), 20)
    assert rates['rank_1'] == 0.5 and rates['rank_5'] == 0.75 and rates['chance_rank_5'] == 0.25


def test_too_few_people():
    with pytest.raises(UserError, match='too few'):
        attack_metrics(np.arange(3), np.arange(4))
