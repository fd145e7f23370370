"""Encoders on EfficientNet-Lite0, which can start from its ImageNet weights.

Shapes: N images, L styles, D style dimension, S input side.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.features.pretrained import load_feature_network

ARCH = 'tf_efficientnet_lite0'
# Stride of a map -> channels and further reduction of what the head sees of it.
_STRIDES = {8: (16, 2), 16: (32, 1), 32: (64, 1)}
NUMBERS_PER_CELL = 256  # of 32 x 32 pixels: 16 * 4 + 32 * 4 + 64
_HIDDEN = 512


class LiteEncoder(nn.Module):
    """The body of EfficientNet-Lite0, maps of three strides, a low-rank head.

    input_size: a multiple of 32; 9 M parameters at 128 px. Batch norms keep their statistics, so
    training and inference compute the same for any batch.
    """

    def __init__(
        self, *, n_styles: int, input_nc: int = 6, input_size: int = 256, style_dim: int = 512
    ) -> None:
        super().__init__()
        if input_size % 32:
            raise ValueError(
                f'LiteEncoder takes input sizes that are multiples of 32, not {input_size}'
            )
        import timm  # half of the start-up time of every script, if imported with this module

        self.n_styles, self.style_dim = n_styles, style_dim
        body = timm.create_model(
            ARCH, pretrained=False, in_chans=input_nc, features_only=True, out_indices=(2, 3, 4)
        )
        self.body = cast(Any, body)  # timm's networks have attributes that nn.Module lacks
        self.squeeze = nn.ModuleList(
            nn.Conv2d(channels, out, 1)
            for channels, (out, _) in zip(self.body.feature_info.channels(), _STRIDES.values())
        )
        self.hidden = nn.Linear(NUMBERS_PER_CELL * (input_size // 32) ** 2, _HIDDEN)
        self.head = nn.Linear(_HIDDEN, n_styles * style_dim)
        for module in (*self.squeeze, self.hidden, self.head):
            nn.init.kaiming_normal_(module.weight, a=0.2)
            nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.head.weight.mul_(0.1)  # the first guess stays near the average latent

    def train(self, mode: bool = True) -> 'LiteEncoder':
        """Training mode, but for the batch norms."""
        super().train(mode)
        for module in self.body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Float[Tensor, 'N C S S']) -> Float[Tensor, 'N L D']:
        """x [N, input_nc, S, S] -> latent offsets [N, L, D]."""
        parts = [
            F.avg_pool2d(squeeze(maps), reduce).flatten(1)
            for squeeze, maps, (_, reduce) in zip(self.squeeze, self.body(x), _STRIDES.values())
        ]
        x = F.leaky_relu(self.hidden(F.leaky_relu(torch.cat(parts, 1), 0.2)), 0.2)
        return self.head(x).unflatten(1, (self.n_styles, self.style_dim))


@torch.no_grad()
def init_from_lite0(encoder: LiteEncoder, *, generator: torch.Generator | None = None) -> None:
    """Copies the installed ImageNet weights into the body.

    The stem's channels after the first three see the current reconstruction. They start as
    noise of the pretrained filters' own standard deviation, so that neither picture drowns the
    other. generator: torch.Generator for that noise. UserError when the weights are not installed.
    """
    state = load_feature_network('lite0').net.state_dict()
    state = {k: v for k, v in state.items() if k in encoder.body.state_dict()}
    stem = state['conv_stem.weight']
    weight = encoder.body.conv_stem.weight
    extra = (
        torch.randn((*stem.shape[:1], weight.shape[1] - 3, *stem.shape[2:]), generator=generator)
        * stem.std()
    )
    state['conv_stem.weight'] = torch.cat([stem, extra], 1)
    encoder.body.load_state_dict(state)
