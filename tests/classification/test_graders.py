"""Graders: measures, augmentation, schedules, learning, resuming."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from tiny_grader import TinyNet, pictures
from torchvision.transforms import InterpolationMode

from classification.augment import apply_parameters, draw_parameters
from classification.grader import interpret, learning_rate, loss_function, training_targets
from classification.metrics import bootstrap_intervals, check_test_labels, grading_metrics
from classification.settings import Settings
from classification.train import train_grader
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


@pytest.fixture
def tiny_net(monkeypatch):
    monkeypatch.setattr('classification.grader.build_resnet', TinyNet)


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


@pytest.mark.parametrize('target', ['regression', '5-class', 'binary'])
def test_grader_learns(tiny_net, target):
    grades = np.arange(60) % 5
    settings = Settings(
        **{**vars(TINY), 'target': target, 'epochs': 40, 'brightness': 0.0, 'learning_rate': 0.02}
    )
    result = train_grader(
        pictures(grades), grades, pictures(grades, seed=1), grades, settings=settings
    )
    score = result.predict(pictures(grades, seed=2)).score
    assert roc_auc_score(grades >= 2, score) > 0.9


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
