"""The groups' promises, the published assignment, and the size of the error."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform
from typed_calls import unchecked

from anonymization.grouping import assign_groups, squared_errors
from anonymization.promises import check_groups
from utils.errors import PrivacyError, UserError

METHODS = ('default', 'published', 'mdav')
QUICK = dict(rounds=15, restarts=1)  # the promises hold at any effort


def normal(n, d=6, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def reference_greedy(x, k):
    """The published rule on the full distance matrix, written plainly, for whole groups."""
    distance = squareform(pdist(np.asarray(x, np.float64)))
    numbers = np.zeros(len(x), int)
    for group in range(1, len(x) // k + 1):
        free = np.flatnonzero(numbers == 0)
        inside = distance[np.ix_(free, free)]
        seed = inside.sum(1).argmax()
        order = np.argsort(np.where(np.arange(len(free)) == seed, -1, inside[seed]), kind='stable')
        numbers[free[order[:k]]] = group
    return numbers


def error(x, numbers):
    x = np.asarray(x, np.float64)
    return sum(((x[numbers == g] - x[numbers == g].mean(0)) ** 2).sum() for g in set(numbers) - {0})


def groups_by_content(x, people, numbers):
    """The groups as multisets of (features, patient): equal under any order of the rows."""
    people = [''] * len(x) if people is None else people
    found = {}
    for row, patient, number in zip(x, people, numbers):
        found.setdefault(number, Counter())[row.tobytes(), str(patient)] += 1
    return {number: frozenset(c.items()) for number, c in found.items()}


# -- published greedy -------------------------------------------------------------------------


@pytest.mark.parametrize('k', [2, 3, 5])
def test_published_greedy_equals_the_golden_assignment(golden, k):
    data = golden('greedy_clusters')
    found = assign_groups(data['x'], k, method='published')
    assert np.array_equal(found.numbers, data[f'assignment_k{k}'])


@pytest.mark.parametrize('seed', range(4))
def test_published_greedy_equals_the_plain_rule(seed):
    x = normal(240, 16, seed)
    found = assign_groups(x, 5, method='published')
    assert np.array_equal(found.numbers, reference_greedy(x, 5))


def test_published_greedy_breaks_ties_towards_the_lowest_row():
    line = np.arange(12.0)[:, None]
    found = assign_groups(line, 3, method='published')
    assert found.numbers.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]


@pytest.mark.parametrize('n', [13, 662])
def test_published_greedy_lets_leftovers_join(n):
    x = normal(n, 32)
    found = assign_groups(x, 5, method='published')
    sizes = np.bincount(found.numbers)[1:]
    assert len(sizes) == n // 5 and sizes.min() >= 5 and sizes.sum() == n
    whole = reference_greedy(x, 5)
    assert np.array_equal(found.numbers[whole > 0], whole[whole > 0])


# -- promises ---------------------------------------------------------------------------------


@st.composite
def tables(draw):
    n = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.integers(0, 3, (n, 2)) if draw(st.booleans()) else rng.standard_normal((n, 3))
    per_patient = draw(st.sampled_from([None, 1.2, 2, 4, 30]))
    patients = None
    if per_patient:
        patients = [f'p{i}' for i in rng.integers(0, max(1, n / per_patient), n)]
    strata = rng.integers(0, draw(st.integers(1, 3)), n) if draw(st.booleans()) else None
    return x.astype(np.float32), patients, strata


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(
    tables(),
    st.integers(2, 7),
    st.sampled_from(METHODS),
    st.sampled_from(['distinct', 'together']),
    st.sampled_from(['error', 'suppress']),
)
def test_promises_hold_or_a_clear_error_is_raised(table, k, method, policy, surplus):
    x, patients, strata = table
    options = dict(method=method, policy=policy, surplus=surplus, **QUICK)
    try:
        found = assign_groups(x, k, patients=patients, strata=strata, **options)
    except UserError as err:
        assert not isinstance(err, PrivacyError)
        people = range(len(x)) if patients is None else patients
        kinds = [0] * len(x) if strata is None else strata
        homes = {(p, s) for p, s in zip(people, kinds)}
        enough = max(Counter(s for _, s in homes).values()) >= k
        torn = policy == 'together' and len(homes) > len(set(people))
        crowded = policy == 'distinct' and surplus == 'error' and patients is not None
        assert not enough or torn or crowded
        return
    people = np.arange(len(x)) if patients is None else np.array(patients)
    assert len(found.numbers) == len(x) and found.numbers.dtype == np.int64
    for group in range(1, found.info['n_groups'] + 1):
        inside = found.numbers == group
        assert len(set(people[inside])) >= k
        if policy == 'distinct':
            assert len(set(people[inside])) == inside.sum()
        if strata is not None:
            assert len(set(strata[inside])) == 1
    if policy == 'together':
        assert all(len(set(found.numbers[people == p])) == 1 for p in set(people))
    assert [row for row, _ in found.suppressed] == np.flatnonzero(found.numbers == 0).tolist()
    assert np.isclose(found.sse, error(x, found.numbers), rtol=1e-6, atol=1e-6)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    tables(),
    st.integers(2, 5),
    st.sampled_from(['default', 'mdav']),
    st.sampled_from(['distinct', 'together']),
    st.randoms(use_true_random=False),
)
def test_groups_do_not_depend_on_the_order_of_the_rows(table, k, method, policy, random):
    x, patients, strata = table
    order = list(range(len(x)))
    random.shuffle(order)
    options = dict(method=method, policy=policy, surplus='suppress', **QUICK)
    try:
        found = assign_groups(x, k, patients=patients, strata=strata, **options)
    except UserError:
        return
    moved_patients = None if patients is None else [patients[i] for i in order]
    moved = assign_groups(
        x[order],
        k,
        patients=moved_patients,
        strata=None if strata is None else strata[order],
        **options,
    )
    assert groups_by_content(x, patients, found.numbers) == groups_by_content(
        x[order], moved_patients, moved.numbers
    )


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('policy', ['distinct', 'together'])
def test_both_eyes_of_a_patient(method, policy):
    x = np.repeat(normal(100, 8), 2, axis=0) + 0.01 * normal(200, 8, 1)  # eyes look alike
    patients = np.repeat(np.arange(100), 2)
    found = assign_groups(x, 5, patients=patients, method=method, policy=policy)
    check_groups(found.numbers, 5, patients=patients, policy=policy)
    apart = found.numbers[::2] != found.numbers[1::2]
    assert apart.all() if policy == 'distinct' else not apart.any()
    assert found.info['patients_per_group'] == ({5: 40} if policy == 'distinct' else {5: 20})


def test_one_patient_in_every_group():
    patients = ['often'] * 8 + [f'p{i}' for i in range(32)]
    for method in METHODS:
        found = assign_groups(normal(40), 5, patients=patients, method=method)
        assert sorted(found.numbers[:8]) == list(range(1, 9))


@pytest.mark.parametrize('method', ['default', 'mdav', 'published'])
def test_a_penalty_on_grades_is_a_dial(method):
    """From groups that do not look at grades to groups of one grade, at the cost of likeness."""
    x, grades = normal(60), np.arange(60) % 5
    found = [
        assign_groups(x, 5, grades=grades, grade_penalty=p, method=method) for p in (0.0, 0.3, 100)
    ]
    spread = [
        np.mean([grades[f.numbers == g].std() for g in range(1, f.numbers.max() + 1)])
        for f in found
    ]
    assert spread[0] > 1 and spread[0] > spread[1] + 0.2 > spread[2] + 0.2 and spread[2] < 0.2
    assert found[0].sse < found[2].sse
    plain = assign_groups(x, 5, method=method)
    assert np.array_equal(plain.numbers, found[0].numbers) and plain.sse == found[0].sse


def test_small_strata_are_suppressed_and_listed():
    strata = ['left'] * 12 + ['right'] * 3
    found = assign_groups(normal(15), 5, strata=strata)
    assert found.numbers.tolist()[12:] == [0, 0, 0] and set(found.numbers[:12]) == {1, 2}
    assert [row for row, _ in found.suppressed] == [12, 13, 14]
    assert all("'right'" in reason for _, reason in found.suppressed)
    assert found.info['strata'][1] == {
        'stratum': 'right',
        'images': 3,
        'suppressed': 3,
        'groups': 0,
    }


def test_surplus_images_are_an_error_or_suppressed():
    x, patients = normal(12), ['a'] * 8 + list('bcde')
    with pytest.raises(UserError, match='`policy` together'):
        assign_groups(x, 2, patients=patients)
    found = assign_groups(x, 2, patients=patients, surplus='suppress')
    assert found.info['n_groups'] == 4 and (found.numbers[:8] > 0).sum() == 4
    assert all('more images' in reason for _, reason in found.suppressed)
    assert len(set(assign_groups(x, 2, patients=patients, policy='together').numbers)) == 2


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(k=1), 'at least 2'),
        (dict(k=11), '10 distinct patients'),
        (dict(patients=['a', 'b'] * 5), '2 distinct patients'),
        (dict(patients=['a'] * 9), '9 patient values for 10 images'),
        (dict(patients=['a'] * 9 + [None]), r'patient missing in 1 rows.*\[9\]'),
        (dict(strata=[*range(9), float('nan')]), 'stratum missing'),
        (dict(strata=list(range(10))), 'no stratum'),
        (dict(grade_penalty=1.0), 'needs a grade column'),
        (dict(grade_penalty=-1.0, grades=[0] * 10), 'want a number, 0 or more'),
        (
            dict(patients=list(range(5)) * 2, strata=[0] * 5 + [1] * 5, policy='together'),
            '5 patients lie in several strata',
        ),
        (dict(method='nearest'), 'nearest'),
        (dict(policy='apart'), 'apart'),
        (dict(surplus='keep'), 'keep'),
        (dict(reduce=0), 'reduce'),
        (dict(block=1), 'block'),
        (dict(features=np.zeros(10)), 'shape'),
        (dict(features=np.full((10, 2), np.nan)), 'not finite'),
        (dict(features=np.full((10, 2), 1j)), 'real'),
    ],
)
def test_bad_input(change, message):
    with unchecked(), pytest.raises(UserError, match=message):
        assign_groups(**{'features': normal(10), 'k': 5, **change})


@pytest.mark.parametrize(
    ('numbers', 'options', 'message'),
    [
        ([1, 1, 1, 2, 2], {}, 'group 2 holds 2 distinct'),
        ([1, 1, 1, 1, 0], dict(patients=list('aabcd')), 'more than once'),
        ([1, 1, 1, 2, 2, 2], dict(patients=list('abcadf'), policy='together'), '1 patients'),
        ([1, 1, 1], dict(strata=list('lrl')), 'crosses'),
        ([1, 1, 1, 3, 3, 3], {}, '1..C'),
        ([0, 0], {}, 'no group'),
        ([1, 1, 1], dict(patients=['a']), '1 patients'),
    ],
)
def test_check_groups_finds_broken_promises(numbers, options, message):
    with pytest.raises(PrivacyError, match=message):
        check_groups(numbers, 3, **options)


# -- error ------------------------------------------------------------------------------------


def test_error_at_the_scale_of_the_paper():
    x = np.random.default_rng(0).standard_normal((3000, 512))
    published = assign_groups(x, 5, method='published')
    assert round(published.sse) == 1_154_442
    assert assign_groups(x, 5, rounds=60).sse < 1_124_064


def test_error_on_low_dimensional_structure():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1000, 8)) @ rng.standard_normal((8, 64))
    x += 0.1 * rng.standard_normal(x.shape)
    published = assign_groups(x, 5, method='published').sse
    assert assign_groups(x, 5, restarts=1).sse < 0.91 * published


def best_partition(x, k):
    """Smallest error of any partition into groups of k, by exhaustion."""
    x = np.asarray(x, np.float64)
    cost = squareform(pdist(x, 'sqeuclidean')) / (2 * k)

    def best(free):
        if not free:
            return 0.0
        first, rest = free[0], free[1:]
        return min(
            cost[np.ix_(group, group)].sum() + best(tuple(i for i in rest if i not in group))
            for group in ((first, *c) for c in itertools.combinations(rest, k - 1))
        )

    return best(tuple(range(len(x))))


@pytest.mark.parametrize(('n', 'k'), [(8, 2), (9, 3), (10, 5), (12, 4)])
@pytest.mark.parametrize('seed', range(3))
def test_small_cases_reach_the_optimum(n, k, seed):
    x = normal(n, 3, seed)
    assert assign_groups(x, k, seed=seed).sse == pytest.approx(best_partition(x, k), rel=1e-6)


def test_no_worse_than_size_constrained_k_means():
    pytest.importorskip('k_means_constrained')
    for seed in range(3):
        x = normal(120, 6, seed)
        flow = assign_groups(x, 4, method='kmeans-constrained')
        check_groups(flow.numbers, 4)
        assert assign_groups(x, 4).sse <= flow.sse


def test_kmeans_constrained_declines_patients():
    with pytest.raises(UserError, match='another clustering'):
        assign_groups(normal(20), 2, patients=list(range(10)) * 2, method='kmeans-constrained')


def test_blocks_and_cells(monkeypatch):
    monkeypatch.setattr('anonymization.grouping.greedy.CELL', 100)
    patients = np.arange(640) // 2
    x = normal(640, 8)
    found = assign_groups(x, 5, patients=patients, block=16)
    assert found.sse < assign_groups(x, 5, patients=patients, method='published').sse
    crowded = np.where(np.arange(640) < 100, 0, np.arange(640))
    x[:100] += 100
    assert set(assign_groups(x, 5, patients=crowded, **QUICK).numbers[:100]) <= set(range(1, 129))


def test_leftovers_settle_where_they_cost_least():
    corners = np.array([[0, 0], [0, 9], [9, 0], [9, 9]], np.float32)
    x = np.repeat(corners, [5, 6, 5, 6], axis=0) + 0.1 * normal(22, 2)
    found = assign_groups(x, 5)
    assert found.info['sizes'] == {5: 2, 6: 2} and found.info['sse_ratio'] < 0.01


@pytest.mark.parametrize('method', METHODS)
def test_identical_rows(method):
    found = assign_groups(np.ones((13, 4), np.float32), 5, method=method)
    assert found.sse == 0 and found.info['sse_ratio'] == 0 and found.info['n_groups'] == 2


@pytest.mark.parametrize('seed', range(5))
def test_published_greedy_ends_among_identical_rows(seed):
    """Rounding makes the sums of the last, identical rows negative."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((34, 3)).astype(np.float32)
    x[rng.permutation(34)[:24]] = x[0]
    numbers = assign_groups(x, 3, method='published').numbers
    assert numbers.max() == 11 and np.bincount(numbers)[1:].min() >= 3


def test_squared_errors_far_from_the_origin():
    x = normal(60, 4) + 1000
    numbers = np.arange(60) % 12 + 1
    sse, sst = squared_errors(x, numbers)
    x = x.astype(np.float64)
    assert sse == pytest.approx(error(x, numbers)) and sst == pytest.approx(60 * x.var(0).sum())


# -- input ------------------------------------------------------------------------------------


def test_the_seed_decides():
    x = normal(300, 12)
    first, again, other = (assign_groups(x, 5, seed=s, **QUICK).numbers for s in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_kinds_of_features(tmp_path):
    x = normal(100, 12)
    np.save(tmp_path / 'x.npy', x)
    want = assign_groups(x, 5, **QUICK).numbers
    for same in (
        np.load(tmp_path / 'x.npy', mmap_mode='r'),
        torch.from_numpy(x),
        x.reshape(100, 3, 4),
    ):
        assert np.array_equal(assign_groups(same, 5, **QUICK).numbers, want)


def test_reduction_of_a_file_on_disk(tmp_path):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((400, 6)) * np.arange(6, 0, -1)
    x = scores @ rng.standard_normal((6, 300)) + 0.05 * rng.standard_normal((400, 300)) + 50
    np.save(tmp_path / 'x.npy', x.astype(np.float32))
    stored = np.load(tmp_path / 'x.npy', mmap_mode='r')
    exact = assign_groups(stored, 5, reduce=None, restarts=1)
    found = assign_groups(stored, 5, reduce=6, restarts=1)
    centred = x - x.mean(0)
    best = (np.linalg.svd(centred, compute_uv=False)[:6] ** 2).sum() / (centred**2).sum()
    assert found.info['reduction']['kept_variance'] == pytest.approx(best, abs=1e-3)
    assert found.sse < 1.02 * exact.sse
    assert exact.info['reduction'] is None
    assert np.isclose(found.sse, error(stored, found.numbers), rtol=1e-5)
    order = rng.permutation(400)
    moved = assign_groups(stored[order], 5, reduce=6, restarts=1)
    assert np.array_equal(moved.numbers, found.numbers[order])


@pytest.mark.gpu
@pytest.mark.parametrize('method', METHODS)
def test_groups_on_a_gpu(method):
    x = normal(600, 24)
    on_cpu = assign_groups(x, 5, method=method)
    on_gpu = assign_groups(x, 5, method=method, device='cuda')
    again = assign_groups(x, 5, method=method, device='cuda')
    assert np.array_equal(on_gpu.numbers, again.numbers)
    assert on_gpu.sse == pytest.approx(on_cpu.sse, rel=0.01)
