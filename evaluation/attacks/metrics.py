"""How well an attack tells members from others: AUC, TPR at low FPR, intervals.

Scores are higher for members. An attack that learns nothing has an AUC of 0.5.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

from evaluation.bootstrap import People, draw_weights, percentiles, rate_interval, unit_numbers
from evaluation.scores import auc, weighted_auc
from utils.errors import UserError
from utils.seeds import numpy_generator

FPRS = {'tpr_at_1pct_fpr': 0.01, 'tpr_at_0.1pct_fpr': 0.001}
MIN_PEOPLE = 4


def attack_metrics(
    member: Num[np.ndarray, ' m'],
    other: Num[np.ndarray, ' n'],
    *,
    member_people: People = None,
    other_people: People = None,
    n_bootstrap: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> dict:
    """Summary of an attack's scores: member [m] and other [n], higher meaning member.

    member_people, other_people: the person behind each score (None: each its own), who may stand
    on both sides where pairs are scored. People are what is resampled and split.

    Returns n_members, n_others, n_member_people, n_other_people and, each as {value, low, high}:
    `auc` (bootstrap interval), `balanced_accuracy` (threshold chosen on one half of the people
    and applied to the other half; bootstrap) and `tpr_at_1pct_fpr`, `tpr_at_0.1pct_fpr` (exact
    binomial intervals; `resolved` is False where there are too few others to have that rate).
    UserError with fewer than 4 people on either side.
    """
    member, other = (np.asarray(s, dtype=np.float64) for s in (member, other))
    people = _joint_people(member_people, other_people, len(member), len(other))
    sides = people[: len(member)], people[len(member) :]
    counts = [len(np.unique(s)) for s in sides]
    if min(counts) < MIN_PEOPLE:
        raise UserError(
            f'{counts[0]} members and {counts[1]} others are too few to measure '
            f'an attack; at least {MIN_PEOPLE} people of each are needed'
        )
    rng = numpy_generator(seed, 'attack metrics')
    right = _cross_fitted(member, other, _halves(*sides, rng))
    side = np.repeat([True, False], [len(member), len(other)])
    score = np.concatenate([member, other])
    aucs, accuracies = [], []
    for weights in draw_weights(people, len(people), n_bootstrap, rng):
        aucs.append(weighted_auc(side, score, weights))
        accuracies.append(_balanced(right, side, weights))
    found = {
        'n_members': len(member),
        'n_others': len(other),
        'n_member_people': counts[0],
        'n_other_people': counts[1],
        'auc': _interval(auc(member, other), aucs, level),
        'balanced_accuracy': _interval(
            _balanced(right, side, np.ones((1, len(side))))[0], accuracies, level
        ),
    }
    for name, fpr in FPRS.items():
        found[name] = _tpr_at(member, other, fpr, sides[0], level) | {
            'resolved': counts[1] * fpr >= 1
        }
    return found


def excess_over(
    attack: dict[str, Num[np.ndarray, ' _']],
    control: dict[str, Num[np.ndarray, ' _']],
    *,
    n_bootstrap: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, float]:
    """An attack's AUC minus that of its control, {value, low, high}; people are drawn together.

    Both: {'member' [m], 'other' [n], 'member_people' [m], 'other_people' [n]}, scores of the same
    photographs and the numbers of their people, on the release and on one that has none of them.
    """
    side = np.repeat([True, False], [len(attack['member']), len(attack['other'])])
    scores = [np.concatenate([found['member'], found['other']]) for found in (attack, control)]
    numbers = np.concatenate([attack['member_people'], attack['other_people']])
    # A number that stands on both sides is two people.
    people = unit_numbers([f'{s} {n}' for s, n in zip(side, numbers)], len(side))
    rng = numpy_generator(seed, 'excess')
    drawn = [
        weighted_auc(side, scores[0], w) - weighted_auc(side, scores[1], w)
        for w in draw_weights(people, len(people), n_bootstrap, rng)
    ]
    value = [auc(found['member'], found['other']) for found in (attack, control)]
    return _interval(value[0] - value[1], drawn, level)


def _joint_people(
    member_people: People, other_people: People, n_members: int, n_others: int
) -> Int[np.ndarray, ' p']:
    """Person numbers [m + n]; people without names are different from each other."""
    names: list[str] = []
    for side, given, n in (('m', member_people, n_members), ('o', other_people, n_others)):
        names += [f'{side} {i}' for i in range(n)] if given is None else map(str, given)
    return unit_numbers(names, n_members + n_others)


def _interval(
    value: float, draws: Sequence[Float[np.ndarray, ' _']], level: float
) -> dict[str, float]:
    low, high = percentiles(np.concatenate(draws), level)
    return {'value': float(value), 'low': low, 'high': high}


def _balanced(
    right: Shaped[np.ndarray, ' p'], side: Shaped[np.ndarray, ' p'], weights: Num[np.ndarray, 'b p']
) -> Float[np.ndarray, ' b']:
    """Mean share of right answers on the two sides, per weighting [b]."""
    shares = [
        np.divide(
            (weights * on) @ right,
            weights @ on,
            where=weights @ on > 0,
            out=np.full(len(weights), np.nan),
        )
        for on in (side, ~side)
    ]
    return (shares[0] + shares[1]) / 2


def _halves(
    member_people: Int[np.ndarray, ' m'],
    other_people: Int[np.ndarray, ' n'],
    rng: np.random.Generator,
) -> Int[np.ndarray, ' p']:
    """0 or 1 for every score [m + n]: half of the people of each side, each person in one."""
    people = np.concatenate([member_people, other_people])
    half = np.full(people.max() + 1, -1)
    for own in (np.unique(member_people), np.unique(other_people)):
        new = own[half[own] < 0]
        half[new] = rng.permutation(len(new)) % 2
    return half[people]


def _cross_fitted(
    member: Num[np.ndarray, ' m'], other: Num[np.ndarray, ' n'], half: Int[np.ndarray, ' p']
) -> Float[np.ndarray, ' p']:
    """1.0 where a score [m + n] is told right by the threshold chosen on the other half."""
    score = np.concatenate([member, other])
    side = np.arange(len(score)) < len(member)
    right = np.empty(len(score))
    for part in (0, 1):
        seen = [score[(half != part) & on] for on in (side, ~side)]
        cuts = np.unique(np.concatenate(seen))
        rates = [1 - np.searchsorted(np.sort(s), cuts, side='left') / len(s) for s in seen]
        mine = half == part
        right[mine] = (score[mine] >= cuts[np.argmax(rates[0] - rates[1])]) == side[mine]
    return right


def _tpr_at(
    member: Num[np.ndarray, ' m'],
    other: Num[np.ndarray, ' n'],
    fpr: float,
    people: People,
    level: float,
) -> dict[str, float]:
    """TPR at the lowest threshold that at most floor(fpr * n) others reach."""
    allowed = int(np.floor(fpr * len(other)))
    limit = np.sort(other)[::-1][allowed]  # the first other that must stay below
    hits = member > limit
    low, high = rate_interval(hits, people, level)
    return {'value': float(hits.mean()), 'low': low, 'high': high}


def precision_at_k(
    scores: Float[np.ndarray, 'C n'], same: Bool[np.ndarray, 'C n'], topk: int
) -> float:
    """The published number: share of the `topk` best-scored photographs that are members.

    scores [C, n]: of photograph n for release picture C. same [C, n]: true membership. Ties are
    broken against the attacker.
    """
    order = np.lexsort((same, -np.asarray(scores)), axis=1)[:, :topk]
    return float(np.take_along_axis(np.asarray(same), order, 1).mean())


def reidentification_rates(
    ranks: Int[np.ndarray, ' q'], n_release: int, *, people: People = None
) -> dict:
    """Rates of finding the own group's picture first, and among the first five, with chance.

    ranks [q]: 1 is the best. people [q]: whose photograph each is (None: each its own). Exact
    binomial intervals.
    """
    ranks = np.asarray(ranks)
    found = {'n_probes': len(ranks), 'n_release': n_release, 'median_rank': float(np.median(ranks))}
    for top in (1, 5):
        found[f'rank_{top}'] = float((ranks <= top).mean())
        found[f'rank_{top}_low'], found[f'rank_{top}_high'] = rate_interval(ranks <= top, people)
        found[f'chance_rank_{top}'] = min(1.0, top / n_release)
    return found
