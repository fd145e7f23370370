"""Results on disk: read while nothing they depend on has changed, made anew otherwise."""

import numpy as np
import pytest

from evaluation.cache import RESULT, cached, digest, folder_of


def kept(folder, depends, calls, value=1):
    def compute():
        calls.append(depends)
        return {'value': value}

    return cached(folder_of(folder, 'fidelity', depends) / RESULT, depends, compute)


def test_results_are_read_while_nothing_changes(tmp_path):
    calls = []
    for _ in range(2):
        assert kept(tmp_path, {'weights': 'a', 'grader': {'epochs': 3}}, calls) == {'value': 1}
    assert len(calls) == 1


@pytest.mark.parametrize('other', [{'weights': 'b'}, {'grader': {'epochs': 4}}, {'table': 'c'}])
def test_whatever_changes_makes_a_new_one(tmp_path, other):
    calls, before = [], {'weights': 'a', 'grader': {'epochs': 3}}
    kept(tmp_path, before, calls)
    assert kept(tmp_path, {**before, **other}, calls, value=2) == {'value': 2}
    assert kept(tmp_path, before, calls, value=3) == {'value': 1}


def test_a_result_under_anothers_name_is_not_shown(tmp_path):
    calls, depends = [], {'weights': 'a'}
    kept(tmp_path, depends, calls)
    path = folder_of(tmp_path, 'fidelity', depends) / RESULT
    assert cached(path, {'weights': 'b'}, lambda: {'value': 2}) == {'value': 2}


def test_digests_tell_shape_type_and_order_apart():
    x = np.arange(6, dtype=np.uint8)
    others = [x.reshape(2, 3), x.astype(np.int8), x[::-1], [0, 1, 2, 3, 4, 5]]
    assert len({digest(x), *map(digest, others)}) == 5
    assert digest({'a': 1, 'b': 2}) == digest({'b': 2, 'a': 1})
