"""A small discriminator of patches, for grain and fine lines that feature networks pass over.

Source: Isola et al. 2017, 'Image-to-Image Translation with Conditional Adversarial Networks',
section 3.2.2. No batch statistics; spectral norm as in models/projected.py.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models.projected import convolve, refresh_spectral_norms

_SLOPE = 0.2


class PatchDiscriminator(nn.Module):
    """Pictures [N, 3, R, R] in [-1, 1] -> logits [N, (R / 8)^2], each of 38 px.

    channels: of the first layer. Stays in eval mode: spectral norms move in `refresh_norms` alone.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        widths = (3, channels, 2 * channels, 4 * channels)
        self.down = nn.ModuleList(
            spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1))
            for a, b in zip(widths, widths[1:])
        )
        self.logits = spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1))
        self.eval()

    def train(self, mode: bool = True) -> 'PatchDiscriminator':
        """Stays in eval mode, see the class."""
        return super().train(False)

    @torch.no_grad()
    def refresh_norms(self) -> None:
        """One power iteration for the spectral norm of every layer."""
        refresh_spectral_norms(self)

    def forward(self, x: Float[Tensor, 'N 3 R R']) -> Float[Tensor, 'N K']:
        x = x.contiguous(memory_format=torch.channels_last)
        for conv in self.down:
            x = F.leaky_relu(convolve(conv, x), _SLOPE)
        return convolve(self.logits, x).float().flatten(1)
