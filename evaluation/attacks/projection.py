"""The attack on averages: candidates against release pictures, in features whitened by others.

Every release picture is near the mean of its members, so a member's features point a little
towards it (Homer et al. 2008). What all eyes share hides that: the features are whitened by a
reference population of other people, without its leading components, and a candidate's score is
the largest cosine with any release picture, or how far that cosine stands out from the others.

Shapes: n pictures, F features, G release pictures.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Num, UInt8
from torch import Tensor

from criteria.local_style import patch_grams
from evaluation.attacks.metrics import auc, reidentification_rates
from models.features.pretrained import FeatureNetwork
from utils.errors import UserError
from utils.images import from_uint8

GRIDS = (4, 2, 1)
STYLE_STRIDES = (2, 4, 8)
REMOVED = (20, 60)  # leading components of the reference population left out
LEADING = (8, 16, 32, 64, 128)  # or kept alone
_BATCH = 16
_SMALL = 1e-8


class Reading(NamedTuple):
    """One way to read the release: which features, which components, which score."""

    features: str  # 'grams', 'pooled' or 'all'
    components: str  # 'beyond 20', 'first 16', ...
    score: str  # 'cosine' or 'stand-out'

    def __str__(self) -> str:
        return f'{self.features}, {self.components}, {self.score}'


@torch.no_grad()
def attack_features(
    net: FeatureNetwork, pictures: UInt8[np.ndarray, 'n 3 S S']
) -> dict[str, Float32[np.ndarray, 'n _']]:
    """{'grams': float32 [n, F1], 'pooled': float32 [n, F2]} of pictures uint8 [n, 3, S, S].

    Gram matrices (upper triangles, per position) of the maps of strides 2, 4 and 8 on 4 x 4,
    2 x 2 and 1 x 1 patches; means and standard deviations of strides 4 to 32. The network's own
    strides stand in where it has not these. UserError for pictures below the smallest size.
    """
    strides = [s for s in STYLE_STRIDES if s in net.strides] or list(net.strides[:1])
    device = next(net.parameters()).device
    found: dict[str, list[np.ndarray]] = {'grams': [], 'pooled': []}
    for part in torch.from_numpy(np.ascontiguousarray(pictures)).split(_BATCH):
        maps = net.maps(from_uint8(part).to(device), net.strides)
        grams = [_triangles(maps[s], n) for s in strides for n in GRIDS]
        found['grams'].append(torch.cat(grams, 1).cpu().numpy())
        found['pooled'].append(net.pool(maps).cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _triangles(maps: Float[Tensor, 'n C h w'], n_crop: int) -> Float[Tensor, 'n F']:
    """Upper triangles of the patches' Gram matrices over their positions, flat."""
    n_crop = min(n_crop, *maps.shape[-2:])
    grams = patch_grams(maps, n_crop) / (maps.shape[-2] // n_crop * (maps.shape[-1] // n_crop))
    row, column = torch.triu_indices(*grams.shape[-2:], device=grams.device)
    return grams[:, :, row, column].flatten(1)


class _Whitening:
    """Mean, standard deviations and the leading half of the principal components of reference
    features [r, F]."""

    def __init__(self, reference: Float[np.ndarray, 'r F']) -> None:
        self.mean, self.std = reference.mean(0), reference.std(0) + _SMALL
        x = (reference - self.mean) / self.std
        # By the products of the few people, not of the many features: 17 times as fast for 250.
        squares, mixes = np.linalg.eigh((x @ x.T).astype(np.float64))
        leading = np.arange(len(x) - 1, (len(x) - 1) // 2, -1)
        self.values = np.sqrt(np.maximum(squares[leading], 0))
        self.axes = (mixes[:, leading] / (self.values + _SMALL)).T.astype(x.dtype) @ x

    def beyond(self, features: Float[np.ndarray, 'n F'], n: int) -> Float[np.ndarray, 'n F']:
        """Unit vectors of standardised features without the first n components."""
        x = (features - self.mean) / self.std
        return _unit(x - (x @ self.axes[:n].T) @ self.axes[:n])

    def first(self, features: Float[np.ndarray, 'n F'], n: int) -> Float[np.ndarray, 'n _']:
        """Unit vectors of the first n components, each scaled to the same variance."""
        x = (features - self.mean) / self.std
        return _unit(x @ self.axes[:n].T / (self.values[:n] + _SMALL))


def _unit(x: Float[np.ndarray, 'n F']) -> Float[np.ndarray, 'n F']:
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + _SMALL)


def least_reference() -> int:
    """How many reference pictures the attack needs at least."""
    return 2 * REMOVED[0]


def projection_cosines(
    candidates: dict[str, Float[np.ndarray, 'n _']],
    release: dict[str, Float[np.ndarray, 'G _']],
    reference: dict[str, Float[np.ndarray, 'r _']],
) -> dict[tuple[str, str], Float[np.ndarray, 'n G']]:
    """{(features, components): cosines [n, G]} of `attack_features` of the three.

    Components that the reference population is too small for are left out. UserError with fewer
    than 40 reference pictures.
    """
    size = len(reference['pooled'])
    if size < least_reference():
        raise UserError(
            f'{size} reference pictures are too few to whiten features; the '
            f'projection attack needs at least {least_reference()}'
        )
    found = {}
    for name in ('grams', 'pooled', 'all'):
        white = _Whitening(_chosen(reference, name))
        views = {f'beyond {n}': (white.beyond, n) for n in REMOVED if 2 * n <= size}
        if name == 'all':
            views |= {f'first {n}': (white.first, n) for n in LEADING if 2 * n <= size}
        for view, (project, n) in views.items():
            found[name, view] = (
                project(_chosen(candidates, name), n) @ project(_chosen(release, name), n).T
            )
    return found


def _chosen(features: dict[str, Float[np.ndarray, 'n _']], name: str) -> Float[np.ndarray, 'n F']:
    """One kind of features, or both side by side."""
    return (
        np.concatenate([features['grams'], features['pooled']], 1)
        if name == 'all'
        else features[name]
    )


def stand_out(cosines: Float[np.ndarray, 'n G']) -> Float[np.ndarray, ' n']:
    """How far the largest of each row [n, G] is from the mean of the others, in their spread."""
    ordered = np.sort(cosines, axis=1)
    rest = ordered[:, :-1]
    return (ordered[:, -1] - rest.mean(1)) / (rest.std(1) + _SMALL)


def by_person(scores: Num[np.ndarray, ' n'], people: Sequence[object]) -> Num[np.ndarray, ' p']:
    """The largest score of each person's photographs, in order of first appearance."""
    best: dict[object, float] = {}
    for person, score in zip(people, scores, strict=True):
        best[person] = max(best.get(person, -np.inf), float(score))
    return np.array(list(best.values()))


class Attacked(NamedTuple):
    """What the attack found out.

    auc: membership of people, of the strongest reading, and which that is; aucs: of every
    reading. ranks: `reidentification_rates` of the own group's picture over the members'
    photographs, by the strongest view; scores: of member and other people, strongest reading.
    """

    auc: float
    reading: Reading
    aucs: dict[Reading, float]
    ranks: dict[str, float]
    scores: tuple[np.ndarray, np.ndarray]


def projection_attack(
    members: dict[str, Float[np.ndarray, 'm _']],
    others: dict[str, Float[np.ndarray, 'n _']],
    release: dict[str, Float[np.ndarray, 'G _']],
    reference: dict[str, Float[np.ndarray, 'r _']],
    *,
    member_people: Sequence[object],
    other_people: Sequence[object],
    group_of: Sequence[int],
) -> Attacked:
    """Attacks a release; the four are `attack_features` by one network.

    members [m], whose persons are member_people and whose own pictures have the indices group_of
    in the release; others [n] of people who are not in it; reference: of other people again.
    The unit is the person, with the best of his or her photographs. The strongest of about
    twenty readings is named: by chance alone it lies a few hundredths above 0.5.
    """
    n = len(member_people)
    both = {k: np.concatenate([members[k], others[k]]) for k in members}
    own = np.asarray(group_of)
    aucs, scores, ranks = {}, {}, {}
    for (features, view), cosines in projection_cosines(both, release, reference).items():
        for name, values in (('cosine', cosines.max(1)), ('stand-out', stand_out(cosines))):
            reading = Reading(features, view, name)
            scores[reading] = (
                by_person(values[:n], member_people),
                by_person(values[n:], other_people),
            )
            aucs[reading] = auc(*scores[reading])
        mine = cosines[np.arange(n), own]
        ranks[features, view] = (cosines[:n] >= mine[:, None]).sum(1)
    reading = max(aucs, key=aucs.__getitem__)
    best = max(ranks.values(), key=lambda r: ((r == 1).mean(), (r <= 5).mean()))
    return Attacked(
        aucs[reading],
        reading,
        aucs,
        reidentification_rates(best, len(release['pooled'])),
        scores[reading],
    )
