"""From scores of people and release pictures to what they tell: who, which picture, above what.

The three questions of the data protection authorities' working party (opinion 05/2014): can a
person be singled out, can two records of a person be linked, and (membership) is a person there.

Shapes: scores [q, C] of q photographs and C release pictures, higher meaning the same person;
own [q]: index of the picture that the person stands behind.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from evaluation.attacks.projection import stand_out
from evaluation.bootstrap import draw_weights, percentiles, rate_interval
from utils.seeds import numpy_generator

_DRAWS_OF_PEOPLE = 20


def readings(scores: Float[np.ndarray, 'q C']) -> dict[str, Float[np.ndarray, ' q']]:
    """{reading: [q]}: the largest score, and how far it stands out from the others."""
    return {'nearest': scores.max(1), 'stand-out': stand_out(scores)}


def ranks_of_own(
    scores: Float[np.ndarray, 'q C'], own: Int[np.ndarray, ' q']
) -> Int[np.ndarray, ' q']:
    """At which place the own picture comes [q], from 1; ties count against the attacker."""
    return (scores >= scores[np.arange(len(own)), own][:, None]).sum(1)


def nearest_groups(
    people: Float[np.ndarray, 'q F'],
    members: Float[np.ndarray, 'm F'],
    group_of: Int[np.ndarray, ' m'],
) -> Int[np.ndarray, ' q']:
    """The group [q] whose mean of `members` [m, F] is nearest to each of `people` [q, F].

    group_of [m]: -1 for none. It is where somebody who is not in the release would have been put.
    """
    groups = np.unique(group_of[group_of >= 0])
    means = np.stack([members[group_of == g].mean(0) for g in groups])
    distance = (means**2).sum(1) - 2 * people @ means.T
    return groups[distance.argmin(1)]


def linkability(
    member_ranks: Int[np.ndarray, ' q'],
    control_ranks: Int[np.ndarray, ' p'],
    *,
    member_people: Sequence[str],
    control_people: Sequence[str],
    seed: int = 0,
) -> dict:
    """How often a photograph leads to its group's picture first, above the control.

    Control: people who are not in the release, and the group they would have been put into; their
    photographs lead to its picture because the people in it look like them. {'members', 'control':
    {value, low, high}, exact binomial; 'excess': the difference, bootstrap over people}.
    """
    hits = member_ranks == 1, control_ranks == 1
    sides = member_people, control_people
    found = {}
    for name, hit, people in zip(('members', 'control'), hits, sides):
        low, high = rate_interval(hit, people)
        found[name] = {'value': float(hit.mean()), 'low': low, 'high': high}
    rng = numpy_generator(seed, 'linkability')
    drawn = [
        np.concatenate([w @ hit / w.sum(1) for w in draw_weights(people, len(hit), 500, rng)])
        for hit, people in zip(hits, sides)
    ]
    low, high = percentiles(drawn[0] - drawn[1])
    found['excess'] = {'value': float(hits[0].mean() - hits[1].mean()), 'low': low, 'high': high}
    return found


def singling_out(
    members: Float[np.ndarray, 'q C'],
    group_of: Int[np.ndarray, ' q'],
    strangers: Float[np.ndarray, 's C'],
    likely: Int[np.ndarray, ' s'],
    *,
    seed: int = 0,
) -> dict:
    """For every release picture the attacker names one of all people asked: one of its group?

    members [q, C] with their groups [q]; strangers [s, C], who are not in the release, and the
    groups [s] that they look most like. {value, low, high (exact binomial over pictures), chance;
    'alone': how often it is one of the group where only members are asked; 'control': how often,
    where only strangers are asked, it is one who looks like the group; as many are asked in both.
    'excess': the difference, bootstrap over pictures}.
    """
    nobody = np.full(len(strangers), -1)
    hits = _named(np.concatenate([members, strangers]), np.concatenate([group_of, nobody]))
    low, high = rate_interval(hits)
    found: dict[str, Any] = {'value': float(hits.mean()), 'low': low, 'high': high}
    own = group_of[:, None] == np.arange(members.shape[1])
    found['chance'] = float(own.sum() / own.shape[1] / (len(members) + len(strangers)))
    rng = numpy_generator(seed, 'singling out')
    sides = (members, group_of), (strangers, likely)
    n, rates = min(len(members), len(strangers)), np.zeros((2, members.shape[1]))
    for _ in range(_DRAWS_OF_PEOPLE):
        for side, (scores, of) in enumerate(sides):
            rows = rng.choice(len(scores), n, replace=False)
            rates[side] += _named(scores[rows], of[rows]) / _DRAWS_OF_PEOPLE
    parts = {'alone': rates[0], 'control': rates[1], 'excess': rates[0] - rates[1]}
    weights = np.concatenate(list(draw_weights(None, len(hits), 500, rng))) / len(hits)
    for name, rate in parts.items():
        low, high = percentiles(weights @ rate)
        found[name] = {'value': float(rate.mean()), 'low': low, 'high': high}
    return found


def _named(
    scores: Float[np.ndarray, 'q C'], group_of: Int[np.ndarray, ' q']
) -> Bool[np.ndarray, ' C']:
    """Whether the one of q people who stands out most for a picture is of its group [C]."""
    named = (scores - scores.mean(1, keepdims=True)).argmax(0)
    return group_of[named] == np.arange(scores.shape[1])
