"""Membership attacks on the features of the judges: nearest picture, pairs, projection."""

from collections.abc import Callable

import numpy as np

from evaluation.attacks.feature_pairs import pair_membership
from evaluation.attacks.nearest import nearest_attack
from evaluation.attacks.projection import projection_attack
from evaluation.judges import Judge
from evaluation.judging import Found, best_of_people, judged_attack, sides
from evaluation.registry import Candidate
from evaluation.study import Study


def _pooled(study: Study, judge: Judge) -> Callable[[np.ndarray], np.ndarray]:
    return lambda pictures: study.features(judge, pictures)['pooled']


@judged_attack('content', 'nearest in pooled features')
def content(study: Study, judge: Judge) -> Callable[[Candidate], Found]:
    """Calibrated by reference people, as the pixel attack."""
    scorer = nearest_attack(study.members, study.nonmembers, study.reference, _pooled(study, judge))

    def run(candidate: Candidate) -> Found:
        known, members, others = sides(study, candidate)
        member, other = scorer(candidate.pictures)
        return best_of_people(member[known], members), best_of_people(other, others), {}

    return run


@judged_attack('pair', 'pairs of photograph and picture, learnt on known groups')
def pair(study: Study, judge: Judge) -> Callable[[Candidate], Found]:
    """The attacker knows half of the groups; the others are its targets."""
    pooled = _pooled(study, judge)

    def run(candidate: Candidate) -> Found:
        known, members, others = sides(study, candidate)
        member, other = pair_membership(
            pooled(study.members)[known],
            pooled(study.nonmembers),
            pooled(candidate.pictures),
            candidate.group_of[known],
            pooled(study.reference),
            member_people=members,
            other_people=others,
            seed=study.seed,
        )
        return best_of_people(member, members), best_of_people(other, others), {}

    return run


@judged_attack(
    'projection',
    'projection on release pictures, the strongest reading',
    lambda label, found: {
        f'own group first ({label})': '-'
        if not found['own_group']
        else f'{found["own_group"]["rank_1"]:.2f}'
    },
)
def projection(study: Study, judge: Judge) -> Callable[[Candidate], Found]:
    """The attack that averages fear. own_group: how often its picture comes first for a member."""

    def run(candidate: Candidate) -> Found:
        known, members, others = sides(study, candidate)
        of_members = {k: v[known] for k, v in study.features(judge, study.members).items()}
        found = projection_attack(
            of_members,
            study.features(judge, study.nonmembers),
            study.features(judge, candidate.pictures),
            study.features(judge, study.reference),
            member_people=members,
            other_people=others,
            group_of=candidate.group_of[known],
        )
        grouped = (candidate.group_of >= 0).any()
        return *found.scores, {
            'reading': str(found.reading),
            'readings': {str(reading): value for reading, value in found.aucs.items()},
            'own_group': found.ranks if grouped else None,
        }

    return run
