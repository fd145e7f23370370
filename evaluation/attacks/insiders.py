"""What insiders can do: k - 1 members who subtract themselves, and whoever replays the making.

Both know the networks. *Subtraction*: the latent that the encoder finds for a picture, times the
size of its group, minus the latents of all members but one, is a guess at the last one's.
*Replay*: who has the photographs of all members but one makes the picture again with every
candidate for the last place, and looks which comes out like the release's.

Shapes: n photographs, C pictures, L styles, D style dimension.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, UInt8

from utils.seeds import numpy_generator

Remake = Callable[[Int[np.ndarray, ' k']], UInt8[np.ndarray, '3 S S']]


def subtraction_ranks(
    pictures: Float[np.ndarray, 'C L D'],
    latents: Float[np.ndarray, 'n L D'],
    group_of: Int[np.ndarray, ' n'],
) -> tuple[Int[np.ndarray, ' m'], float]:
    """At which place each member [m] comes among all who are not known to be in his group.

    pictures: latents of the release pictures, inverted; group_of: index of a photograph's picture,
    -1 for none. Also the chance to come first. The guess and the candidates are compared by cosine
    around the mean of all; ties count against the attacker.
    """
    flat = latents.reshape(len(latents), -1).astype(np.float64)
    centre = flat.mean(0)
    flat = flat - centre
    seen = pictures.reshape(len(pictures), -1) - centre
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    ranks, chances = [], []
    for row in np.flatnonzero(group_of >= 0):
        members = group_of == group_of[row]
        known = members & (np.arange(len(flat)) != row)
        guess = members.sum() * seen[group_of[row]] - flat[known].sum(0)
        scores = unit @ guess
        ranks.append(int((scores[~known] >= scores[row]).sum()))
        chances.append(1 / (~known).sum())
    return np.array(ranks), float(np.mean(chances))


def replay_ranks(
    remake: Remake,
    pictures: UInt8[np.ndarray, 'C 3 S S'],
    group_of: Int[np.ndarray, ' n'],
    *,
    n_groups: int,
    n_candidates: int,
    seed: int = 0,
) -> tuple[Int[np.ndarray, ' g'], Int[np.ndarray, ' g']]:
    """For a drawn member of each of `n_groups` groups: his place, and replays equal to the bit.

    remake: rows of a group's photographs -> its picture. He stands among `n_candidates` in all, the
    others drawn from outside the group. Places are by mean squared difference of pixels; ties count
    against the attacker. Equal replays [g]: 1 where the true one is the release's picture exactly.
    """
    rng = numpy_generator(seed, 'replay')
    groups = rng.permutation(len(pictures))[:n_groups]
    ranks, equal = [], []
    for group in groups:
        members = np.flatnonzero(group_of == group)
        victim = rng.choice(members)
        outside = np.flatnonzero(group_of != group)
        others = rng.choice(outside, n_candidates - 1, replace=False)
        gaps = [
            float(np.square(remake(np.sort(np.where(members == victim, c, members))) - goal).mean())
            for goal in [pictures[group].astype(float)]
            for c in (victim, *others)
        ]
        ranks.append(sum(gap <= gaps[0] for gap in gaps))
        equal.append(int(gaps[0] == 0))
    return np.array(ranks), np.array(equal)
