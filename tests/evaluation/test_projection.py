"""The projection attack: it finds members of averages, and nobody where there is nobody."""

import numpy as np
import pytest
import torch

from evaluation.attacks.projection import (
    _Whitening,
    attack_features,
    by_person,
    projection_attack,
    stand_out,
)
from models.features.pretrained import load_feature_network
from utils.errors import UserError

N, GROUPS, K = 60, 12, 5
REFERENCE, OTHERS = 120, 80


def people(rng, n):
    """Features of n people: strong directions that all share, and weak ones of their own."""
    shared = rng.standard_normal((n, 5)) @ (10 * np.eye(5, 200) + 1)
    return {'grams': shared + rng.standard_normal((n, 200)), 'pooled': rng.standard_normal((n, 40))}


def averages(features, group_of):
    return {
        name: np.stack([values[group_of == g].mean(0) for g in range(group_of.max() + 1)])
        for name, values in features.items()
    }


def attack(release, members, group_of, rng):
    return projection_attack(
        members,
        people(rng, OTHERS),
        release,
        people(rng, REFERENCE),
        member_people=[f'm{i}' for i in range(N)],
        other_people=[f'o{i}' for i in range(OTHERS)],
        group_of=group_of,
    )


@pytest.fixture
def drawn():
    rng = np.random.default_rng(0)
    return rng, people(rng, N), np.arange(N) // K


def test_single_people_are_found(drawn):
    rng, members, _ = drawn
    found = attack(members, members, np.arange(N), rng)
    assert found.auc > 0.99 and found.ranks['rank_1'] == 1


def test_averages_of_five_are_found(drawn):
    rng, members, group_of = drawn
    found = attack(averages(members, group_of), members, group_of, rng)
    assert found.auc > 0.9 and found.ranks['rank_1'] > 0.9
    assert found.reading.components.startswith('beyond')


def test_independent_pictures_give_nothing_away(drawn):
    rng, members, group_of = drawn
    found = attack(averages(people(rng, N), group_of), members, group_of, rng)
    # The largest of some twenty readings, with a standard error of 0.05 each.
    assert np.mean(list(found.aucs.values())) == pytest.approx(0.5, abs=0.05)
    assert found.auc < 0.65
    assert found.ranks['rank_1'] < 4 / GROUPS


def test_components_are_the_singular_vectors():
    x = people(np.random.default_rng(3), 50)['grams']
    standard = (x - x.mean(0)) / x.std(0)
    _, values, axes = np.linalg.svd(standard, full_matrices=False)
    white = _Whitening(x)
    np.testing.assert_allclose(white.values[:10], values[:10], rtol=1e-6)
    np.testing.assert_allclose(np.abs((white.axes[:10] * axes[:10]).sum(1)), 1, rtol=1e-6)


def test_people_count_once():
    scores = by_person(np.array([0.1, 0.9, 0.5, 0.2]), ['a', 'b', 'a', 'b'])
    assert scores.tolist() == [0.5, 0.9]
    rows = np.array([[0.9, 0.0, 0.1, 0.0], [0.9, 0.8, 0.9, 0.8]])
    assert stand_out(rows)[0] > stand_out(rows)[1]


def test_too_few_reference_people(drawn):
    rng, members, group_of = drawn
    few = people(rng, 30)
    with pytest.raises(UserError, match='30 reference pictures are too few'):
        projection_attack(
            members,
            few,
            members,
            few,
            member_people=range(N),
            other_people=range(30),
            group_of=np.arange(N),
        )


def test_features_of_pictures_recognise_them():
    """On pictures: copies with noise are found among others by Lite0's features."""
    draw = torch.Generator().manual_seed(0)
    small = torch.rand(80, 3, 16, 16, generator=draw)
    u8 = (torch.nn.functional.interpolate(small, size=64) * 255).to(torch.uint8).numpy()
    noise = np.random.default_rng(0).integers(-8, 9, u8[:12].shape)
    release = np.clip(u8[:12].astype(int) + noise, 0, 255).astype(np.uint8)
    net = load_feature_network('lite0')
    features, ours = attack_features(net, u8), attack_features(net, release)
    assert features['pooled'].shape == (80, net.n_features)
    assert features['grams'].shape == (80, 21 * (16 * 17 + 24 * 25 + 40 * 41) // 2)
    parts = [{k: v[a:b] for k, v in features.items()} for a, b in ((0, 12), (12, 24), (24, 80))]
    found = projection_attack(
        parts[0],
        parts[1],
        ours,
        parts[2],
        member_people=range(12),
        other_people=range(12),
        group_of=np.arange(12),
    )
    assert found.auc > 0.95 and found.ranks['rank_1'] == 1
