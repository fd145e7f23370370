"""Configurations of graders, and who is validated and tested."""

import numpy as np
import pandas as pd
import pytest

from classification import data
from classification.settings import CONFIG_DIR, Settings, load_config
from datasets.table import read_table
from utils.errors import UserError


def test_validation_split_keeps_people_together_and_grades_in_proportion():
    grades = np.repeat([0, 1, 2, 3, 4], [60, 20, 60, 20, 40])
    people = np.arange(200) // 2
    train, val = data.split_validation(grades, fraction=0.2, seed=0, groups=people)
    assert not set(people[train]) & set(people[val])
    assert sorted([*train, *val]) == list(range(200)) and len(val) == pytest.approx(40, abs=4)
    assert set(grades[val]) == {0, 1, 2, 3, 4}
    assert not np.array_equal(val, data.split_validation(grades, fraction=0.2, seed=1)[1])
    with pytest.raises(UserError, match='only 5 training pictures'):
        data.split_validation(grades[:5], fraction=0.2, seed=0)
    with pytest.raises(UserError, match='one patient'):
        data.split_validation(grades, fraction=0.2, seed=0, groups=np.zeros(200))


def test_test_photographs_of_training_people_are_left_out(tmp_path):
    pd.DataFrame({'image': ['1_left', '2_left'], 'level': [0, 1]}).to_csv(
        tmp_path / 'train.csv', index=False
    )
    pd.DataFrame({'image': ['1_right', '3_left'], 'level': [0, 1]}).to_csv(
        tmp_path / 'test.csv', index=False
    )
    train, test = (read_table(tmp_path / f'{n}.csv', ids_only=True) for n in ('train', 'test'))
    kept, dropped = data.without_known_people(test, train)
    assert kept.ids == ['3_left'] and dropped == 1
    with pytest.raises(UserError, match='nothing is held out'):
        data.without_known_people(train, train)


def test_all_configurations_load():
    names = sorted(p.name for p in CONFIG_DIR.glob('*.yaml'))
    assert names == [
        'aptos.yaml',
        'eyepacs.yaml',
        'eyepacs_2cls.yaml',
        'finetune.yaml',
        'guide.yaml',
        'probe.yaml',
        'small.yaml',
        'small128.yaml',
    ]
    assert load_config('./configs/aptos.yaml').settings == Settings()
    for name in names:
        load_config(name)


@pytest.mark.parametrize(
    'text,message',
    [
        ('epocs: 3', 'did you mean epochs'),
        ('epochs: many', 'epochs: want a whole number above 0, not .many'),
        ('target: 4-class', 'target: want one of regression'),
        ('mean: [1, 2]', 'three numbers'),
        ('- 1', 'name: value'),
        ('a: [', 'not readable YAML'),
    ],
)
def test_bad_configuration(tmp_path, text, message):
    (tmp_path / 'bad.yaml').write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / 'bad.yaml')
