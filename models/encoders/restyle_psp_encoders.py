"""ReStyle's simplified encoders: every style is read from the body's last feature map.

Source: Alaluf et al. 2021, 'ReStyle', section 3.3. Shapes: N images, L styles, D style dimension,
S input side.
"""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders.helpers import (
    BODY_CHANNELS,
    GradualStyleBlock,
    IRSETrunk,
    ResNetTrunk,
    Trunk,
    body_side,
    styles_together,
)


class _BackboneStyles(Trunk):
    """Adds the style heads of the simplified encoder to a trunk."""

    def __init__(
        self, *, n_styles: int, input_nc: int = 6, input_size: int = 256, style_dim: int = 512
    ) -> None:
        super().__init__(input_nc)
        side = body_side(input_size)
        self.styles = nn.ModuleList(
            GradualStyleBlock(BODY_CHANNELS, style_dim, side) for _ in range(n_styles)
        )

    def forward(self, x: Float[Tensor, 'N C S S']) -> Float[Tensor, 'N L D']:
        """x [N, input_nc, S, S] -> latent offsets [N, L, D]."""
        x = self.body(self.stem(x))
        if x.is_cuda:
            return styles_together(cast(Sequence[GradualStyleBlock], self.styles), x)
        return torch.stack([style(x) for style in self.styles], 1)


class ResNetBackboneEncoder(_BackboneStyles, ResNetTrunk):
    """ResNet-34 body; the encoder of the k-SALSA paper."""


class BackboneEncoder(_BackboneStyles, IRSETrunk):
    """IR-SE50 body."""
