"""Whose eye is this? Verification by maps of a frozen network and a discriminant head.

The head learns, from several photographs of other people's eyes, in which directions photographs
of one eye agree and those of different eyes differ: a linear discriminant analysis of the maps of
a pretrained network on a grid, in closed form. Nothing is drawn by chance and nothing iterates.

Shapes: n pictures, uint8 [n, 3, S, S]; F features, D dimensions of the vectors.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8

from evaluation.attacks.metrics import attack_metrics
from evaluation.bootstrap import unit_numbers
from evaluation.scores import roc
from models.features.pretrained import FeatureNetwork
from utils.errors import UserError
from utils.images import from_uint8
from utils.seeds import numpy_generator

STRIDES = (4, 8, 16)
GRID = 8  # positions of the maps along a side
LEAST_EYES = 8
_COMPONENTS = 600  # principal components in which eyes are told apart
_DIMENSIONS = 128
_SHRINKAGE = 0.1  # of the covariance within eyes, towards a sphere
_BATCH = 32
_OTHERS_EACH = 20  # photographs of other people that each one is compared with in `verification`
_SMALL = 1e-8


@torch.no_grad()
def grid_features(
    net: FeatureNetwork, pictures: UInt8[np.ndarray, 'n 3 S S']
) -> Float32[np.ndarray, 'n F']:
    """Maps of the strides 4, 8 and 16 that the network has, on a grid of 8 x 8: float32 [n, F].

    UserError for pictures below the network's smallest size.
    """
    strides = [s for s in STRIDES if s in net.strides] or list(net.strides[:1])
    device = next(net.parameters()).device
    found = []
    for part in torch.from_numpy(np.ascontiguousarray(pictures)).split(_BATCH):
        maps = net.maps(from_uint8(part).to(device), strides)
        grids = [F.adaptive_avg_pool2d(maps[s].float(), GRID).flatten(1) for s in strides]
        found.append(torch.cat(grids, 1).cpu().numpy())
    return np.concatenate(found)


@dataclasses.dataclass(frozen=True)
class IdentityHead:
    """Features [n, F] -> unit vectors [n, D]: (features - mean) / scale @ axes, of length 1."""

    mean: Float[np.ndarray, ' F']
    scale: Float[np.ndarray, ' F']
    axes: Float[np.ndarray, 'F D']

    def project(self, features: Float[np.ndarray, 'n F']) -> Float[np.ndarray, 'n D']:
        """(features - mean) / scale @ axes, not of length 1."""
        return ((features - self.mean) / self.scale) @ self.axes

    def __call__(
        self,
        features: Float[np.ndarray, 'n F'],
        *,
        centre: bool = False,
        origin: Float[np.ndarray, ' D'] | None = None,
    ) -> Float[np.ndarray, 'n D']:
        """centre: subtract the pictures' own mean, the look that those of a release share.

        origin: what is subtracted instead, such as the mean of photographs of the same camera.
        """
        x = self.project(features)
        if origin is not None:
            x = x - origin
        if centre and len(x) > 1:
            x = x - x.mean(0)
        return x / (np.linalg.norm(x, axis=1, keepdims=True) + _SMALL)


def fit_identity(features: Float[np.ndarray, 'n F'], eyes: Sequence[object]) -> IdentityHead:
    """The discriminant head of photographs [n, F] of eyes [n], several of each.

    Eyes with a single photograph count for what all eyes share only. UserError with fewer than 8
    eyes with several photographs.
    """
    eye = unit_numbers(eyes, len(features))
    counts = np.bincount(eye)
    if (counts > 1).sum() < LEAST_EYES:
        raise UserError(
            f'{(counts > 1).sum()} eyes with several photographs are too few to train an identity '
            f'network; at least {LEAST_EYES} are needed'
        )
    mean, scale = features.mean(0), features.std(0) + _SMALL
    x = (features - mean) / scale
    values, vectors = np.linalg.eigh((x @ x.T).astype(np.float64))
    kept = values > 1e-9 * values[-1]
    kept[: max(0, len(values) - min(_COMPONENTS, counts.size + len(features) // 2))] = False
    components = x.T @ (vectors[:, kept] / np.sqrt(values[kept])).astype(np.float32)
    z = (x @ components).astype(np.float64)
    means = np.zeros((counts.size, z.shape[1]))
    np.add.at(means, eye, z)
    means /= counts[:, None]
    rest = z - means[eye]
    within = rest.T @ rest / max(1, len(z) - counts.size)
    within += _SHRINKAGE * np.trace(within) / len(within) * np.eye(len(within))
    scales, turned = np.linalg.eigh(within)
    whiten = turned / np.sqrt(scales)
    between = np.cov(means[counts > 1] @ whiten, rowvar=False)
    leading = np.linalg.eigh(between)[1][:, -min(_DIMENSIONS, int((counts > 1).sum()) - 1) :]
    axes = components.astype(np.float64) @ whiten @ leading
    return IdentityHead(mean, scale, axes.astype(np.float32))


def orientations(
    pictures: UInt8[np.ndarray, 'n 3 S S'], people: Sequence[str], eyes: Sequence[str] | None
) -> tuple[UInt8[np.ndarray, 'm 3 S S'], list[str]]:
    """Photographs to learn from, and the eye each shows, of people photographed but once.

    The fellow eye, mirrored, stands in for a second photograph: pictures [2 n, 3, S, S], as they
    are and mirrored, where a mirrored right eye counts as a photograph of the left one.
    """
    if eyes is None:
        return pictures, list(people)
    other = {'left': 'right', 'right': 'left'}
    shown = [f'{p} {e}' for p, e in zip(people, eyes)]
    shown += [f'{p} {other.get(e, e)}' for p, e in zip(people, eyes)]
    return np.concatenate([pictures, pictures[..., ::-1]]), shown


def verification(
    vectors: Float[np.ndarray, 'n D'],
    eyes: Sequence[object],
    people: Sequence[object],
    *,
    sides: Sequence[object] | None = None,
    seed: int = 0,
) -> dict:
    """How well two photographs of one eye are told from photographs of two people.

    vectors [n, D]; eyes, people [n]; sides [n]: where they are known, strangers are of the same
    side, since left and right are told apart by everybody. `attack_metrics` over all pairs of
    photographs of one eye, and up to 20 strangers' photographs for each; the unit is the person of
    the first. And `equal_error_rate`.
    """
    rng = numpy_generator(seed, 'verification')
    eye, person = unit_numbers(eyes, len(vectors)), unit_numbers(people, len(vectors))
    a, b = np.triu_indices(len(eye), 1)
    a, b = a[eye[a] == eye[b]], b[eye[a] == eye[b]]
    first = np.repeat(np.arange(len(eye)), _OTHERS_EACH)
    second = rng.integers(len(eye), size=len(first))
    strange = person[first] != person[second]
    if sides is not None:
        side = unit_numbers(sides, len(vectors))
        strange &= side[first] == side[second]
    first, second = first[strange], second[strange]
    same, other = ((vectors[i] * vectors[j]).sum(1) for i, j in ((a, b), (first, second)))
    fpr, tpr = roc(same, other)
    nearest = np.argmin(np.abs(fpr - (1 - tpr)))
    return {
        **attack_metrics(
            same, other, member_people=person[a], other_people=person[first], seed=seed
        ),
        'equal_error_rate': float((fpr[nearest] + 1 - tpr[nearest]) / 2),
    }
