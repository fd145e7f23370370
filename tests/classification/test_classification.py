"""The grader: metrics, augmentation, soft labels, resuming, and the published commands."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image
from tiny_grader import TinyNet, pictures

from classification import data
from classification.grader import build_grader
from classification.main import main
from classification.settings import Settings
from datasets.pictures import load_pictures
from datasets.table import read_table
from models.features.pretrained import load_feature_network
from utils.errors import UserError

CLI = ['-config', 'tiny.yaml', '--device', 'cpu', '--seed', '1', '2']


def write_pictures(folder, names, images):
    folder.mkdir(parents=True)
    for name, image in zip(names, images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f'{name}.png')


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Source photographs in groups of 2, both result layouts, and a test set, on disk."""
    monkeypatch.chdir(tmp_path)
    grades = np.arange(40) % 5
    ids = [f'src{i:02d}' for i in range(40)]
    write_pictures(tmp_path / 'source', ids, pictures(grades))
    pd.DataFrame({'id_code': ids, 'diagnosis': grades}).to_csv('train.csv', index=False)
    centers = np.concatenate([np.arange(20), np.arange(20)]) + 1
    pd.DataFrame({'id_code': ids, 'centers': centers, 'count_centers': 2}).to_csv(
        'k2_nearest_df.csv', index=False
    )
    first = pictures(grades[:20], seed=1)
    write_pictures(tmp_path / 'style_proj', ids[:20], first)
    write_pictures(tmp_path / 'centroid', [f'{i}_centroids' for i in ids[:20]], first)
    names = [f'synthetic_{i:05d}' for i in range(20)]
    write_pictures(tmp_path / 'release' / 'images', names, first)
    shares = np.eye(5)[grades[:20]]
    pd.DataFrame(
        {'image': names, 'label': grades[:20], **{f'p{c}': shares[:, c] for c in range(5)}}
    ).to_csv('release/labels.csv', index=False)
    test = np.arange(15) % 5
    write_pictures(tmp_path / 'test', [f't{i}' for i in range(15)], pictures(test, seed=2))
    pd.DataFrame({'id_code': [f't{i}' for i in range(15)], 'diagnosis': test}).to_csv(
        'test.csv', index=False
    )
    (tmp_path / 'tiny.yaml').write_text(
        'arch: resnet18\nsmall_stem: true\nimage_size: 16\nepochs: 2\nbatch_size: 8\n'
        'learning_rate: 1e-3\nsave_path: runs/tiny\n'
    )
    return tmp_path


@pytest.fixture
def tiny_net(monkeypatch):
    monkeypatch.setattr('classification.grader.build_resnet', TinyNet)


TEST_FLAGS = ['--labels_test', 'test.csv', '--test_images_path', 'test']
PUBLISHED = [
    '-overwrite',
    '--k',
    'k2',
    '--crop',
    'crop4',
    '--lambda1',
    '1e2',
    '--lambda2',
    '1e-6',
    '--df',
    'k2_nearest_df.csv',
    '--labels_train',
    'train.csv',
    *TEST_FLAGS,
]


# metrics


# augmentation and schedule


# targets


# training


# data


def test_group_labels(study):
    table = read_table('train.csv', ids_only=True)
    grades = dict(zip(table.ids, table.labels)) | {'src20': 3}
    groups = data.graded_groups(study / 'k2_nearest_df.csv', grades)
    found = data.published_set(groups, grades, study / 'style_proj')
    assert found.labels[0] == 0  # grades 0 and 3: a tie goes to the lowest
    np.testing.assert_array_equal(found.shares[0], [0.5, 0, 0, 0.5, 0])


def test_pixel_average(study):
    table = read_table('train.csv', study / 'source', require_label=True)
    grades = dict(zip(table.ids, table.labels))
    found = data.pixel_average_set(
        data.graded_groups('k2_nearest_df.csv', grades), grades, dict(zip(table.ids, table.paths))
    )
    single = load_pictures([[p] for p in table.paths], 16).astype(float)
    got = load_pictures(found.sources, 16)
    np.testing.assert_array_equal(got, np.rint((single[:20] + single[20:]) / 2))


def test_identical_photographs_are_on_one_side(study):
    """Photographs 0 and 20 of the source are one; test photograph 3 is source photograph 7."""
    shutil.copy('source/src00.png', 'source/src20.png')
    shutil.copy('source/src07.png', 'test/t3.png')
    shutil.copy('test/t4.png', 'test/t9.png')
    train = read_table('train.csv', 'source', require_label=True)
    people = data.photograph_set(train).groups
    assert people[0] == people[20] and len(set(people)) == 39
    test = read_table('test.csv', 'test', require_label=True)
    kept, dropped = data.without_known_people(test, train)
    assert dropped == 1 and 't3' not in kept.ids
    assert len(set(kept.patients)) == 13 and kept.patients[3] == kept.patients[8] == 't4'


# configuration and command


@pytest.mark.parametrize('kind', ['style_proj', 'centroid', 'release'])
def test_command_on_every_release_kind(study, tiny_net, kind, capsys):
    flags = (
        ['--release', 'release', *TEST_FLAGS]
        if kind == 'release'
        else [*PUBLISHED, '--images_path', kind, '--is_centroid', str(kind == 'centroid')]
    )
    assert main([*CLI, *flags, '--out_dir', 'out']) == 0
    out = study / 'out'
    results = json.loads((out / 'results.json').read_text())
    assert len(results['summary']['kappa']['values']) == 2
    assert results['summary']['auc_referable']['std'] is not None
    assert results['n_test'] == 15 and results['initial_weights'] == 'random'
    assert results['seeds'][0]['n_train'] + results['seeds'][0]['n_validation'] == 20
    for name in ('roc.png', 'confusion.png', 'training.png'):
        Image.open(out / name).verify()
    kept = {'best_validation_weights.pt', 'final_weights.pt', 'result.json'}
    records = {'stats.jsonl', 'curves.png', 'logs'}
    assert kept | records == {p.name for p in (out / 'seed_1').iterdir()}
    assert 'auc_referable' in capsys.readouterr().out


def test_published_output_folder_and_finished_seeds(study, tiny_net, monkeypatch):
    arguments = [*CLI, *PUBLISHED, '--images_path', 'style_proj', '-print_config']
    assert main(arguments) == 0
    folder = study / 'runs' / 'tiny_k2_crop4_1e2_1e-6'
    first = (folder / 'results.json').read_text()
    monkeypatch.setattr('classification.experiment.train_grader', None)  # must not be needed
    assert main([a for a in arguments if a != '-overwrite']) == 0
    assert (folder / 'results.json').read_text() == first
    with pytest.raises(UserError, match='other settings'):
        main([*[a for a in arguments if a != '-overwrite'], '--epochs', '3'])
    (study / 'mine').mkdir()
    (study / 'mine' / 'file').touch()
    with pytest.raises(UserError, match='left alone'):
        main([*arguments, '--out_dir', 'mine'])


@pytest.mark.parametrize(
    'baseline,n',
    [('real', 40), ('real-same-n', 20), ('pixel-average', 20), ('source', 40), ('release', 20)],
)
def test_baselines(study, tiny_net, baseline, n):
    assert (
        main(
            [
                *CLI,
                *PUBLISHED,
                '--baseline',
                baseline,
                '--train_images_path',
                'source',
                '--out_dir',
                'out',
                '--seed',
                '0',
                '--epochs',
                '1',
                '--labels',
                'soft',
            ]
        )
        == 0
    )
    seed = json.loads((study / 'out' / 'results.json').read_text())['seeds'][0]
    assert seed['n_train'] + seed['n_validation'] == n


def test_random_averages_are_of_different_people(study):
    table = read_table('train.csv', 'source', require_label=True)
    table = dataclasses.replace(table, patients=[f'p{i // 2}' for i in range(40)])
    found = data.random_average_set(table, 3)
    of = {p: (i, own) for i, (p, own) in enumerate(zip(table.paths, table.patients))}
    rows = [[of[p][0] for p in files] for files in found.sources]
    assert len(found) >= 12 and len(set(sum(rows, []))) == 3 * len(found)
    for group, label, share in zip(rows, found.labels, found.shares):
        assert len({table.patients[i] for i in group}) == 3
        assert share == pytest.approx(np.eye(5)[table.labels[group]].mean(0))
        assert label == share.argmax()
    assert data.random_average_set(table, 3).sources == found.sources
    with pytest.raises(UserError, match='too few'):
        data.random_average_set(table, 21)


def test_the_probe_is_a_grader(study, monkeypatch, capsys):
    monkeypatch.setattr(
        'classification.probe.pooled_features',
        lambda net, u8, device: u8.reshape(len(u8), 3, -1).mean(2) / 255,
    )
    flags = [
        '-config',
        'probe.yaml',
        '--device',
        'cpu',
        '--image_size',
        '16',
        '--labels_train',
        'train.csv',
        '--train_images_path',
        'source',
        *TEST_FLAGS,
    ]
    assert main([*flags, '--baseline', 'real', '--out_dir', 'out']) == 0
    found = json.loads((study / 'out' / 'results.json').read_text())
    assert found['summary']['auc_referable']['mean'] > 0.95
    assert found['summary']['kappa']['mean'] > 0.7 and found['initial_weights'] == 'lite1'
    low, high = found['seeds'][0]['test_best']['interval_95']['auc_referable']
    assert low <= found['summary']['auc_referable']['mean'] <= high
    assert {p.name for p in (study / 'out' / 'seed_0').iterdir()} == {'result.json', 'guide.pt'}
    digest = load_feature_network('lite0').digest
    (study / 'release' / 'manifest.json').write_text(
        json.dumps({'networks': {'content': f'lite0 {digest}'}})
    )
    assert main([*flags, '--release', 'release', '--features', 'lite0', '--out_dir', 'soft']) == 0
    assert "features: lite0, the maker's" in capsys.readouterr().out
    assert (
        main(
            [
                *flags,
                '--baseline',
                'random-average',
                '--group_size',
                '2',
                '--out_dir',
                'means',
                '--seed',
                '0',
                '1',
            ]
        )
        == 0
    )
    assert 'auc_referable' in capsys.readouterr().out


def test_pretrained_networks_are_named_rightly(study):
    with pytest.raises(UserError, match="'resnet19' is none of.*timm"):
        Settings(arch='resnet19')
    with pytest.raises(UserError, match='lite1 holds weights of tf_efficientnet_lite1'):
        build_grader(Settings(arch='tf_efficientnet_lite0'), seed=0, imagenet_weights='lite1')
    flags = ['-config', 'finetune.yaml', '--release', 'release', *TEST_FLAGS, '--device', 'cpu']
    with pytest.raises(UserError, match='initial_weights: nowhere.pth is no file'):
        main([*flags, '--imagenet_weights', 'nowhere.pth', '--out_dir', 'out'])


def in_run_folder(study):
    """Moves the release into the layout of a run that used photographs 5 to 9 of the test set."""
    (study / 'run/private').mkdir(parents=True)
    (study / 'release').rename(study / 'run/release')
    ids = [f't{i}' for i in range(5, 10)]
    pd.DataFrame({'id_code': ids, 'centers': 1}).to_csv('run/private/groups.csv', index=False)
    (study / 'run/private/options.json').write_text(
        json.dumps({'options': {'data_path': str(study / 'test')}})
    )
    return ['--release', 'run/release', *TEST_FLAGS, '--out_dir', 'out', '--epochs', '1']


def test_nobody_of_the_release_is_tested(study, tiny_net, capsys):
    """The run folder around a release tells whose photographs are behind it."""
    flags = in_run_folder(study)
    assert main([*CLI, *flags]) == 0
    results = json.loads((study / 'out/results.json').read_text())
    assert results['n_test'] == 10 and results['test_rows_dropped'] == 5
    assert results['test_people_checked'] and 'NOT KNOWN' not in capsys.readouterr().err
    (study / 'run/private/options.json').write_text('{}')  # ids are compared all the same
    assert main([*CLI, *flags[:-4], '--out_dir', 'again', '--epochs', '1']) == 0
    assert json.loads((study / 'again/results.json').read_text())['n_test'] == 10


def test_a_release_by_itself_is_said_to_be_unknown(study, tiny_net, capsys):
    assert (
        main([*CLI, '--release', 'release', *TEST_FLAGS, '--out_dir', 'out', '--epochs', '1']) == 0
    )
    assert 'IT IS NOT KNOWN WHO IS BEHIND THE RELEASE' in capsys.readouterr().err
    assert not json.loads((study / 'out/results.json').read_text())['test_people_checked']


def test_resuming_compares_pictures_not_paths(study, tiny_net):
    flags = [
        '--baseline',
        'real',
        '--labels_train',
        'train.csv',
        '--out_dir',
        'out',
        '--epochs',
        '1',
        '--labels_test',
        'test.csv',
    ]
    assert main([*CLI, *flags, '--train_images_path', 'source', '--test_images_path', 'test']) == 0
    absolute = [
        '--train_images_path',
        str(study / 'source'),
        '--test_images_path',
        str(study / 'test'),
    ]
    assert main([*CLI, *flags, *absolute]) == 0
    shutil.copy('test/t0.png', 'test/t5.png')
    with pytest.raises(UserError, match='test photographs: was'):
        main([*CLI, *flags, *absolute])


def test_inverted_asks_for_the_reconstructions(study):
    script = str(ROOT / 'classification' / 'main_inverted_2cls.py')
    done = subprocess.run(
        [sys.executable, script, *PUBLISHED, '--images_path', 'style_proj'],
        capture_output=True,
        text=True,
        cwd=study,
        timeout=300,
    )
    assert done.returncode == 2 and done.stderr == (
        'error: --baseline needed: the folder of the reconstructions; see --help\n'
    )


def test_two_class_command(study):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / 'classification' / 'main_ours_2cls.py'),
            *PUBLISHED,
            '--images_path',
            'style_proj',
            '--device',
            'cpu',
            '--seed',
            '0',
            '--epochs',
            '1',
            '--arch',
            'resnet18',
            '--image_size',
            '32',
            '--out_dir',
            'out',
        ],
        capture_output=True,
        text=True,
        cwd=study,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((study / 'out' / 'results.json').read_text())['summary']
    assert (
        summary['auc']['mean'] is not None
        and 'labels: soft' in (study / 'out' / 'config.yaml').read_text()
    )


def test_bad_input_is_named(study, tiny_net):
    def fails(match, *flags):
        with pytest.raises(UserError, match=match):
            main([*CLI, *flags])

    images = ['--images_path', 'style_proj']
    frame = pd.read_csv('train.csv')
    frame[frame.index >= 2].to_csv('short.csv', index=False)
    fails('(?s)2 of 40 ids.*src00.*src01', *PUBLISHED, *images, '--labels_train', 'short.csv')
    fails(
        '(?s)20 of 20 groups have no picture.*src00_centroids',
        *PUBLISHED,
        *images,
        '--is_centroid',
        'True',
    )
    pd.DataFrame({'id_code': ['t0', 't5'], 'diagnosis': [0, 0]}).to_csv('one.csv', index=False)
    fails('only grade 0', *PUBLISHED, *images, '--labels_test', 'one.csv')
    small = pd.read_csv('k2_nearest_df.csv').query('centers <= 4')
    small.to_csv('few.csv', index=False)
    fails('only 4 training pictures', *PUBLISHED, *images, '--df', 'few.csv', '--out_dir', 'few')
    labels = pd.read_csv('release/labels.csv')
    labels.assign(p0=0.7).to_csv('release/labels.csv', index=False)
    fails('(?s)sum to 1.*row 2', '--release', 'release', *TEST_FLAGS)
    labels[['image', 'label']].to_csv('release/labels.csv', index=False)
    fails('needs the columns p0', '--release', 'release', *TEST_FLAGS, '--labels', 'soft')
    fails('--labels_test needed', '--release', 'release')
    fails('give --release', '--labels_train', 'train.csv', *TEST_FLAGS)
    fails('neither real', *PUBLISHED, '--baseline', 'nothing')
