"""Attacks that need no training: nearest release picture, and re-identification.

Pictures are uint8 [n, 3, S, S]; `embed` turns them into features [n, F].
Sources: GAN-Leaks (Chen et al. 2020) for the calibration by reference people; the attacker has
the release, and photographs of the person in question and of people who are surely not in it.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8
from sklearn.metrics import pairwise_distances_chunked

from evaluation.registry import Scorer, attack
from evaluation.study import Study
from utils.errors import UserError

Embed = Callable[[np.ndarray], np.ndarray]

_SMALL = 1e-12


def nearest_distances(
    queries: Float[np.ndarray, 'n F'], pool: Float[np.ndarray, 'm F']
) -> Float[np.ndarray, ' n']:
    """Euclidean distance of every query [n, F] to the nearest of pool [m, F]."""
    parts = pairwise_distances_chunked(queries, pool, reduce_func=lambda d, _: d.min(1))
    return np.concatenate(list(parts))


def nearest_attack(
    members: np.ndarray, nonmembers: np.ndarray, reference: np.ndarray, embed: Embed
) -> Scorer:
    """Scores how much nearer the release is to a person than reference people are.

    Returns a function release [n] -> scores of members [m] and others [o]:
    log(distance to the nearest reference photograph / distance to the nearest release picture),
    so that pictures that are near to everything gain nothing by it. UserError when a set is
    empty.
    """
    not_empty(members=members, nonmembers=nonmembers, reference=reference)
    people, pool = [embed(p) for p in (members, nonmembers)], embed(reference)
    usual = [np.log(nearest_distances(p, pool) + _SMALL) for p in people]

    def scores(
        release: Shaped[np.ndarray, ' n *s'],
    ) -> tuple[Float[np.ndarray, ' m'], Float[np.ndarray, ' o']]:
        not_empty(release=release)
        pictures = embed(release)
        member, other = (
            far - np.log(nearest_distances(p, pictures) + _SMALL) for p, far in zip(people, usual)
        )
        return member, other

    return scores


def pixels(pictures: UInt8[np.ndarray, 'n 3 S S']) -> Float[np.ndarray, 'n P']:
    """uint8 [n, 3, S, S] -> [n, 3 S S] in [0, 1]."""
    return pictures.reshape(len(pictures), -1).astype(np.float32) / 255


@attack('pixel', 'nearest in pixels')
def pixel(study: Study) -> Scorer:
    """Sees copies."""
    return nearest_attack(study.members, study.nonmembers, study.reference, pixels)


def reidentification_ranks(
    probes: Shaped[np.ndarray, ' q *s'],
    release_of_probe: Int[np.ndarray, ' q'],
    release: Shaped[np.ndarray, ' n *s'],
    embed: Embed,
) -> Int[np.ndarray, ' q']:
    """At which place the picture of the own group comes, by distance to another photograph.

    probes [q]: later photographs of members. release_of_probe [q]: index of the picture that
    the person stands behind. Ranks from 1; ties count against the attacker.
    """
    not_empty(probes=probes, release=release)
    ranks, start = [], 0
    own = np.asarray(release_of_probe)
    for distances in pairwise_distances_chunked(embed(probes), embed(release)):
        mine = distances[np.arange(len(distances)), own[start : start + len(distances)]]
        ranks.append((distances <= mine[:, None]).sum(1))
        start += len(distances)
    return np.concatenate(ranks)


def not_empty(**sets: np.ndarray) -> None:
    """UserError that names the sets without pictures."""
    if empty := [name for name, pictures in sets.items() if len(pictures) == 0]:
        raise UserError(f'nothing to attack: no {", ".join(empty)}')
