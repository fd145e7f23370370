"""The columns of benchmarks/frontier.py: controls of its attacks, and what its graders learn."""

import numpy as np
import pytest
import torch

from benchmarks import appraisal
from benchmarks.appraisal import JUDGE, MAKER, Appraiser, Photographs
from models.features.style import FILTERS

N_PEOPLE, N_FEATURES = 100, 150


def drawn(seed):
    """Photographs of people, two each, with features of the person and, in twenty, the grade."""
    rng = np.random.default_rng(seed)
    people = np.repeat(np.arange(N_PEOPLE), 2)
    grades = rng.integers(0, 5, N_PEOPLE)[people]
    own = rng.normal(size=(N_PEOPLE, N_FEATURES))[people]
    values = own + 0.3 * rng.normal(size=own.shape)
    values[:, :20] += grades[:, None]
    features = {n: {'grams': values, 'pooled': values} for n in (MAKER, JUDGE, FILTERS)}
    pictures = rng.integers(0, 256, (len(people), 3, 8, 8)).astype(np.uint8)
    return Photographs(pictures, grades, people, features)


@pytest.fixture
def appraise(monkeypatch, tmp_path):
    """(release's features by group of rows) -> the columns."""
    monkeypatch.setattr(appraisal, '_LESSONS', 4)
    members, others = drawn(1), drawn(2)
    appraiser = Appraiser(
        members,
        others,
        seed=0,
        device=torch.device('cpu'),
        cnn=None,
        checkpoint=tmp_path / 'cnn.pt',
    )

    def measure(values, groups):
        seen = {'grams': values, 'pooled': values}
        monkeypatch.setattr(appraisal, 'features_of', lambda *_: seen)
        rng = np.random.default_rng(3)
        pictures = rng.integers(0, 256, (len(groups), 3, 8, 8)).astype(np.uint8)
        return appraiser.measure(pictures, groups)

    return measure, members


def test_photographs_are_found_and_teach(appraise):
    measure, members = appraise
    groups = [np.array([i]) for i in range(0, 2 * N_PEOPLE, 2)]
    values = members.features[MAKER]['pooled'][::2]
    found = measure(values, groups)
    for name in (MAKER, JUDGE):
        assert found[name]['auc'] > 0.99 and found[name]['nearest'] > 0.9
        assert found[name]['rank_1'] == 1
        lesson = found['lessons'][name]
        assert lesson['value'] > 0.95 and lesson['low'] > 0.75
    assert found['reading']['correlation']['low'] > 0.6


def test_independent_pictures_tell_nothing(appraise):
    measure, _ = appraise
    groups = [np.arange(i, i + 10, 2) for i in range(0, 2 * N_PEOPLE - 10, 10)]
    found = measure(drawn(9).features[MAKER]['pooled'][: len(groups)], groups)
    for name in (MAKER, JUDGE):
        assert found[name]['auc'] < 0.65 and 0.35 < found[name]['nearest'] < 0.65
        assert found[name]['rank_1'] < 0.25
    assert found['reading']['correlation']['low'] < 0


def test_groups_of_one_grade_teach_nothing(appraise):
    measure, members = appraise
    healthy = np.flatnonzero(members.grades == 0)[::2]
    groups = [np.array([i]) for i in healthy]
    found = measure(members.features[MAKER]['pooled'][healthy], groups)
    assert found['lessons'][JUDGE] is None
