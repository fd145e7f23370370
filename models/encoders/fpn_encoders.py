"""pixel2style2pixel's encoders: a feature pyramid feeds coarse, middle and fine styles.

Source: Richardson et al. 2021, 'Encoding in Style', section 3. Shapes: N images, L styles,
D style dimension, S input side.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders.helpers import (
    BODY_CHANNELS,
    GradualStyleBlock,
    IRSETrunk,
    ResNetTrunk,
    Trunk,
    body_side,
)

COARSE_END, MIDDLE_END = 3, 7  # styles 0-2 are coarse, 3-6 middle, the rest fine


class _PyramidStyles(Trunk):
    """Adds a two-step top-down pyramid and its style heads to a trunk."""

    def __init__(
        self, *, n_styles: int, input_nc: int = 6, input_size: int = 256, style_dim: int = 512
    ) -> None:
        super().__init__(input_nc)
        sides = [body_side(input_size, stride) for stride in (16, 8, 4)]
        self.styles = nn.ModuleList(
            GradualStyleBlock(
                BODY_CHANNELS, style_dim, sides[(i >= COARSE_END) + (i >= MIDDLE_END)]
            )
            for i in range(n_styles)
        )
        self.latlayer1 = nn.Conv2d(256, BODY_CHANNELS, 1)
        self.latlayer2 = nn.Conv2d(128, BODY_CHANNELS, 1)

    def forward(self, x: Float[Tensor, 'N C S S']) -> Float[Tensor, 'N L D']:
        """x [N, input_nc, S, S] -> latent offsets [N, L, D]."""
        x, tapped = self.stem(x), []
        for i, block in enumerate(self.body):
            x = block(x)
            if i in self.taps:
                tapped.append(x)
        fine, middle, coarse = tapped
        middle = _upsample_add(coarse, self.latlayer1(middle))
        fine = _upsample_add(middle, self.latlayer2(fine))
        levels = (coarse, middle, fine)
        return torch.stack(
            [
                style(levels[(i >= COARSE_END) + (i >= MIDDLE_END)])
                for i, style in enumerate(self.styles)
            ],
            1,
        )


def _upsample_add(
    top: Float[Tensor, 'N C s t'], lateral: Float[Tensor, 'N C h w']
) -> Float[Tensor, 'N C h w']:
    return lateral + F.interpolate(top, size=lateral.shape[2:], mode='bilinear', align_corners=True)


class ResNetGradualStyleEncoder(_PyramidStyles, ResNetTrunk):
    """ResNet-34 body."""


class GradualStyleEncoder(_PyramidStyles, IRSETrunk):
    """IR-SE50 body."""
