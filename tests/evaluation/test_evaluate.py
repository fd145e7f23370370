"""The whole comparison on a few tiny phantoms: rows, caching, own attacks, and its complaints."""

import importlib.util
import json
import re
from html import unescape
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, load_script
from release_fixture import save_networks

from classification.settings import load_config
from datasets.phantoms import make_dataset
from evaluation.attacks.nearest import pixel
from evaluation.attacks.recognition import taught
from evaluation.catalogue import MEASURES, METHODS
from evaluation.judges import Judge
from evaluation.population import people_of
from evaluation.registry import Candidate
from evaluation.releases import check_levers, read_release, shaped
from evaluation.settings import read_settings
from evaluation.study import open_study
from models.features.pretrained import load_feature_network
from utils.errors import UserError
from utils.images import load_rgb

evaluate = load_script('evaluate')
GROUPED = [m.name for m in METHODS.values() if m.grouped]
TRAINED = ['pair_trained', 'identity_trained']  # which need controls
ATTACKS = [m.name for m in MEASURES.values() if m.attack and m.name not in TRAINED]


@pytest.fixture(scope='module', autouse=True)
def few_reference_people():
    """As many as the projection attack wants make a slow test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('evaluation.attacks.projection.REMOVED', (5,))
        yield


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """A configuration file of a run of seconds."""
    folder = tmp_path_factory.mktemp('evaluation')
    save_networks(folder)
    grader = yaml.safe_load((ROOT / 'classification/configs/small.yaml').read_text())
    grader |= {'image_size': 64, 'small_stem': True, 'epochs': 1, 'batch_size': 8}
    (folder / 'grader.yaml').write_text(yaml.safe_dump(grader))
    entries = {
        'name': 'test',
        'phantoms': {'n_patients': 40, 'size': 64, 'visits': 2, 'seed': 1},
        'members': 0.35,
        'judges': ['lite0'],
        'checkpoint': str(folder / 'psp.pt'),
        'content_weights': str(folder / 'content.pt'),
        'num_steps': 1,
        'k': [2, 3],
        'methods': list(METHODS),
        'measures': [name for name in MEASURES if name not in TRAINED],
        'controls': False,
        'grader': str(folder / 'grader.yaml'),
        'seeds': [0],
    }
    (folder / 'config.yaml').write_text(yaml.safe_dump(entries))
    return folder / 'config.yaml'


def change(config, folder, **entries):
    """A changed copy of the configuration."""
    changed = yaml.safe_load(config.read_text()) | entries
    (folder / 'changed.yaml').write_text(yaml.safe_dump(changed))
    return folder / 'changed.yaml'


@pytest.fixture(scope='module')
def finished(config, tmp_path_factory):
    """The folder of a finished evaluation of all methods."""
    out = tmp_path_factory.mktemp('finished') / 'out'
    assert evaluate.main([f'--config={config}', f'--out_dir={out}', '--device=cpu']) == 0
    return out


def rows_of(out):
    return {r['name']: r for r in json.loads((out / 'results.json').read_text())['rows']}


def test_the_comparison(finished):
    rows = rows_of(finished)
    assert sorted(rows) == sorted(
        ['real', 'real_same_n', 'inverted', 'unconditional']
        + [f'{m}_k{k}' for m in GROUPED for k in (2, 3)]
    )
    assert rows['k_salsa_k2']['n'] > rows['k_salsa_k3']['n']
    assert rows['real_same_n']['n'] == rows['k_salsa_k2']['n']
    for row in rows.values():
        assert set(row['attacks']) == set(ATTACKS)
        assert 0 <= row['utility']['summary']['auc_referable']['mean'] <= 1
    # Photographs that are in the release must be found, or the attacks do not work.
    for name in ('real', 'real_same_n'):
        assert all(a['auc']['value'] > 0.95 for a in rows[name]['attacks'].values())
        assert rows[name]['attacks']['pixel']['n_members'] == rows[name]['n']
    assert rows['k_salsa_k2']['reidentification']['lite0']['n_probes'] > 0
    assert rows['unconditional']['reidentification']['lite0'] is None


def test_the_releases_share_their_inversions(finished):
    """Photographs are inverted for the first release only."""
    (shared,) = (finished / 'inversions').iterdir()
    for k in (2, 3):
        for name in ('latents.npy', 'content.npy'):
            own = finished / f'k{k}/private' / name
            assert own.read_bytes() == (shared / name).read_bytes()


def test_the_page_shows_what_the_table_says(finished):
    page = (finished / 'results.html').read_text()
    text = (finished / 'results.md').read_text().splitlines()
    lines = [line for line in text if line.startswith('|')]
    (sentence,) = {line for line in text if line} - set(lines)
    assert sentence.startswith('The network that knows eyes (lite0') and sentence in unescape(page)
    heads = lines[0].strip('| ').split(' | ')
    assert heads[:3] == ['method', 'k', 'n'] and heads[-2:] == [
        'TPR at 1 % FPR',
        're-identified, rank 1 (lite0)',
    ]
    assert re.findall('<th>(.*?)</th>', page)[: len(heads)] == heads
    assert len(lines) == 2 + len(rows_of(finished))
    for line in lines[2:]:
        for cell in line.strip('| ').split(' | '):
            assert f'>{cell}<' in page
    for name in rows_of(finished):
        assert f'methods/{name}/examples.png' in page
        assert (finished / 'methods' / name / 'examples.png').stat().st_size > 0
    for file in re.findall('<img src="(.*?)"', page):
        assert (finished / file).is_file()
    assert 'http' not in page.replace('http-equiv', '')


def test_nothing_is_computed_twice_and_nothing_stale_is_shown(
    config, finished, tmp_path, monkeypatch
):
    """Content of the grader's file counts, not its name; a new measure leaves the others alone."""
    table = (finished / 'results.md').read_bytes()
    few = change(config, tmp_path, methods=['real', 'k_salsa'])
    monkeypatch.setattr('classification.experiment.train_grader', None)  # must not be needed
    for measure in MEASURES.values():
        monkeypatch.setattr(f'{measure.prepare.__module__}.attack_metrics', None, raising=False)
    flags = [f'--out_dir={finished}', '--device=cpu']
    assert evaluate.main([f'--config={config}', *flags]) == 0
    assert (finished / 'results.md').read_bytes() == table
    assert evaluate.main([f'--config={few}', *flags]) == 0
    before = rows_of(finished)
    assert set(before) == {'real', 'k_salsa_k2', 'k_salsa_k3'}
    monkeypatch.undo()
    grader = yaml.safe_load((config.parent / 'grader.yaml').read_text())
    (config.parent / 'grader.yaml').write_text(yaml.safe_dump(grader | {'epochs': 2}))
    try:
        assert evaluate.main([f'--config={few}', *flags]) == 0
    finally:
        (config.parent / 'grader.yaml').write_text(yaml.safe_dump(grader))
    after = rows_of(finished)
    for name, row in after.items():
        assert row['attacks'] == before[name]['attacks']
        assert row['utility']['seeds'][0]['best_epoch'] <= 2
        assert row['utility'] != before[name]['utility']
    other = change(config, tmp_path, num_steps=2)
    with pytest.raises(UserError, match='num_steps: was 1, now 2'):
        evaluate.main([f'--config={other}', *flags])


def test_a_grader_depends_on_the_file_it_starts_from(tmp_path):
    weights = tmp_path / 'weights.pt'
    found = []
    for content in (b'one', b'two'):
        weights.write_bytes(content)
        grader = load_config('small.yaml', initial_weights=str(weights))
        found.append(MEASURES['utility'].depends(SimpleNamespace(grader=grader)))
    assert found[0] != found[1]


def documented_attack(folder):
    """The module that docs/evaluation.md shows."""
    page = (ROOT / 'docs/evaluation.md').read_text()
    code = next(c for c in re.findall('```python\n(.*?)```', page, re.S) if '@attack' in c)
    assert len(code.splitlines()) < 30
    (folder / 'brightness.py').write_text(code)
    spec = importlib.util.spec_from_file_location('brightness', folder / 'brightness.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.brightness


def test_an_attack_of_ones_own(config, finished, tmp_path, monkeypatch):
    brightness = documented_attack(tmp_path)
    monkeypatch.setitem(MEASURES, 'brightness', brightness)
    own = change(config, tmp_path, methods=['real', 'k_salsa'], measures=['utility', 'brightness'])
    assert evaluate.main([f'--config={own}', f'--out_dir={finished}', '--device=cpu']) == 0
    rows = rows_of(finished)
    assert rows['real']['attacks']['brightness']['auc']['value'] == 1
    assert set(rows['real']['attacks']) == {'brightness'}
    assert 'attack: brightness' in (finished / 'results.md').read_text()
    assert (finished / 'roc_brightness.png').stat().st_size > 0


def test_members_outside_a_release_are_on_neither_side(config, finished, tmp_path):
    """The first half of the members are shown as they are; the others must not count."""
    study = open_study(read_settings(config), finished, device='cpu', seed=0)
    half = len(study.members) // 2
    group_of = np.where(np.arange(len(study.members)) < half, np.arange(len(study.members)), -1)
    candidate = Candidate(
        study.members[:half],
        study.population.members.labels[:half],
        np.eye(5)[study.population.members.labels[:half]],
        group_of,
    )
    found = pixel.prepare(study)(candidate, tmp_path)
    assert found['n_members'] == half and found['auc']['value'] == 1
    nobody = Candidate(
        candidate.pictures, candidate.labels, candidate.shares, np.full(len(study.members), -1)
    )
    assert pixel.prepare(study)(nobody, tmp_path)['n_members'] == len(study.members)


def test_pictures_of_photographs_know_their_people(config, finished):
    """So that the graders' validation splits keep people together, of inverted pictures too."""
    study = open_study(read_settings(config), finished, device='cpu', seed=0)
    members = study.population.members
    release = read_release(finished / 'k2', 2, members)
    for name in ('real', 'real_same_n', 'inverted'):
        found = METHODS[name].make(study, release)
        rows = np.flatnonzero(found.group_of >= 0)
        assert found.people == [members.patients[i] for i in rows]
        assert len(set(found.people)) < len(found.people) == len(found.pictures)
    assert METHODS['k_salsa'].make(study, release).people is None


@pytest.mark.parametrize(
    'entries, message',
    [
        ({'methods': ['k_salsa', 'magic']}, 'unknown methods magic'),
        ({'measures': ['pixel', 'palm']}, 'unknown measures palm'),
        ({'colour': 1}, 'unknown: colour'),
        ({'measures': ['pair_trained']}, 'trained attacks learn from the release of controls'),
        ({'controls': 1}, 'controls: want true or false'),
        ({'attackers': {'n_patients': 3}}, 'attackers: want'),
        ({'levers': {'x': {'k': 3}}}, 'levers: want a name for each'),
        ({'levers': {'x': {'epsilon': -1}}}, 'levers: x: .*epsilon.*want a number above 0'),
        ({'levers': {'x': {'epsilon': 8}}}, 'levers: x: .*epsilon.* needs .*latent_rank'),
        ({'table': 'x.csv'}, 'either phantoms or table'),
        ({'k': None}, 'k: want'),
        ({'k': [0]}, 'k: want'),
        ({'k': ['a']}, 'k: want'),
        ({'k': [2, 2]}, 'k: want a list of different'),
        ({'seeds': [True]}, 'seeds: want'),
        ({'grader': [1]}, 'grader: want text'),
        ({'members': 1.5}, 'members: want'),
        ({'phantoms': {'n_patients': 40}}, 'phantoms: want'),
        ({'phantoms': {'n_patients': '40', 'size': 32, 'visits': 1, 'seed': 1}}, 'phantoms: want'),
        ({'split_column': 'train'}, 'split_column: want'),
        ({'lr': 'fast'}, 'lr: want a number'),
        ({'checkpoint': 1}, 'checkpoint: want text'),
        ({'judges': [{'weights': 'x'}]}, 'judges: want'),
        ({'judges': ['vgg']}, 'vgg is none of'),
        ({'content_weights': 'lite0'}, 'made with lite0, which may not judge it alone'),
        ({'checkpoint': 'nowhere.pt'}, 'nowhere.pt'),
        ({'grader': 'nothing.yaml'}, 'no such file'),
    ],
)
def test_bad_configuration(config, tmp_path, entries, message):
    """Nothing is drawn before the configuration is known to be good."""
    with pytest.raises(UserError, match=message):
        evaluate.main(
            [
                f'--config={change(config, tmp_path, **entries)}',
                f'--out_dir={tmp_path / "out"}',
                '--device=cpu',
            ]
        )
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('content', [b'\xff\xfe\x00k', b'n\xe4me: x', b'[' * 3000, b'a: [', b'1'])
def test_files_that_are_no_configuration(tmp_path, content):
    (tmp_path / 'c.yaml').write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f'`config` {tmp_path / "c.yaml"}')):
        read_settings(tmp_path / 'c.yaml')


def test_all_that_is_wrong_is_said_at_once(config, tmp_path):
    path = change(config, tmp_path, k=[0], seeds=[], colour=1)
    with pytest.raises(UserError, match='(?s)unknown: colour.*k: want.*seeds: want'):
        read_settings(path)


def test_too_few_reference_people(config, tmp_path, monkeypatch):
    monkeypatch.setattr('evaluation.attacks.projection.REMOVED', (20, 60))
    with pytest.raises(UserError, match='26 reference photographs.*projection attack.* 40'):
        evaluate.main([f'--config={config}', f'--out_dir={tmp_path / "out"}', '--device=cpu'])


def test_too_few_people(config, tmp_path):
    few = change(
        config,
        tmp_path,
        members=0.5,
        phantoms={'n_patients': 8, 'size': 32, 'visits': 1, 'seed': 1},
    )
    with pytest.raises(UserError, match='4 people are too few others.*at least 8'):
        evaluate.main([f'--config={few}', f'--out_dir={tmp_path / "out"}', '--device=cpu'])


@pytest.mark.parametrize('name', ['levers', 'phantoms128'])
def test_levers_of_the_configurations_go_together(name):
    settings = read_settings(ROOT / f'configs/evaluation/{name}.yaml')
    check_levers(settings)
    with pytest.raises(UserError, match='`epsilon` needs'):
        shaped(settings, 5, 0, {'epsilon': 8, 'latent_rank': 0}).check()


def test_attackers_who_make_a_release_of_their_own(config, finished, tmp_path):
    """Beside every attack its control: a release by the same method in which nobody asked is."""
    attacks = ['pixel', 'identity', *TRAINED]
    own = change(
        config,
        tmp_path,
        methods=['real', 'pixel_average', 'k_salsa'],
        k=[2],
        measures=['probe', *attacks],
        controls=True,
        levers={'start': {'start_noise': 0.5}},
    )
    assert evaluate.main([f'--config={own}', f'--out_dir={finished}', '--device=cpu']) == 0
    rows = rows_of(finished)
    for name in attacks:
        found = rows['real']['attacks'][name]
        assert found['auc']['value'] > 0.95 and found['excess']['low'] > 0.1, name
        control = found['control']['auc']
        assert control['low'] < 0.6, name
        assert found['excess']['value'] == pytest.approx(found['auc']['value'] - control['value'])
    assert set(rows) == {'real', 'pixel_average_k2', 'k_salsa_k2', 'k_salsa_k2_start'}
    page = (finished / 'results.html').read_text()
    assert page.count('<h3>k_salsa_k2_start: k-SALSA</h3>') == 2  # answers and examples
    assert 'How good are the attackers?' in page and 'people who taught it nothing' in page
    known = rows['pixel_average_k2']['attacks']['identity']
    assert known['network']['auc']['value'] > 0.8
    assert known['own_group']['rank_1'] > 2 * known['own_group']['chance_rank_1']
    assert known['again']['own_group']['n_probes'] > 0
    assert set(known['linked']) == {'members', 'control', 'excess'}
    assert known['singled_out']['value'] > 2 * known['singled_out']['chance']


def test_attackers_with_photographs_of_their_own(config, tmp_path):
    """Without visits the fellow eye teaches, and the two eyes of a person say how well."""
    own = {'table': str(tmp_path / 'own/labels.csv'), 'image_dir': str(tmp_path / 'own/images')}
    make_dataset(tmp_path / 'own', n_patients=24, size=64, visits=1, seed=9)
    drawn = {'n_patients': 40, 'size': 64, 'visits': 1, 'seed': 1}
    settings = read_settings(change(config, tmp_path, phantoms=drawn, attackers=own))
    study = open_study(settings, tmp_path / 'out', device=torch.device('cpu'), seed=0)
    figures = taught(study, Judge(load_feature_network('lite0'), maker=False)).figures
    others = set(people_of(study.population.others))
    assert figures['fellow'] and figures['n_member_people'] == len(others)
    assert len(study.attackers.teachers) == 24 and len(study.attackers.released) == 24
    assert not set(study.attackers.teachers.patients) & set(study.attackers.released.patients)


def test_attackers_must_be_other_people(config, tmp_path):
    """Also in other files: each photograph is written anew under another name."""
    make_dataset(tmp_path / 'drawn', n_patients=40, size=64, visits=1, seed=1)
    again = pd.read_csv(tmp_path / 'drawn/labels.csv')
    (tmp_path / 'own').mkdir()
    for name in again.id_code:
        load_rgb(tmp_path / f'drawn/images/{name}.png').save(tmp_path / f'own/x{name}.bmp')
    again = again.assign(id_code='x' + again.id_code, patient_id='y' + again.patient_id)
    again.to_csv(tmp_path / 'own.csv', index=False)
    own = {'table': str(tmp_path / 'own.csv'), 'image_dir': str(tmp_path / 'own')}
    drawn = {'n_patients': 40, 'size': 64, 'visits': 1, 'seed': 1}

    def opened(**entries):
        settings = read_settings(change(config, tmp_path, phantoms=drawn, **entries))
        return open_study(settings, tmp_path / 'out', device=torch.device('cpu'), seed=0)

    with pytest.raises(UserError, match='`attackers`: 80 of their photographs are of people'):
        opened(attackers=own)
    again[:4].to_csv(tmp_path / 'few.csv', index=False)
    with pytest.raises(UserError, match='`attackers`: 2 people are too few; at least 6'):
        opened(attackers={**own, 'table': str(tmp_path / 'few.csv')})
    again.drop(columns='diagnosis').to_csv(tmp_path / 'bare.csv', index=False)
    with pytest.raises(UserError, match='`attackers`: .*bare.csv has no grade column'):
        opened(attackers={**own, 'table': str(tmp_path / 'bare.csv')})
    with pytest.raises(UserError, match='attackers: table: no such file or folder: none.csv'):
        opened(attackers={**own, 'table': 'none.csv'})
