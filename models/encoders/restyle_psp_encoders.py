"""ReStyle's simplified encoders: every style is read from the body's last feature map.

Source: Alaluf et al. 2021, 'ReStyle', section 3.3. Shapes: N images, L styles, D style dimension,
S input side.
"""

import torch
from torch import nn

from models.encoders.helpers import (
    BODY_CHANNELS,
    GradualStyleBlock,
    IRSETrunk,
    ResNetTrunk,
    body_side,
)


class _BackboneStyles:
    """Adds the style heads of the simplified encoder to a trunk."""

    def __init__(self, *, n_styles, input_nc=6, input_size=256, style_dim=512):
        super().__init__(input_nc)
        side = body_side(input_size)
        self.styles = nn.ModuleList(
            GradualStyleBlock(BODY_CHANNELS, style_dim, side) for _ in range(n_styles)
        )

    def forward(self, x):
        """x [N, input_nc, S, S] -> latent offsets [N, L, D]."""
        x = self.body(self.stem(x))
        return torch.stack([style(x) for style in self.styles], 1)


class ResNetBackboneEncoder(_BackboneStyles, ResNetTrunk):
    """ResNet-34 body; the encoder of the k-SALSA paper."""


class BackboneEncoder(_BackboneStyles, IRSETrunk):
    """IR-SE50 body."""
