"""Reconstruction losses with targets that are computed once per batch.

A term has `targets(x)`, the constant part of photographs x [N, 3, S, S], and
`distance(y, targets)`, the loss of each reconstruction y [N, 3, S, S], as [N].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from criteria.feature_distance import FeatureDistance
from criteria.laplacian import band_errors, bands
from criteria.lpips_loss import LPIPSLoss
from models.features.content import load_content_network
from models.features.pretrained import WHEELS, load_feature_network


class Term(Protocol):
    """A reconstruction loss."""

    def targets(self, x: Float[Tensor, 'N 3 S S']) -> Any:
        """What photographs are compared by."""

    def distance(self, y: Float[Tensor, 'N 3 S S'], targets: Any) -> Float[Tensor, ' N']:
        """The loss of each reconstruction."""


class L2Term:
    """Mean squared error over pixels."""

    def targets(self, x: Float[Tensor, 'N 3 S S']) -> Float[Tensor, 'N 3 S S']:
        return x

    def distance(
        self, y: Float[Tensor, 'N 3 S S'], targets: Float[Tensor, 'N 3 S S']
    ) -> Float[Tensor, ' N']:
        return (y - targets).square().mean((1, 2, 3))


class BandTerm:
    """The share of its variance that each band of frequencies misses, weighted, finest first.

    variances: of the bands over photographs (criteria.laplacian.band_variances).
    """

    def __init__(self, weights: Sequence[float], variances: Sequence[float]) -> None:
        self.weights, self.variances = weights, variances

    def targets(self, x: Float[Tensor, 'N 3 S S']) -> list[Float[Tensor, 'N 3 _ _']]:
        return bands(x)

    def distance(
        self, y: Float[Tensor, 'N 3 S S'], targets: list[Float[Tensor, 'N 3 _ _']]
    ) -> Float[Tensor, ' N']:
        errors = band_errors(y, targets, self.variances)
        total: Any = sum(w * e for w, e in zip(self.weights, errors))
        return total


class ContentTerm:
    """1 - cosine similarity of content features (MoCo v2, this project's encoder, or 'lite0')."""

    def __init__(self, path: str | Path, device: torch.device | str) -> None:
        self.network = load_content_network(path).to(device)

    def targets(self, x: Float[Tensor, 'N 3 S S']) -> Float[Tensor, 'N F']:
        return self.network.features(x)

    def distance(
        self, y: Float[Tensor, 'N 3 S S'], targets: Float[Tensor, 'N F']
    ) -> Float[Tensor, ' N']:
        return 1 - (self.network.features(y) * targets).sum(1)


class LpipsTerm:
    """LPIPS with the AlexNet backbone of a file, or the distance on 'lite0', 'lite1', 'lite2'."""

    def __init__(self, path: str | Path, device: torch.device | str) -> None:
        network = (
            FeatureDistance(load_feature_network(path)) if str(path) in WHEELS else LPIPSLoss(path)
        )
        self.network = network.to(device)

    def targets(self, x: Float[Tensor, 'N 3 S S']) -> list[Float[Tensor, 'N _ _ _']]:
        return self.network.features(x)

    def distance(
        self, y: Float[Tensor, 'N 3 S S'], targets: list[Float[Tensor, 'N _ _ _']]
    ) -> Float[Tensor, ' N']:
        return self.network.distance(self.network.features(y), targets)
