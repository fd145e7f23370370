"""The grader: metrics, augmentation, soft labels, resuming, and the published commands."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from conftest import ROOT
from PIL import Image
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from torchvision.transforms import InterpolationMode

from classification import data
from classification.augment import apply_parameters, draw_parameters
from classification.grader import (
    build_grader,
    interpret,
    learning_rate,
    loss_function,
    training_targets,
)
from classification.main import main
from classification.metrics import bootstrap_intervals, check_test_labels, grading_metrics
from classification.settings import CONFIG_DIR, Settings, load_config
from classification.train import train_grader
from datasets.pictures import load_pictures
from datasets.table import read_table
from models.features.pretrained import load_feature_network
from utils.errors import UserError
from utils.io import save_torch
from utils.logs import read_jsonl

TINY = Settings(
    arch='resnet18',
    small_stem=True,
    image_size=16,
    epochs=4,
    batch_size=8,
    learning_rate=0.001,
    translation=0.05,
)
CLI = ['-config', 'tiny.yaml', '--device', 'cpu', '--seed', '1', '2']


def pictures(grades, size=16, seed=0):
    """uint8 [n, 3, S, S]; the brightness of the green channel tells the grade."""
    rng = np.random.default_rng(seed)
    grades = np.asarray(grades)
    base = rng.integers(0, 60, (len(grades), 3, size, size))
    base[:, 1] += 40 * grades[:, None, None]
    return base.astype(np.uint8)


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


class TinyNet(torch.nn.Module):
    """Stands in for a ResNet where the test is about what surrounds the network."""

    feature_dim = 8

    def __init__(self, *_, **__):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 4, 4),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        )

    def forward(self, x):
        return self.fc(self.body(x))


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


def test_metrics_against_their_definitions():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 300)
    predicted = np.clip(labels + rng.integers(-2, 3, 300), 0, 4)
    score = labels + rng.normal(size=300)
    found = grading_metrics(labels, predicted, score)
    counts = np.zeros((5, 5))
    np.add.at(counts, (labels, predicted), 1)
    weight = np.subtract.outer(np.arange(5), np.arange(5)) ** 2
    chance = np.outer(counts.sum(1), counts.sum(0)) / 300
    positive = labels >= 2
    ranks = (score[positive][:, None] > score[~positive]).mean()
    assert found['kappa'] == pytest.approx(1 - (weight * counts).sum() / (weight * chance).sum())
    assert found['kappa'] == pytest.approx(
        cohen_kappa_score(labels, predicted, weights='quadratic')
    )
    assert found['auc_referable'] == pytest.approx(ranks)
    assert found['auc_referable'] == pytest.approx(roc_auc_score(positive, score))
    assert found['accuracy'] == pytest.approx(np.trace(counts) / 300)
    assert found['balanced_accuracy'] == pytest.approx(np.mean(np.diag(counts) / counts.sum(1)))
    assert found['confusion'] == counts.astype(int).tolist()


def test_binary_metrics():
    found = grading_metrics([0, 0, 1, 3], [0, 1, 1, 1], [0.1, 0.6, 0.5, 0.9], positive_from=1)
    assert found['accuracy'] == 0.75 and found['auc'] == 0.75 and found['auc_referable'] == 1
    assert found['confusion'] == [[1, 1], [0, 2]]


def test_undefined_scores():
    assert grading_metrics([0, 0], [0, 0], [0, 0])['kappa'] == 0
    assert grading_metrics([0, 1], [0, 1], [0, 1])['auc_referable'] is None
    with pytest.raises(UserError, match='only grade 2'):
        check_test_labels([2, 2])
    with pytest.raises(UserError, match='one side of grade 2'):
        check_test_labels([0, 1])


def test_bootstrap_counts_people_not_eyes():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 60)
    score = labels + rng.normal(size=60) * 2
    predicted = np.clip(np.rint(score), 0, 4).astype(int)
    low, high = bootstrap_intervals(labels, predicted, score)['auc_referable']
    assert low < roc_auc_score(labels >= 2, score) < high
    # Every eye four times: the same information, so the same interval when people are drawn.
    four = [np.tile(v, 4) for v in (labels, predicted, score)]
    width = [
        np.subtract(*found['kappa'][::-1])
        for found in (
            bootstrap_intervals(labels, predicted, score, n_bootstrap=300),
            bootstrap_intervals(*four, groups=np.tile(np.arange(60), 4), n_bootstrap=300),
            bootstrap_intervals(*four, n_bootstrap=300),
        )
    ]
    assert width[1] == pytest.approx(width[0], rel=0.4) and width[2] < 0.7 * width[0]


# augmentation and schedule


def test_augmentation_equals_torchvision_one_by_one():
    generator = torch.Generator().manual_seed(0)
    img = torch.rand(6, 3, 32, 32, generator=generator)
    p = draw_parameters(6, 32, Settings(), generator)
    for i, got in enumerate(apply_parameters(img, p)):
        want = img[i]
        want = TF.horizontal_flip(want) if p['flip_x'][i] else want
        want = TF.vertical_flip(want) if p['flip_y'][i] else want
        steps = [
            lambda x, i=i: TF.adjust_brightness(x, float(p['brightness'][i])),
            lambda x, i=i: TF.adjust_contrast(x, float(p['contrast'][i])),
        ]
        for step in steps[::-1] if p['contrast_first'][i] else steps:
            want = step(want)
        want = TF.rotate(want, float(p['angle'][i]), InterpolationMode.NEAREST)
        want = TF.affine(
            want,
            angle=0,
            translate=[int(v) for v in p['shift'][i]],
            scale=1,
            shear=[0, 0],
            interpolation=InterpolationMode.NEAREST,
        )
        # A coordinate halfway between two pixels may round either way.
        assert ((got - want).abs() > 1e-4).float().mean() < 0.01


def test_published_schedule():
    rates = [learning_rate(e, Settings()) for e in range(61)]
    assert rates[0] == 1e-3 and rates[19] > 1e-4 and rates[20] == 1e-4 == rates[60]


# targets


def test_soft_labels_change_the_targets_and_the_gradient():
    shares = np.array([[0.6, 0, 0, 0, 0.4]])
    for target, soft, hard in (('regression', 1.6, 0), ('binary', 0.4, 0)):
        settings = Settings(target=target)
        assert training_targets(shares, settings).item() == pytest.approx(soft)
        assert training_targets(np.array([0]), settings).item() == hard
    settings = Settings(target='5-class')
    raw = torch.zeros(1, 5, requires_grad=True)
    loss_function(raw, training_targets(shares, settings), settings).backward()
    np.testing.assert_allclose(raw.grad[0], 0.2 - shares[0], atol=1e-6)


def test_soft_labels_train_another_grader(tiny_net):
    grades = np.arange(20) % 5
    soft = np.eye(5)[grades] * 0.6 + 0.08
    settings = Settings(**{**vars(TINY), 'epochs': 1})
    hard_result, soft_result = (
        train_grader(pictures(grades), t, settings=settings) for t in (grades, soft)
    )
    assert hard_result.history[0]['loss'] != soft_result.history[0]['loss']


def test_regression_rounds_and_clips_as_published():
    found = interpret(torch.tensor([[-2.0], [0.49], [0.5], [3.6], [9.0]]), Settings())
    assert found.grades.tolist() == [0, 0, 1, 4, 4]


# training


@pytest.mark.parametrize('target', ['regression', '5-class', 'binary'])
def test_grader_learns(tiny_net, target):
    grades = np.arange(60) % 5
    settings = Settings(
        **{**vars(TINY), 'target': target, 'epochs': 40, 'brightness': 0.0, 'learning_rate': 0.02}
    )
    result = train_grader(
        pictures(grades), grades, pictures(grades, seed=1), grades, settings=settings
    )
    assert result.evaluate(pictures(grades, seed=2), grades)['auc_referable'] > 0.9


def test_resumed_training_equals_an_uninterrupted_one(tiny_net, tmp_path):
    grades = np.arange(24) % 5
    images = pictures(grades)
    arguments = dict(settings=TINY, seed=3)
    whole = train_grader(images, grades, images[:8], grades[:8], **arguments)

    def train(stopped=lambda: False, grades=grades):
        return train_grader(
            images, grades, images[:8], grades[:8], folder=tmp_path, stopped=stopped, **arguments
        )

    assert train(iter([False, True]).__next__) is None
    saved = (tmp_path / 'checkpoint.pt').read_bytes()
    with pytest.raises(UserError, match='other pictures, labels or settings'):
        train(grades=(grades + 1) % 5)
    damaged = bytearray(saved)
    damaged[len(damaged) // 2] ^= 4
    (tmp_path / 'checkpoint.pt').write_bytes(damaged)
    with pytest.raises(UserError, match='checkpoint.*Remove it to start again'):
        train()
    (tmp_path / 'checkpoint.pt').write_bytes(saved)
    resumed = train()
    assert [r['step'] for r in read_jsonl(tmp_path / 'stats.jsonl')] == [1, 2, 3, 4]
    assert resumed.history == whole.history and resumed.best_epoch == whole.best_epoch
    for which in ('best', 'final'):
        np.testing.assert_array_equal(
            resumed.use(which).predict(images).outputs, whole.use(which).predict(images).outputs
        )


def test_imagenet_weights_by_path(tmp_path):
    import torchvision

    state = torchvision.models.resnet18(weights=None).state_dict()
    state['conv1.weight'].fill_(0.25)
    save_torch(tmp_path / 'resnet18.pth', state)
    grades = np.arange(10) % 5
    settings = Settings(
        **{**vars(TINY), 'small_stem': False, 'epochs': 1, 'learning_rate': 1e-9, 'image_size': 32}
    )
    result = train_grader(
        pictures(grades, 32), grades, settings=settings, imagenet_weights=tmp_path / 'resnet18.pth'
    )
    assert (result.final_state['conv1.weight'] - 0.25).abs().max() < 1e-3
    with pytest.raises(UserError, match='is a resnet18, the grader a resnet50'):
        train_grader(
            pictures(grades, 32),
            grades,
            imagenet_weights=tmp_path / 'resnet18.pth',
            settings=Settings(image_size=32),
        )


def test_divergence_is_reported(tiny_net):
    grades = np.arange(24) % 5
    settings = Settings(**{**vars(TINY), 'learning_rate': 1e6})
    with pytest.raises(UserError, match='diverged in epoch 1'):
        train_grader(pictures(grades), grades, pictures(grades), grades, settings=settings)


# data


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


def test_a_pretrained_network_is_trained_further():
    settings = Settings(
        target='5-class',
        arch='tf_efficientnet_lite0',
        image_size=64,
        epochs=1,
        batch_size=8,
        learning_rate=0.01,
    )
    one, other = (build_grader(settings, seed=s, imagenet_weights='lite0') for s in (0, 1))
    frozen = load_feature_network('lite0').net.state_dict()
    for key, value in one.state_dict().items():
        if not key.startswith('classifier'):
            assert torch.equal(value, frozen[key])
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    grades = np.arange(10) % 5
    result = train_grader(
        pictures(grades, 64), np.eye(5)[grades], settings=settings, imagenet_weights='lite0'
    )
    trained = result.net.state_dict()
    assert all(
        not torch.equal(trained[k], frozen[k]) for k in ('conv_stem.weight', 'conv_head.weight')
    )
    assert result.predict(pictures(grades, 64)).outputs.shape == (10, 5)
    assert build_grader(dataclasses.replace(settings, arch='mobilenetv3_small_050'), seed=0)(
        torch.zeros(1, 3, 64, 64)
    ).shape == (1, 5)


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
