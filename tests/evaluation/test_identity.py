"""The identity network knows eyes again, finds them in releases, and nobody where nobody is."""

import numpy as np
import pytest

from datasets.phantoms import render_phantom
from evaluation.attacks.identity import fit_identity, grid_features, orientations, verification
from evaluation.attacks.linking import linkability, nearest_groups, ranks_of_own, singling_out
from evaluation.attacks.metrics import attack_metrics, excess_over
from models.features.pretrained import load_feature_network
from utils.errors import UserError

TEACHERS, PEOPLE, NOISE = 60, 40, 0.4


def photographs(rng, eyes, axes):
    """Features of a photograph of each eye: what is its own, and what each visit changes."""
    visit = rng.standard_normal((len(eyes), 6)) @ (5 * np.eye(6, eyes.shape[1]))
    return (eyes @ axes + visit + NOISE * rng.standard_normal(eyes.shape)).astype(np.float32)


@pytest.fixture(scope='module')
def drawn():
    """A head taught by some people, and (eyes, first and second photographs) of others."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((80, 80)))[0] * np.geomspace(2, 0.1, 80)
    teachers = rng.standard_normal((TEACHERS, 80))
    taught = np.concatenate([photographs(rng, teachers, axes) for _ in range(3)])
    head = fit_identity(taught, list(range(TEACHERS)) * 3)
    people = rng.standard_normal((PEOPLE, 80))
    return head, axes, people, [photographs(rng, people, axes) for _ in range(2)]


def test_two_photographs_of_an_eye_are_known(drawn):
    head, _, _, (first, second) = drawn
    names = list(range(PEOPLE)) * 2
    found = verification(head(np.concatenate([first, second])), names, names)
    raw = np.concatenate([first, second])
    plain = verification(raw / np.linalg.norm(raw, axis=1, keepdims=True), names, names)
    assert found['auc']['value'] > 0.98 > plain['auc']['value'] + 0.02
    assert found['equal_error_rate'] < 0.1


def test_strangers_are_of_the_same_side_where_sides_are_known():
    """Sides are easily told: with strangers of both, they would pass for identity."""
    rng = np.random.default_rng(1)
    people = np.repeat(np.arange(40), 2)
    side = np.arange(40)[people] % 2
    vectors = np.stack([side * 2.0 - 1, rng.standard_normal(80)], 1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert verification(vectors, people, people)['auc']['value'] > 0.65
    found = verification(vectors, people, people, sides=side)
    assert found['auc']['value'] == pytest.approx(0.5, abs=0.1)


def attack(head, members, others, release):
    pictures = head(release, centre=True)
    return attack_metrics(*((head(p) @ pictures.T).max(1) for p in (members, others)))['auc']


def test_members_are_found_at_k_1_and_nobody_in_independent_pictures(drawn):
    head, axes, _, (first, second) = drawn
    rng = np.random.default_rng(6)
    others = photographs(rng, rng.standard_normal((PEOPLE, 80)), axes)
    strangers = photographs(rng, rng.standard_normal((PEOPLE, 80)), axes)
    assert attack(head, first, others, first)['value'] > 0.99
    assert attack(head, second, others, first)['value'] > 0.9
    nobody = attack(head, first, others, strangers)
    assert nobody['low'] < 0.5 < nobody['high']


def test_photographs_of_another_camera_are_asked_about_their_own_mean(drawn):
    """A look that all of them share hides nobody once the mean of other people takes it away."""
    head, axes, _, (first, _) = drawn
    rng = np.random.default_rng(7)
    camera = 8 * axes[:12].sum(0).astype(np.float32)
    others, reference = (
        photographs(rng, rng.standard_normal((PEOPLE, 80)), axes) + camera for _ in range(2)
    )
    origin = head.project(reference).mean(0)
    pictures = head(first + camera, centre=True)

    def found(**about):
        members, strangers = (head(p, **about) @ pictures.T for p in (first + camera, others))
        return attack_metrics(members.max(1), strangers.max(1))['auc']['value']

    assert found() < 0.95 and found(origin=origin) > 0.99


def test_groups_are_found_by_another_photograph(drawn):
    head, _, _, (first, second) = drawn
    group_of = np.arange(PEOPLE) // 4
    release = np.stack([first[group_of == g].mean(0) for g in range(PEOPLE // 4)])
    scores = head(second) @ head(release, centre=True).T
    ranks = ranks_of_own(scores, group_of)
    assert (ranks == 1).mean() > 0.6
    # Strangers agree with the group that they look like as much as its members do, or not at all.
    alike = singling_out(scores, group_of, scores, group_of)
    assert alike['chance'] == pytest.approx(0.05)
    assert alike['alone']['value'] == alike['control']['value'] > 0.8
    assert alike['excess']['low'] <= 0 <= alike['excess']['high']
    unlike = singling_out(scores, group_of, scores, (group_of + 1) % (PEOPLE // 4))
    assert unlike['control']['value'] < 0.1 and unlike['excess']['low'] > 0.5
    assert unlike['value'] == alike['value'] > 0.3


def test_links_are_counted_above_those_of_people_who_only_look_alike():
    rng = np.random.default_rng(2)
    ranks, names = rng.integers(1, 4, 200), [str(i // 2) for i in range(200)]
    alike = linkability(ranks, ranks, member_people=names, control_people=names)
    assert alike['excess']['value'] == 0 and alike['members']['value'] > 0.2
    assert alike['excess']['low'] < 0 < alike['excess']['high']
    found = linkability(np.ones(200, int), ranks, member_people=names, control_people=names)
    assert found['excess']['low'] > 0.4


def test_the_group_that_one_would_have_been_put_into():
    means = np.array([[0.0, 0.0], [4.0, 0.0]])
    members = np.repeat(means, 3, 0) + np.tile([[1, 1], [-1, -1], [0, 0]], (2, 1))
    group_of = np.array([1, 1, 1, 0, 0, 0])
    assert nearest_groups(np.array([[3.0, 2.0], [1.0, 0.0]]), members, group_of).tolist() == [0, 1]


def test_the_control_takes_away_what_is_no_membership():
    """Members who are told from others by any picture (another camera) give no excess."""
    rng = np.random.default_rng(3)
    people = {'member_people': np.arange(50) // 2, 'other_people': np.arange(50) // 2}
    camera, noise = rng.standard_normal(50) + 1.5, rng.standard_normal(50)
    control = {'member': camera, 'other': noise, **people}
    same = excess_over({'member': camera + 1e-3 * noise, 'other': noise, **people}, control)
    assert abs(same['value']) < 0.02 and same['low'] <= same['value'] <= same['high'] < 0.05
    real = excess_over({'member': camera + 3, 'other': noise, **people}, control)
    assert real['low'] > 0.05


def test_fellow_eyes_stand_in_for_visits():
    pictures = np.random.default_rng(4).integers(0, 255, (4, 3, 8, 8), dtype=np.uint8)
    both, eyes = orientations(pictures, ['a', 'a', 'b', 'b'], ['left', 'right'] * 2)
    assert eyes[0] == eyes[5] and eyes[1] == eyes[4] and len(set(eyes)) == 4
    assert np.array_equal(both[5], pictures[1][..., ::-1])
    assert orientations(pictures, ['a', 'a', 'b', 'b'], None)[1] == ['a', 'a', 'b', 'b']


def test_too_few_eyes():
    with pytest.raises(UserError, match='4 eyes with several photographs are too few'):
        fit_identity(np.zeros((12, 5), np.float32), [*range(4), *range(4), 5, 6, 7, 8])


def test_drawn_eyes_are_known_again():
    """Twelve people teach, twelve others are told apart: one picture each of two visits."""

    def visits(patients):
        eyes = [(p, v) for v in (0, 1) for p in patients]
        return np.stack(
            [
                render_phantom(
                    seed=5, patient=p, eye='left', visit=v, grade=v, size=64
                ).image.transpose(2, 0, 1)
                for p, v in eyes
            ]
        ), [p for p, _ in eyes]

    network = load_feature_network('lite0')
    (taught, names), (shown, people) = visits(range(12)), visits(range(12, 24))
    head = fit_identity(grid_features(network, taught), names)
    found = verification(head(grid_features(network, shown)), people, people)
    assert found['auc']['value'] > 0.93
