"""Attacks by who knows eyes, and by who knows the method: identity, and training on a release.

`identity` looks for a person's eye in the pictures; `pair_trained` and `identity_trained` learnt on
a release that the attackers made by the same method, of their own people, how a photograph and the
picture of its group agree. Each is asked with the very photograph that went into the release, and
with another one of the same eye.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from datasets.sides import as_right_eyes, shown_sides
from datasets.table import Table
from evaluation.attackers import eyes_of, has_visits
from evaluation.attacks.feature_pairs import FeaturePairs
from evaluation.attacks.identity import IdentityHead, fit_identity, orientations, verification
from evaluation.attacks.linking import (
    linkability,
    nearest_groups,
    ranks_of_own,
    readings,
    singling_out,
)
from evaluation.attacks.metrics import attack_metrics, reidentification_rates
from evaluation.judges import Judge
from evaluation.judging import Found, best_of_people, judged_attack, sides
from evaluation.population import people_of
from evaluation.registry import Candidate, Cells, interval
from evaluation.scores import auc
from evaluation.study import Study
from utils.seeds import numpy_generator

Embed = Callable[[UInt8[np.ndarray, 'q 3 S S']], Float[np.ndarray, 'q F']]
Scores = Callable[[UInt8[np.ndarray, 'q 3 S S']], Float[np.ndarray, 'q C']]


class Taught(NamedTuple):
    """An identity head, and how well it verifies eyes of people who taught it nothing.

    origin: the mean vector of the reference people, where photographs of another camera may have
    taught; None where those of the same did. figures: `verification`, and `fellow`: whether it is
    the two eyes of a person that are told, for want of later photographs; None where nobody has
    two photographs.
    """

    head: IdentityHead
    origin: Float[np.ndarray, ' D'] | None
    figures: dict | None

    def vectors(self, features: Float[np.ndarray, 'n F']) -> Float[np.ndarray, 'n D']:
        """Unit vectors of photographs under attack."""
        return self.head(features, origin=self.origin)


def taught(study: Study, judge: Judge) -> Taught:
    """What the attackers' people taught on the maps of a judge's network."""

    def teach() -> Taught:
        table = study.attackers.teachers
        pictures, eyes = study.photographs(table), eyes_of(table)
        if not has_visits(table):  # the fellow eye stands in for another photograph
            seen = None if study.settings.sides == 'mirror' else shown_sides(pictures)
            pictures, eyes = orientations(pictures, people_of(table), seen)
        head, origin = fit_identity(study.grids(judge, pictures), eyes), None
        if study.settings.attackers_given:
            origin = head.project(study.grids(judge, study.reference)).mean(0)
        found = Taught(head, origin, None)
        return found._replace(figures=_figures(study, judge, found))

    return study.once(('identity', judge.network.digest), teach)


def _figures(study: Study, judge: Judge, known: Taught) -> dict | None:
    """`verification` of what is known by those of the others who did not teach it."""
    population = study.population
    own = study.settings.attackers is not None
    strange = np.full(len(population.others), True) if own else population.nonmember
    others = population.others.subset(np.flatnonzero(strange))
    if population.others_again is None:
        return _fellow_figures(study, judge, known, others, study.others[strange])
    later = strange[population.others_again_of]
    again = population.others_again.subset(np.flatnonzero(later))
    pictures = study.others[strange], study.others_again[later]
    vectors = known.vectors(np.concatenate([study.grids(judge, p) for p in pictures]))
    sided = others.eyes is not None and again.eyes is not None
    found = verification(
        vectors,
        eyes_of(others) + eyes_of(again),
        people_of(others) + people_of(again),
        sides=[*(others.eyes or ()), *(again.eyes or ())] if sided else None,
        seed=study.seed,
    )
    return {**found, 'fellow': False}


def _fellow_figures(
    study: Study, judge: Judge, known: Taught, others: Table, pictures: UInt8[np.ndarray, 'n 3 S S']
) -> dict | None:
    """How well two eyes of a person, as right ones, are told from eyes of two people."""
    people = people_of(others)
    if len(set(people)) == len(people):
        return None
    vectors = known.vectors(study.grids(judge, as_right_eyes(pictures, None)))
    return {**verification(vectors, people, people, seed=study.seed), 'fellow': True}


def _cells(label: str, found: dict) -> Cells:
    again, linked = found['again'], found['linked']
    return {
        f'with another photograph ({label})': '-'
        if again is None
        else interval(again['auc'], '.2f'),
        f'linked, above control ({label})': '-'
        if linked is None
        else interval(linked['excess'], '.2f'),
    }


@judged_attack('identity', 'a network that knows whose eye it sees', _cells)
def identity(study: Study, judge: Judge) -> Callable[[Candidate], Found]:
    """Taught by the attackers' people; it has not seen the method."""
    known = taught(study, judge)

    def scores_of(candidate: Candidate) -> Scores:
        pictures = known.head(study.grids(judge, candidate.pictures), centre=True)
        return lambda photographs: known.vectors(study.grids(judge, photographs)) @ pictures.T

    return _attack(study, judge, scores_of, lambda: known.figures)


@judged_attack('pair_trained', 'pairs, learnt on a release of other people by the same method')
def pair_trained(study: Study, judge: Judge) -> Callable[[Candidate], Found]:
    """On pooled features."""
    return _trained(study, judge, lambda pictures: study.features(judge, pictures)['pooled'])


@judged_attack('identity_trained', 'identity, learnt on a release of other people by the method')
def identity_trained(study: Study, judge: Judge) -> Callable[[Candidate], Found]:
    """On the vectors of the identity head."""
    head = taught(study, judge).head  # another camera is seen to by the whitening
    return _trained(study, judge, lambda pictures: head(study.grids(judge, pictures)))


def _trained(study: Study, judge: Judge, embed: Embed) -> Callable[[Candidate], Found]:
    """The pair attack, fitted to each candidate's shadow."""
    shadow = study.shadow
    reference = embed(study.reference)

    def scores_of(candidate: Candidate) -> Scores:
        known = candidate.shadow
        assert known is not None, 'settings require a shadow for attacks that learn on it'
        group_of = known.group_of
        if not (group_of >= 0).any():  # nobody stands behind a picture: nothing to learn
            rng = numpy_generator(study.seed, 'shadow groups')
            group_of = rng.permutation(len(group_of)) % len(known.pictures)
        there = group_of >= 0
        attack = FeaturePairs(reference, seed=study.seed).fit(
            embed(shadow.members)[there],
            _centred(embed(known.pictures), reference),
            group_of[there],
        )
        pictures = _centred(embed(candidate.pictures), reference)
        return lambda photographs: attack.scores(embed(photographs), pictures)

    return _attack(study, judge, scores_of, lambda: None)


def _centred(
    pictures: Float[np.ndarray, 'C F'], reference: Float[np.ndarray, 'r F']
) -> Float[np.ndarray, 'C F']:
    """Pictures moved so that their mean is that of photographs: what all share tells nobody."""
    return pictures - pictures.mean(0) + reference.mean(0)


def _attack(
    study: Study,
    judge: Judge,
    scores_of: Callable[[Candidate], Scores],
    figures: Callable[[], dict | None],
) -> Callable[[Candidate], Found]:
    """Asks scores for membership, own group, links and singling out."""

    def run(candidate: Candidate) -> Found:
        score = scores_of(candidate)
        known, member_people, other_people = sides(study, candidate)
        member, other = score(study.members)[known], score(study.nonmembers)
        others = readings(other)
        read = {
            name: (
                best_of_people(values, member_people),
                best_of_people(others[name], other_people),
            )
            for name, values in readings(member).items()
        }
        best = max(read, key=lambda name: auc(*read[name]))
        group_of = candidate.group_of[known]
        found: dict = {
            'reading': best,
            'network': figures(),
            'own_group': None,
            'singled_out': None,
            'linked': None,
            'again': _again(study, candidate, score),
        }
        if (group_of >= 0).any() and not candidate.photographs:
            found['own_group'] = reidentification_rates(
                ranks_of_own(member, group_of), member.shape[1], people=member_people
            )
            likely = _likely(study, judge, candidate)[study.population.nonmember]
            found['singled_out'] = singling_out(member, group_of, other, likely, seed=study.seed)
            found['linked'] = _linked(study, judge, candidate, score)
        return *read[best], found

    return run


def _again(study: Study, candidate: Candidate, score: Scores) -> dict | None:
    """Membership by photographs that nothing was made of; None where there are no visits."""
    population = study.population
    if population.again is None or population.others_again is None:
        return None
    counts = candidate.in_release[population.again_of]
    strange = population.nonmember[population.others_again_of]
    people = np.array(people_of(population.again)), np.array(people_of(population.others_again))
    if not counts.any() or not strange.any():
        return None
    member, other = score(study.again[counts]), score(study.others_again[strange])
    found, others = {}, readings(other)
    for name, values in readings(member).items():
        found[name] = attack_metrics(
            best_of_people(values, list(people[0][counts])),
            best_of_people(others[name], list(people[1][strange])),
            seed=study.seed,
        )
    best = max(found, key=lambda name: found[name]['auc']['value'])
    own = candidate.group_of[population.again_of][counts]
    ranks = None
    if (own >= 0).any():
        ranks = reidentification_rates(
            ranks_of_own(member, own), member.shape[1], people=people[0][counts]
        )
    return {**found[best], 'reading': best, 'own_group': ranks}


def _likely(study: Study, judge: Judge, candidate: Candidate) -> Int[np.ndarray, ' n']:
    """The group of members that each of the others looks most like."""
    pooled = [study.features(judge, p)['pooled'] for p in (study.members, study.others)]
    return nearest_groups(pooled[1], pooled[0], candidate.group_of)


def _linked(study: Study, judge: Judge, candidate: Candidate, score: Scores) -> dict:
    """Links of members' later photographs (of their first, without visits), above the control."""
    population, likely = study.population, _likely(study, judge, candidate)
    if population.again is None or population.others_again is None:
        member = np.flatnonzero(candidate.group_of >= 0)
        strange = np.flatnonzero(population.nonmember)
        photographs = study.members[member], study.others[strange]
        own = candidate.group_of[member], likely[strange]
    else:
        member, strange = population.again_of, population.others_again_of
        there = candidate.group_of[member] >= 0, population.nonmember[strange]
        photographs = study.again[there[0]], study.others_again[there[1]]
        member, strange = member[there[0]], strange[there[1]]
        own = candidate.group_of[member], likely[strange]
    names = np.array(people_of(population.members)), np.array(people_of(population.others))
    return linkability(
        *(ranks_of_own(score(p), o) for p, o in zip(photographs, own)),
        member_people=list(names[0][member]),
        control_people=list(names[1][strange]),
        seed=study.seed,
    )
