"""ReStyle-e4e's encoders: one latent for all styles, and a delta from it for every further style.

Source: Tov et al. 2021, 'Designing an Encoder for StyleGAN Image Manipulation', section 4.1, in
the form ReStyle gave it. Their weights have the names and shapes of the pSp encoders they derive
from. Shapes: N images, L styles, D style dimension, S input side.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders.light_encoder import LightEncoder
from models.encoders.lite_encoder import LiteEncoder
from models.encoders.restyle_psp_encoders import BackboneEncoder, ResNetBackboneEncoder


def from_first(styles: Float[Tensor, 'N L D'], stage: int | None) -> Float[Tensor, 'N L D']:
    """Predictions [N, L, D] of the first style and the deltas -> latents [N, L, D].

    Deltas after `stage` are left out (None: none are).
    """
    first, deltas = styles[:, :1], styles[:, 1:]
    if stage is not None:
        used = torch.arange(1, styles.shape[1], device=styles.device) <= stage
        deltas = deltas * used[:, None]
    return torch.cat([first, first + deltas], 1)


class _Progressive(nn.Module):
    """Deltas in place of independent styles; they start at 0.

    stage: the last delta in use, 0 for none, None for all; it is no part of the state dict.
    """

    stage: int | None = None

    def forward(self, x: Float[Tensor, 'N C S S']) -> Float[Tensor, 'N L D']:
        """x [N, input_nc, S, S] -> latent offsets [N, L, D]."""
        return from_first(super().forward(x), self.stage)


class _ProgressiveBackbone(_Progressive):
    styles: nn.ModuleList

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        with torch.no_grad():
            for style in self.styles[1:]:
                style.get_parameter('linear.weight').zero_()


class ProgressiveBackboneEncoder(_ProgressiveBackbone, BackboneEncoder):
    """IR-SE50 body; that of the published face models."""


class ResNetProgressiveBackboneEncoder(_ProgressiveBackbone, ResNetBackboneEncoder):
    """ResNet-34 body."""


class _ProgressiveHead(_Progressive):
    head: nn.Linear
    style_dim: int

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        with torch.no_grad():
            self.head.weight[self.style_dim :].zero_()


class LightProgressiveEncoder(_ProgressiveHead, LightEncoder):
    """LightEncoder with deltas, for 64 and 128 px on a CPU."""


class LiteProgressiveEncoder(_ProgressiveHead, LiteEncoder):
    """LiteEncoder with deltas."""
