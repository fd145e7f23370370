"""Who stands where in an evaluation: people on one side, eyes, visits, identical photographs."""

import shutil

import numpy as np
import pandas as pd
import pytest
from release_fixture import save_photographs

from datasets.people import merge_identical
from datasets.table import Table, read_table
from evaluation.population import first_visits, people_of, populate, roles_of
from MIA.MIA_split import main as split_main
from utils.errors import UserError


def table_of(patients, **columns):
    n = len(patients)
    return Table(
        ids=[f'i{i}' for i in range(n)],
        paths=[f'i{i}.png' for i in range(n)],
        labels=np.zeros(n, int),
        patients=list(patients),
        **columns,
    )


def test_reference_and_nonmembers_are_other_people():
    """In any order of the table's rows: both photographs of a person are on one side."""
    patients = [f'p{i % 30}' for i in range(60)]
    roles = ['member' if int(p[1:]) < 10 else 'other' for p in patients]
    data = populate(table_of(patients), roles, seed=0)
    sides = [
        {p for p, on in zip(people_of(data.others), data.nonmember) if on == side}
        for side in (True, False)
    ]
    assert len(sides[0]) == len(sides[1]) == 10 and not sides[0] & sides[1]


@pytest.mark.parametrize(
    'visits', [['0', '1'], ['1', '2'], ['2019-03-01', '2020-11-30'], ['9', '10'], ['', '1']]
)
@pytest.mark.parametrize('eyes', [None, 'left'])
def test_visits_of_any_name(visits, eyes):
    table = table_of(
        ['a', 'b', 'c', 'd'] * 2, visits=[visits[0]] * 4 + [visits[1]] * 4, eyes=eyes and [eyes] * 8
    )
    data = populate(table, ['member', 'member', 'other', 'other'] * 2, seed=0)
    assert data.members.ids == ['i0', 'i1'] and data.others.ids == ['i2', 'i3']
    assert data.again.ids == ['i4', 'i5'] and data.again_of.tolist() == [0, 1]


def test_later_photographs_whose_eye_is_unknown_are_left_out(caplog):
    table = table_of(['a', 'a', 'a', 'b', 'b', 'c', 'd'], visits=list('0010100'))
    data = populate(table, ['member'] * 5 + ['other'] * 2, seed=0)
    assert data.again.ids == ['i4'] and data.again_of.tolist() == [2]
    assert '1 later photographs are left out' in caplog.text


def test_the_first_visit_is_that_of_the_eye():
    table = table_of(['a', 'a', 'a'], visits=['3', '2', '1'], eyes=['left', 'left', 'right'])
    assert first_visits(table) == [False, True, True]


def test_identical_photographs_fall_on_one_side(tmp_path):
    save_photographs(tmp_path, 20)
    for i in range(10):
        shutil.copy(tmp_path / f'images/eye{i:03d}x.png', tmp_path / f'images/eye{i + 10:03d}x.png')
    table = merge_identical(read_table(tmp_path / 'labels.csv', tmp_path / 'images'))
    roles = roles_of(table, share=0.5, column=None, seed=0)
    assert roles[:10] == roles[10:] and roles.count('member') == 10
    assert split_main([f'--df={tmp_path / "labels.csv"}', f'--out_dir={tmp_path / "split"}']) == 0
    split = pd.read_csv(tmp_path / 'split/split.csv')
    assert list(split.role[:10]) == list(split.role[10:])
    given = [*(['train'] * 10), *(['val'] * 10)]
    pd.read_csv(tmp_path / 'labels.csv').assign(split=given).to_csv(tmp_path / 'labels.csv')
    table = merge_identical(read_table(tmp_path / 'labels.csv', tmp_path / 'images'))
    with pytest.raises(UserError, match='10 patients are members and others.*identical'):
        roles_of(table, share=0.5, column={'members': 'train', 'others': 'val'}, seed=0)
