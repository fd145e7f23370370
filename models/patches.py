"""A small discriminator of patches, for grain and fine lines that feature networks pass over.

Source: Isola et al. 2017, 'Image-to-Image Translation with Conditional Adversarial Networks',
section 3.2.2; the condition as in Miyato and Koyama 2018, 'cGANs with Projection Discriminator'.
No batch statistics; spectral norm as in models/projected.py.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models.projected import convolve, refresh_spectral_norms

_SLOPE = 0.2
_GAIN = 8.0  # four layers of norm 1 and leaky units leave little of a difference


class PatchDiscriminator(nn.Module):
    """Pictures [N, in_channels, R, R] -> logits [N, (R / 4)^2], each of 26 px.

    The inputs are of about unit deviation. n_scores: numbers that a picture comes with, which its
    patches are to fit; 0 for none. channels: of the first layer. Stays in eval mode: spectral
    norms move in `refresh_norms` alone.
    """

    def __init__(self, in_channels: int = 3, *, n_scores: int = 0, channels: int = 32) -> None:
        super().__init__()
        layers = (
            nn.Conv2d(in_channels, channels, 4, stride=2, padding=1),
            nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
            nn.Conv2d(2 * channels, 3 * channels, 3, padding=1),
        )
        self.layers = nn.ModuleList(spectral_norm(layer) for layer in layers)
        self.logits = spectral_norm(nn.Conv2d(3 * channels, 1, 3, padding=1))
        self.fit = None
        if n_scores:
            self.fit = spectral_norm(nn.Linear(n_scores, 3 * channels, bias=False))
        self.eval()

    def train(self, mode: bool = True) -> 'PatchDiscriminator':
        """Stays in eval mode, see the class."""
        return super().train(False)

    @torch.no_grad()
    def refresh_norms(self) -> None:
        """One power iteration for the spectral norm of every layer."""
        refresh_spectral_norms(self)

    def forward(
        self, x: Float[Tensor, 'N C R R'], scores: Float[Tensor, 'N D'] | None = None
    ) -> Float[Tensor, 'N K']:
        x = x.contiguous(memory_format=torch.channels_last)
        for conv in self.layers:
            x = F.leaky_relu(convolve(conv, x), _SLOPE)
        found = convolve(self.logits, x).float()
        if self.fit is not None and scores is not None:
            wanted = self.fit(scores)[:, :, None, None]
            found = found + (x.float() * wanted).sum(1, keepdim=True)
        return _GAIN * found.flatten(1)
