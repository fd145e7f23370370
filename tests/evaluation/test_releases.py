"""The k-SALSA runs of an evaluation: made once, and refused when they are not those wanted."""

import dataclasses

import numpy as np
import pytest
from release_fixture import save_networks, save_photographs

from anonymization.photographs import open_photographs
from datasets.pictures import load_pictures
from datasets.sides import as_right_eyes
from datasets.table import read_table
from evaluation.releases import make_release
from evaluation.settings import Settings
from utils.errors import UserError


def test_a_release_is_made_once(tmp_path):
    save_networks(tmp_path)
    save_photographs(tmp_path / 'data', 6)
    members = read_table(tmp_path / 'data/labels.csv', tmp_path / 'data/images', require_label=True)
    members = dataclasses.replace(members, eyes=['left', 'right'] * 3)

    def make(**entries):
        settings = Settings(
            checkpoint=str(tmp_path / 'psp.pt'),
            content_weights=str(tmp_path / 'content.pt'),
            k=[2],
            methods=['k_salsa'],
            grader='small.yaml',
            seeds=[0],
            **{'num_steps': 1, **entries},
        )
        return make_release(settings, members, 2, tmp_path / 'out', device='cpu', seed=0)

    found = make()
    # Pictures are in the order of their names, which the groups' numbers do not tell.
    assert found.names == sorted(found.names) and len(found.names) == 3
    assert sorted(found.group_of) == [0, 0, 1, 1, 2, 2]
    np.testing.assert_allclose(found.shares.sum(1), 1)
    files = [*found.pictures(), *found.centroids(), *found.reconstructions(members)]
    assert len(files) == 12 and all(f.is_file() for f in files)
    # Measures are shown photographs as the run saw them: left eyes mirrored.
    seen = as_right_eyes(load_pictures(members.paths, 32), members.eyes)
    run = open_photographs(tmp_path / 'out/k2/private')
    assert [r.eye for r in run.records] == members.eyes
    assert all(np.array_equal(a, run[i].numpy()) for i, a in enumerate(seen))
    times = [f.stat().st_mtime_ns for f in files]
    assert make().names == found.names
    assert [f.stat().st_mtime_ns for f in files] == times
    with pytest.raises(UserError, match='num_steps: was 1, now 7'):
        make(num_steps=7)
    source = tmp_path / 'data/images/eye000x.png'
    source.write_bytes(source.read_bytes() + b' ')
    with pytest.raises(UserError, match='photographs'):
        make()
