"""The k-SALSA runs of an evaluation: made once, and again when they are not those wanted."""

import numpy as np
import pandas as pd
import pytest
from release_fixture import save_networks, save_photographs

from datasets.table import read_table
from evaluation import releases
from evaluation.releases import make_release
from evaluation.settings import Settings


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The commands that are run; each leaves groups of two and a manifest."""
    done = []

    def call(name, *arguments):
        done.append(arguments)
        run = next(a for a in arguments if a.startswith('--exp_dir=')).split('=', 1)[1]
        members = pd.read_csv(tmp_path / 'out/members.csv')
        members['centers'] = np.arange(len(members)) // 2 + 1
        members['release_name'] = [f'picture{9 - c}' for c in members.centers]
        for part in ('private', 'release'):
            (tmp_path / run / part).mkdir(parents=True, exist_ok=True)
        members.to_csv(tmp_path / run / 'private/groups.csv', index=False)
        (tmp_path / run / 'release/manifest.json').touch()

    monkeypatch.setattr(releases, 'call', call)
    return done


def test_a_release_is_made_once(tmp_path, calls):
    save_networks(tmp_path)
    save_photographs(tmp_path / 'data', 6)
    members = read_table(tmp_path / 'data/labels.csv', tmp_path / 'data/images', require_label=True)

    def make(**entries):
        settings = Settings(
            checkpoint=str(tmp_path / 'psp.pt'),
            content_weights=str(tmp_path / 'content.pt'),
            k=[2],
            methods=['k_salsa'],
            grader='small.yaml',
            seeds=[0],
            **entries,
        )
        return make_release(settings, members, 2, tmp_path / 'out', device='cpu', seed=0)

    found = make()
    # Pictures are in the order of their names, which the groups' numbers do not tell.
    assert found.names == ['picture6', 'picture7', 'picture8']
    assert found.group_of.tolist() == [2, 2, 1, 1, 0, 0]
    np.testing.assert_allclose(found.shares.sum(1), 1)
    assert make().names == found.names and len(calls) == 1
    make(num_steps=7)
    assert len(calls) == 2 and '--num_steps=7' in calls[1]
    source = tmp_path / 'data/images/eye000x.png'
    source.write_bytes(source.read_bytes() + b' ')
    make(num_steps=7)
    assert len(calls) == 3
    (tmp_path / 'out/k2/release/manifest.json').unlink()
    make(num_steps=7)
    assert len(calls) == 4
    (tmp_path / 'content.pt').write_bytes((tmp_path / 'content.pt').read_bytes() + b' ')
    make(num_steps=7)
    assert len(calls) == 5
