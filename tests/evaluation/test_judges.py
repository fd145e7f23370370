"""Attacks on frozen features with their controls, and who may judge a release."""

import json
import logging

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from datasets.phantoms import render_phantom
from evaluation.attacks.feature_pairs import FeaturePairs, pair_membership
from evaluation.attacks.metrics import attack_metrics, reidentification_rates
from evaluation.attacks.nearest import nearest_attack, reidentification_ranks
from evaluation.judges import load_judges, made, networks_of
from evaluation.probe import pooled_features
from models.features.pretrained import load_feature_network
from utils.errors import UserError

N = 40  # members, others, reference people and independent people


@pytest.fixture(scope='module')
def features():
    """lite1's features of {members, others, reference, strangers, copies}, each [40, F].

    copies: the members once more, blurred a little, as an inversion would (k = 1).
    """
    u8 = np.stack(
        [
            np.asarray(
                render_phantom(seed=4, patient=p, eye='left', visit=0, grade=p % 4, size=64).image
            ).transpose(2, 0, 1)
            for p in range(4 * N)
        ]
    )
    u8 = np.concatenate([u8, gaussian_filter(u8[:N], (0, 0, 0.5, 0.5))])
    found = pooled_features(load_feature_network('lite1'), u8).reshape(5, N, -1)
    return dict(zip(('members', 'others', 'reference', 'strangers', 'copies'), found))


def of_pairs(features, pictures, group_of):
    people = [f'm{i}' for i in range(N)], [f'o{i}' for i in range(N)]
    scores = pair_membership(
        features['members'],
        features['others'],
        pictures,
        group_of,
        features['reference'],
        member_people=people[0],
        other_people=people[1],
    )
    assert not any(np.isnan(s).any() for s in scores)
    return attack_metrics(*scores)['auc']


def of_content(features, pictures):
    attack = nearest_attack(
        features['members'], features['others'], features['reference'], lambda f: f
    )
    return attack_metrics(*attack(pictures))['auc']


def test_members_of_k_1_are_found(features):
    assert of_content(features, features['copies'])['low'] > 0.85
    assert of_pairs(features, features['copies'], np.arange(N))['low'] > 0.85


def test_nobody_is_found_behind_independent_pictures(features):
    found = [
        of_content(features, features['strangers']),
        of_pairs(features, features['strangers'], np.full(N, -1)),
        of_pairs(features, features['strangers'], np.arange(N)),
    ]  # a false lead
    for auc in found:
        assert auc['low'] < 0.5 < auc['high']


def test_the_pair_attack_finds_averages_that_the_nearest_picture_hides(features):
    group_of = np.arange(N) // 2
    means = features['members'].reshape(N // 2, 2, -1).mean(1)
    assert of_pairs(features, means, group_of)['low'] > 0.6


def test_scores_say_which_picture(features):
    attack = FeaturePairs(features['reference']).fit(
        features['members'][:20], features['copies'], np.arange(20)
    )
    scores = attack.scores(features['members'][20:], features['copies'][20:])
    assert (scores.argmax(1) == np.arange(20)).mean() > 0.9


def learnt_elsewhere(features, release, shadow):
    """The pair attack that learnt on other people and their release, [N // 2] of each side."""
    attack = FeaturePairs(features['reference']).fit(
        features['strangers'][: len(shadow)], shadow, np.arange(len(shadow))
    )
    scores = [attack.scores(features[name], release).max(1) for name in ('members', 'others')]
    return attack_metrics(*scores)['auc']


def test_what_is_learnt_on_other_peoples_release_finds_members_and_nobody_else(features):
    half = N // 2
    # The attackers' release: pictures between their people and other photographs of strangers.
    shadow = features['strangers'][:half] + 0.02 * (features['reference'][:half])
    assert learnt_elsewhere(features, features['copies'], shadow)['low'] > 0.85
    nobody = learnt_elsewhere(features, features['strangers'][half:], shadow)
    assert nobody['low'] < 0.5 < nobody['high']


def test_own_pictures_come_first_at_k_1_and_by_chance_where_nobody_is(features):
    def rates(release):
        ranks = reidentification_ranks(features['members'], np.arange(N), release, lambda f: f)
        return reidentification_rates(ranks, N)

    assert rates(features['copies'])['rank_1_low'] > 0.85
    # In another order: strangers were drawn with the members' grades, one by one.
    nobody = rates(np.random.default_rng(0).permutation(features['strangers']))
    for top in (1, 5):
        assert (
            nobody[f'rank_{top}_low'] <= nobody[f'chance_rank_{top}'] <= nobody[f'rank_{top}_high']
        )


def test_too_few_for_the_pair_attack(features):
    with pytest.raises(UserError, match='3 groups are too few'):
        FeaturePairs(features['reference']).fit(
            features['members'][:3], features['copies'], np.arange(3)
        )
    with pytest.raises(UserError, match='7 reference pictures'):
        FeaturePairs(features['reference'][:7])


def manifest(folder, **networks):
    (folder / 'images').mkdir(parents=True)
    (folder / 'manifest.json').write_text(json.dumps({'networks': networks}))
    return networks_of(folder / 'images')


def test_the_maker_never_judges_alone(tmp_path, caplog):
    lite0 = load_feature_network('lite0')
    own = manifest(tmp_path / 'a', content=f'lite0 {lite0.digest}', style='filters')
    foreign = manifest(tmp_path / 'b', content='content-encoder ' + 64 * '0', style='filters')
    assert networks_of(tmp_path) == {} and own == networks_of(tmp_path / 'a')
    assert made(lite0, own) and not made(lite0, foreign)
    with pytest.raises(UserError, match='made with lite0.*add another network, such as lite1'):
        load_judges(['lite0'], [foreign, own])
    with caplog.at_level(logging.WARNING):
        judges = load_judges(['lite0', 'lite1'], [own])
    assert [j.label for j in judges] == ['lite1', "lite0, the maker's"]
    assert 'read those of lite1' in caplog.text
    assert [j.label for j in load_judges(['lite0', 'lite1'], [foreign])] == ['lite0', 'lite1']
