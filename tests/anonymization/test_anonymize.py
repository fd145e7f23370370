"""The job from Python: a release only ever comes verified, and of what was asked for."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from release_fixture import save_networks, save_photographs, tree_bytes

from anonymization import Networks, OptimizeConfig, Release, Settings, anonymize, pipeline, publish
from anonymization.card import read_card
from datasets.groups import Groups
from datasets.table import Table, read_table
from utils.errors import PrivacyError, UserError
from utils.io import load_weights, save_torch

SETTINGS = Settings(group_batch=2, optimize=OptimizeConfig(n_steps=2, n_crop=2))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A finished run: networks, data/, run/."""
    folder = tmp_path_factory.mktemp('made')
    save_networks(folder)
    save_photographs(folder / 'data', 12)
    make(folder)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / 'copy')
    return tmp_path / 'copy'


def make(folder, settings=SETTINGS, **options) -> Release:
    table = options.pop('table', None) or read_table(folder / 'data/labels.csv')
    networks = Networks(folder / 'psp.pt', folder / 'content.pt')
    return anonymize(table, networks, settings, folder / 'run', workers=0, **options)


def test_what_comes_back(copy):
    before = tree_bytes(copy / 'run')
    release = make(copy)  # finished: looked at, not made again
    assert release.folder == copy / 'run/release' and release.audit.passed
    assert tree_bytes(copy / 'run') == before
    table = pd.read_csv(copy / 'run/private/groups.csv')
    assert release.groups.of.tolist() == (table.centers - 1).tolist()
    assert sorted(release.groups.names) == sorted(p.stem for p in release.folder.glob('images/*'))
    assert sorted(np.concatenate(release.groups.members)) == list(range(12))
    for name, rows in zip(release.groups.names, release.groups.members):
        assert set(table.release_name[rows]) == {name} and len(rows) >= SETTINGS.k


def test_a_table_made_in_memory(made, tmp_path):
    """No CSV stands behind it, and the release is the same."""
    read = read_table(made / 'data/labels.csv')
    table = Table(read.ids, read.paths, labels=read.labels)
    networks = Networks(made / 'psp.pt', made / 'content.pt')
    release = anonymize(table, networks, SETTINGS, tmp_path / 'run', workers=0)
    assert tree_bytes(release.folder) == tree_bytes(made / 'run/release')


def test_groups_of_a_table():
    groups = Groups(np.array([1, -1, 0, 1]), ('a', 'b'))
    assert [m.tolist() for m in groups.members] == [[2], [0, 3]]
    assert len(groups) == 2 and groups.n_left_out == 1


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda f: {'settings': dataclasses.replace(SETTINGS, k=6)}, 'same_k: was 5, now 6'),
        (
            lambda f: {
                'settings': dataclasses.replace(SETTINGS, optimize=OptimizeConfig(n_steps=3))
            },
            'num_steps: was 2, now 3',
        ),
        (lambda f: {'table': read_table(f / 'data/labels.csv', n_images=11)}, 'table: was'),
        (lambda f: retrain(f / 'content.pt'), 'content network: was'),
        (lambda f: spoil(f / 'data/images/eye003x.png'), 'photographs'),
    ],
)
@pytest.mark.parametrize('done', [True, False])
def test_no_stale_results(copy, change, message, done):
    """What another call computed is not taken for this one's, finished or not."""
    if not done:
        shutil.rmtree(copy / 'run/release')
    with pytest.raises(UserError, match=message):
        make(copy, **change(copy))
    assert (copy / 'run/release').exists() == done


def retrain(path):
    state = load_weights(path)
    next(iter(state['state_dict'].values())).mul_(2)
    save_torch(path, state)
    return {}


def spoil(path):
    path.write_bytes(path.read_bytes() + b' ')
    return {}


def test_a_foreign_release_is_looked_at(copy, monkeypatch):
    """A folder that says it is finished is believed only as far as its audit was of it."""
    looks = []
    real = publish.audit_release
    monkeypatch.setattr(publish, 'audit_release', lambda *a, **k: looks.append(a) or real(*a, **k))
    (copy / 'run/private/audit.json').unlink()
    assert make(copy).audit.passed and len(looks) == 1
    assert make(copy).audit.passed and len(looks) == 1  # known from then on
    manifest = json.loads((copy / 'run/release/manifest.json').read_text())
    manifest['k'] = 12
    (copy / 'run/release/manifest.json').write_text(json.dumps(manifest, indent=2) + '\n')
    with pytest.raises(PrivacyError, match='does not pass its verification'):
        make(copy)
    assert len(looks) == 2


def test_nothing_unverified_is_published(copy, monkeypatch):
    shutil.rmtree(copy / 'run/release')
    written = pipeline.write

    def swap(run, groups, n_batches, staging):
        manifest = written(run, groups, n_batches, staging)
        first, second, *_ = sorted((staging / 'images').iterdir())
        shutil.copy(first, second)
        return manifest

    monkeypatch.setattr(pipeline, 'write', swap)
    with pytest.raises(PrivacyError, match='not published'):
        make(copy)
    assert not (copy / 'run/release').exists()
    with pytest.raises(PrivacyError, match='not published'):
        make(copy)


def test_a_card_for_a_finished_release(copy, tmp_path):
    (tmp_path / 'card.yaml').write_text('creator: Eye Clinic\n')
    pictures = tree_bytes(copy / 'run/release/images')
    release = make(copy, card=read_card(tmp_path / 'card.yaml'))
    assert 'Eye Clinic' in (release.folder / 'README.md').read_text()
    assert tree_bytes(release.folder / 'images') == pictures and release.audit.passed
    (tmp_path / 'card.yaml').write_text('creator: eye003x\n')
    with pytest.raises(UserError, match='names photographs(.|\n)*eye003x'):
        make(copy, card=read_card(tmp_path / 'card.yaml'))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'k': 1}, '`k` 1'),
        ({'k': 13}, 'only 12 images'),
        ({'clustering': 'x'}, '`clustering`: want one of default'),
        ({'policy': 'x'}, '`policy`: want'),
        ({'surplus': 'x'}, '`surplus`: want'),
        ({'precision': 'x'}, '`precision`: want'),
        ({'strata': ('colours',)}, '`strata`: want'),
    ],
)
def test_settings_that_are_none(made, tmp_path, settings, message):
    table = read_table(made / 'data/labels.csv')
    networks = Networks(made / 'psp.pt', made / 'content.pt')
    with pytest.raises(UserError, match=message):
        anonymize(table, networks, dataclasses.replace(SETTINGS, **settings), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_settings_and_flags_are_one():
    settings = Settings(
        k=7, strata=('eyes', 'labels'), optimize=OptimizeConfig(n_steps=3, style_strides=(2, 4))
    )
    options = settings.options()
    assert options['same_k'] == 7 and options['strata'] == ['eye', 'label']
    assert Settings.from_options(json.loads(json.dumps(options))) == settings
    assert Settings.from_options({}) == Settings()


def test_the_page_of_the_docs(made, tmp_path, monkeypatch, capsys):
    """docs/python.md, run as it stands."""
    page = (ROOT / 'docs/python.md').read_text(encoding='utf-8')
    code = page.split('```python\n')[1].split('```')[0]
    shutil.copy(made / 'data/labels.csv', tmp_path / 'labels.csv')
    shutil.copytree(made / 'data/images', tmp_path / 'photos')
    shutil.copy(made / 'psp.pt', tmp_path / 'restyle.pt')
    shutil.copy(made / 'content.pt', tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, 'docs/python.md', 'exec'), {})
    assert 'False' not in capsys.readouterr().out
    assert (tmp_path / 'run/release/manifest.json').exists()


def test_recorded_networks_are_the_same_networks():
    given = Networks('restyle.pt', 'content.pt', 'vgg.pt', 'resnet50', 'vgg19', 'guide.pt')
    recorded = given.options()
    assert all(recorded.values())
    assert Networks.from_options(recorded) == given
