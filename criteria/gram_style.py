"""Style losses on Gram matrices of any feature network, published and by group means.

Modes. 'best_match' is the published rule (criteria/local_style.py): every patch of a member draws
the synthetic patch that resembles it most. 'same_place' compares each patch with the mean of the
members' patches at its place; 'whole' does so with one patch, the picture. In the latter two a
picture depends on its members through a mean alone.

Shapes: G groups, K members, P patches, C feature channels, S side of the pictures.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from criteria.local_style import local_style_loss, patch_grams
from models.features import FeatureNet
from models.features.pretrained import FeatureNetwork
from utils.errors import UserError

MODES = ('best_match', 'same_place', 'whole')
STRIDES = (2, 4, 8)


class StyleTargets(NamedTuple):
    """What a batch of groups is drawn towards, one entry of `grams` and `scales` per stride.

    grams: the members' [G, K, P, C, C] (best_match), or their means [G, P, C, C]; weights: of
    the members [G, K], 0 for padding; scales: [G], what the squared distances are multiplied by.
    """

    grams: list[Tensor]
    weights: Tensor
    scales: list[Tensor]


class StyleTerm:
    """A style loss: a frozen network, a mode, and whether distances are relative.

    net: FeatureNetwork, or a network of models.features.style with one map as `features(img)`.
    relative: squared distances are divided by the mean squared norm of the target's Gram
    matrices, so that the loss has no unit and is of one size for every network and picture.
    strides: of the maps that are used; a FeatureNetwork without one of them leaves it out.
    """

    def __init__(
        self,
        net: FeatureNet,
        *,
        mode: str,
        n_crop: int,
        relative: bool,
        strides: Sequence[int] = STRIDES,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f'mode={mode!r}, want one of {MODES}')
        self.net, self.mode, self.relative = net, mode, relative
        self.n_crop = 1 if mode == 'whole' else n_crop
        if isinstance(net, FeatureNetwork):
            # A ViT has one stride, and that is none of the usual ones.
            self.strides = tuple(s for s in strides if s in net.strides) or net.strides[:1]
        else:
            self.strides = (1,)

    def check_side(self, side: int) -> None:
        """UserError when pictures of `side` px are too small for the network or the patches."""
        smallest = side
        if isinstance(self.net, FeatureNetwork):
            self.net.check_side(side)
            smallest = self.net.map_side(side, max(self.strides))
        if smallest < self.n_crop:
            raise UserError(
                f'`num_crop` {self.n_crop}: more than the {smallest} px of the maps '
                f'of {self.net.name}'
            )

    def n_numbers(self, side: int) -> int:
        """How many numbers the `maps` of a picture of `side` px are."""
        if not isinstance(self.net, FeatureNetwork):
            return self.net.n_features * side**2
        return sum(self.net.channels[s] * self.net.map_side(side, s) ** 2 for s in self.strides)

    def maps(
        self, img: Float[Tensor, 'N 3 S S'], also: Sequence[int] = ()
    ) -> dict[int, Float[Tensor, 'N _ _ _']]:
        """{stride: maps [N, C, h, w]} of pictures [N, 3, S, S] in [-1, 1].

        also: further strides of a FeatureNetwork, for others to use.
        """
        if isinstance(self.net, FeatureNetwork):
            return self.net.maps(img, {*self.strides, *also})
        return {1: self.net.features(img)}

    def grams(self, maps: Mapping[int, Float[Tensor, 'N _ _ _']]) -> list[Float[Tensor, 'N _ _ _']]:
        """Gram matrices [N, P, C, C] of each stride, sums over the positions of a patch."""
        return [patch_grams(maps[s], self.n_crop) for s in self.strides]

    @torch.no_grad()
    def targets(
        self,
        members: Sequence[Sequence[Float[Tensor, '_ _ _ _']]],
        weights: Sequence[Float[Tensor, ' _']],
    ) -> StyleTargets:
        """Targets of groups from the members' `grams`; weights: [K] of each group, of sum 1."""
        n_strides, most = len(self.strides), max(len(w) for w in weights)
        padded = torch.zeros(len(weights), most, device=weights[0].device)
        for i, w in enumerate(weights):
            padded[i, : len(w)] = w
        found, scales = [], []
        for s in range(n_strides):
            parts = []
            for grams, w in zip(members, weights):
                part = grams[s]
                if self.mode == 'best_match':
                    blank = part.new_zeros(most - len(part), *part.shape[1:])
                    part = torch.cat([part, blank])
                else:
                    part = (part * w.view(-1, 1, 1, 1)).sum(0)
                parts.append(part)
            target = torch.stack(parts)
            found.append(target)
            scales.append(self._scale(target, padded))
        return StyleTargets(found, padded, scales)

    def _scale(
        self, target: Float[Tensor, 'G *k P C C'], weights: Float[Tensor, 'G K']
    ) -> Float[Tensor, ' G']:
        """1, or 1 over the mean squared norm of a group's target matrices, [G]."""
        if not self.relative:
            return torch.ones(len(target), device=target.device)
        size = target.square().sum((-2, -1)).mean(-1)  # over patches: [G] or [G, K]
        if self.mode == 'best_match':
            size = (size * weights).sum(1)
        return 1 / size.clamp_min(1e-12)

    def loss(
        self, maps: Mapping[int, Float[Tensor, 'G _ _ _']], targets: StyleTargets
    ) -> Float[Tensor, ' G']:
        """The loss of each group's picture, [G], from its `maps`: a sum over the strides."""
        total = torch.zeros_like(targets.scales[0])
        for grams, wanted, scale in zip(self.grams(maps), targets.grams, targets.scales):
            if self.mode == 'best_match':
                distance = local_style_loss(grams, wanted, targets.weights)
            else:
                distance = (grams - wanted).square().sum((2, 3)).mean(1)
            total = total + distance * scale
        return total
