"""A perceptual distance on a pretrained feature network, in the manner of LPIPS, uncalibrated."""

from collections.abc import Iterable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.features.pretrained import FeatureNetwork

_STRIDES = (2, 4, 8, 16)


class FeatureDistance(nn.Module):
    """1 - cosine between the channels of two pictures' maps, over positions and strides 2 to 16."""

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network = network
        # A ViT has one stride, and that is none of the others.
        self.strides = tuple(s for s in _STRIDES if s in network.strides) or network.strides[:1]

    def features(self, img: Float[Tensor, 'N 3 H W']) -> list[Float[Tensor, 'N _ _ _']]:
        """Pictures [N, 3, H, W] in [-1, 1] -> maps of unit length over channels, one a stride."""
        maps = self.network.maps(img, self.strides)
        return [F.normalize(maps[s].float(), dim=1) for s in self.strides]

    def distance(
        self, features: list[Float[Tensor, 'N _ _ _']], targets: list[Float[Tensor, 'N _ _ _']]
    ) -> Float[Tensor, ' N']:
        """The distance of each pair of pictures, [N] in [0, 2], from their `features`."""
        parts = [1 - (a * b).sum(1).mean((1, 2)) for a, b in zip(features, targets)]
        return sum(parts[1:], parts[0]) / len(parts)


def map_distance(
    ours: dict[int, Tensor], theirs: dict[int, Tensor], strides: Iterable[int]
) -> Tensor:
    """As FeatureDistance, from maps that are at hand: {stride: [N, C, h, w]} of each -> [N]."""
    parts = [
        1 - F.cosine_similarity(ours[s].float(), theirs[s].float(), dim=1).mean((1, 2))
        for s in strides
    ]
    return sum(parts[1:], parts[0]) / len(parts)
