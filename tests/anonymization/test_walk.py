"""Pictures on the way between two groups: of one grade, of disjoint people, checked anew."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import load_script
from PIL import Image
from release_fixture import save_networks, save_photographs

from anonymization import Networks, OptimizeConfig, Settings, anonymize
from anonymization.audit.walk import check_walk
from anonymization.walk import WAY, plan
from datasets.table import read_table
from utils.errors import UserError

script = load_script('walk_release')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A finished run of 8 groups of 2 people of one grade each."""
    folder = tmp_path_factory.mktemp('walk')
    save_networks(folder)
    save_photographs(folder / 'data', 16)
    table = pd.read_csv(folder / 'data/labels.csv').assign(diagnosis=[0, 2] * 8)
    table.to_csv(folder / 'data/labels.csv', index=False)
    anonymize(
        read_table(folder / 'data/labels.csv'),
        Networks(folder / 'psp.pt', folder / 'content.pt'),
        Settings(k=2, strata=('labels',), optimize=OptimizeConfig(n_steps=1, n_crop=2)),
        folder / 'run',
        workers=0,
    )
    return folder / 'run'


def made(run, out, *more):
    assert script.main([f'--run={run}', f'--out_dir={out}', *more]) == 0
    return json.loads((out / 'manifest.json').read_text())


def test_a_folder_of_its_own(run, tmp_path):
    manifest = made(run, tmp_path / 'one', '--pictures_per_group=3')
    assert manifest['least_people_per_picture'] == 2 * manifest['k'] == 4
    labels = pd.read_csv(tmp_path / 'one/labels.csv')
    assert len(labels) == manifest['n_images'] > 8 and set(labels.label) == {0, 2}
    record = json.loads((run / 'private/walk.json').read_text())
    assert all(WAY[0] <= position <= WAY[1] for _, _, position in record.values())
    assert not any(n.name == 'walk.json' for n in (tmp_path / 'one').rglob('*'))
    first = (tmp_path / 'one/manifest.json').read_bytes()
    made(run, tmp_path / 'two', '--pictures_per_group=3')
    assert (tmp_path / 'two/manifest.json').read_bytes() == first
    with pytest.raises(UserError, match='exists'):
        script.main([f'--run={run}', f'--out_dir={tmp_path / "one"}'])
    with pytest.raises(UserError, match='pictures_per_group 1'):
        script.main([f'--run={run}', f'--out_dir={tmp_path / "x"}', '--pictures_per_group=1'])


def swap(folder, run):
    files = sorted((folder / 'images').iterdir())
    Image.open(files[0]).save(files[1])


def add_file(folder, run):
    (folder / 'notes.txt').write_text('p1')


def other_grade(folder, run):
    table = pd.read_csv(folder / 'labels.csv')
    table.assign(label=2 - table.label).to_csv(folder / 'labels.csv', index=False)


def near(folder, run):
    path = run / 'private/walk.json'
    record = {n: [a, b, 0.01] for n, (a, b, _) in json.loads(path.read_text()).items()}
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ('harm', 'fault'),
    [
        (swap, 'not what its latents give'),
        (add_file, 'not those of the manifest'),
        (other_grade, 'another grade'),
        (near, 'near to one of its groups'),
    ],
)
def test_the_check_sees(run, tmp_path, harm, fault):
    made(run, tmp_path / 'out')
    assert all(check.passed for check in check_walk(tmp_path / 'out', run))
    harm(tmp_path / 'out', run)
    checks = check_walk(tmp_path / 'out', run)
    assert any(fault in check.detail for check in checks if not check.passed)


def test_groups_that_share_somebody_are_not_joined():
    people = [frozenset(p) for p in (['a', 'b'], ['b', 'c'], ['d', 'e'], ['f', 'g'])]
    steps = plan([0, 0, 0, 1], people, 5)
    pairs = {frozenset((s.one, s.other)) for s in steps}
    assert pairs == {frozenset((0, 2)), frozenset((1, 2))} and len(steps) == 2
    assert np.all([WAY[0] <= s.position <= WAY[1] for s in steps])
