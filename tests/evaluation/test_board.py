"""What a board reads: an answer per question, its number, its control, and what it leaves out."""

import numpy as np
import pytest

from evaluation.board import sections
from evaluation.comparison import Row
from evaluation.registry import Measure, Method
from evaluation.utility import utility

K_SALSA = Method('k_salsa', 'k-SALSA', lambda *_: None, grouped=True)
REAL = Method('real', 'photographs', lambda *_: None, grouped=False)
ATTACK = Measure('identity', 'identity', lambda s: None, lambda r: {}, attack=True)
PROBE = Measure('probe', 'probe', lambda s: None, lambda r: {}, score=lambda r: r)


def between(value, half):
    return {'value': value, 'low': value - half, 'high': value + half}


def row(excess, *, method=K_SALSA, k=5, worth=0.8, **more):
    found = {
        'auc': between(0.6 + excess, 0.05),
        'tpr_at_1pct_fpr': between(0.1, 0.05) | {'resolved': False},
        'control': {'auc': between(0.6, 0.05)},
        'excess': between(excess, 0.05),
        **more,
    }
    results = {'identity': found, 'probe': between(worth, 0.1)}
    return Row(f'{method.name}_k{k}', method, k, 40, results, {'identity': (np.ones(1),) * 2})


def answers(*given):
    return [s.answers for s in sections(list(given), [PROBE, ATTACK])]


def test_what_the_control_finds_too_is_no_finding():
    """An AUC of 0.6 whose control is 0.6 tells nobody anything."""
    (useful, safe), (_, leaky) = answers(row(0.01), row(0.2, k=2))
    assert safe.answer == 'not that can be seen' and not safe.found
    assert 'less than 0.05 would not have been seen' in safe.caveat
    assert leaky.answer == 'yes' and leaky.number.startswith('AUC 0.80')
    assert leaky.control.startswith('AUC 0.60') and 'cannot resolve' in leaky.caveat
    assert useful.answer == 'yes' and useful.useful


def test_a_useless_release_is_called_so():
    assert answers(row(0, worth=0.55))[0][0].answer == 'not that can be seen'


def test_links_and_other_photographs_have_rows_of_their_own():
    linked = {n: between(v, 0.1) for n, v in (('members', 0.5), ('control', 0.4), ('excess', 0.1))}
    more = {
        'linked': linked,
        'singled_out': between(0.5, 0.2)
        | {'chance': 0.05, 'alone': between(0.3, 0.1), 'control': between(0.1, 0.1)}
        | {'excess': between(0.2, 0.1)},
        'again': {'auc': between(0.7, 0.1), 'n_member_people': 50, 'n_other_people': 25},
    }
    found = answers(row(0.2, **more))[0]
    assert [a.found for a in found] == [True, True, True, False, True]
    assert found[3].control.startswith('0.40')


@pytest.mark.parametrize(('k', 'word'), [(5, 'is above'), (12, 'meets')])
def test_the_line_of_the_regulators(k, word):
    assert f'1/k = {1 / k:.2f} {word} the line of 0.09' in sections([row(0, k=k)], [])[0].risk


def test_photographs_are_no_release_and_k_salsa_comes_first():
    other = Method('centroid', 'centroid', lambda *_: None, grouped=True)
    found = sections([row(0, method=REAL), row(0, method=other), row(0)], [])
    assert [s.name for s in found] == ['k_salsa_k5', 'centroid_k5']


def test_one_seed_has_the_interval_of_its_people():
    def result(std):
        seed = {'test_best': {'interval_95': {'auc_referable': [0.7, 0.9]}}}
        return {'summary': {'auc_referable': {'mean': 0.8, 'std': std}}, 'seeds': [seed]}

    assert utility.score(result(None)) == {'value': 0.8, 'low': 0.7, 'high': 0.9}
    assert utility.score(result(0.05)) == pytest.approx({'value': 0.8, 'low': 0.75, 'high': 0.85})
