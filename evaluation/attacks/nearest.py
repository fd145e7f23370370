"""Attacks that need no training: nearest release picture, and re-identification.

Pictures are uint8 [n, 3, S, S]; `embed` turns them into features [n, F].
Sources: GAN-Leaks (Chen et al. 2020) for the calibration by reference people; the attacker has
the release, and photographs of the person in question and of people who are surely not in it.
"""
import numpy as np
from sklearn.metrics import pairwise_distances_chunked

from utils.errors import UserError

_SMALL = 1e-12


def nearest_distances(queries, pool):
    """Euclidean distance of every query [n, F] to the nearest of pool [m, F]."""
    parts = pairwise_distances_chunked(queries, pool, reduce_func=lambda d, _: d.min(1))
    return np.concatenate(list(parts))


def closest_release_scores(members, nonmembers, release, reference, embed):
    """Scores of members [m] and others [n]: how much nearer the release is than reference people.

    log(distance to the nearest reference photograph / distance to the nearest release picture),
    so that pictures that are near to everything gain nothing by it. UserError when a set is
    empty.
    """
    _not_empty(members=members, nonmembers=nonmembers, release=release, reference=reference)
    release, reference = embed(release), embed(reference)
    scores = []
    for people in (members, nonmembers):
        features = embed(people)
        scores.append(np.log(nearest_distances(features, reference) + _SMALL)
                      - np.log(nearest_distances(features, release) + _SMALL))
    return scores[0], scores[1]


def reidentification_ranks(probes, release_of_probe, release, embed):
    """At which place the picture of the own group comes, by distance to another photograph.

    probes [q]: later photographs of members. release_of_probe [q]: index of the picture that
    the person stands behind. Ranks from 1; ties count against the attacker.
    """
    _not_empty(probes=probes, release=release)
    ranks, start = [], 0
    own = np.asarray(release_of_probe)
    for distances in pairwise_distances_chunked(embed(probes), embed(release)):
        mine = distances[np.arange(len(distances)), own[start:start + len(distances)]]
        ranks.append((distances <= mine[:, None]).sum(1))
        start += len(distances)
    return np.concatenate(ranks)


def _not_empty(**sets):
    if empty := [name for name, pictures in sets.items() if len(pictures) == 0]:
        raise UserError(f'nothing to attack: no {", ".join(empty)}')
