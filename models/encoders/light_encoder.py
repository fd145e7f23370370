"""A small encoder for 64- and 128-px work on a CPU.

Shapes: N images, L styles, D style dimension, S input side.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_WIDENING = (1, 1.5, 2, 3)  # channels at 32, 16, 8 and 4 px, in units of `width`
_BLOCKS = 2  # residual blocks per resolution
_SQUEEZE, _HIDDEN = 0.5, 4  # channels before the head and width of the head, likewise
_START = 32  # side of the first feature map


class _Block(nn.Module):
    """Pre-activation residual block without normalisation.

    The branch is scaled so that the sum over all blocks keeps unit variance; without batch
    statistics, training and inference compute the same function for any batch size.
    """

    def __init__(self, in_ch: int, out_ch: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.skip = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else None
        self.stride = stride
        self.gain = 1 / math.sqrt(_BLOCKS * len(_WIDENING))

    def forward(self, x: Float[Tensor, 'N C h w']) -> Float[Tensor, 'N K s t']:
        y = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2))
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride)
        if self.skip is not None:
            x = self.skip(x)
        return torch.add(x, y, alpha=self.gain)


class LightEncoder(nn.Module):
    """Patches to 32 px, eight residual blocks to 4 px, a low-rank head; 4 M parameters.

    input_size: any multiple of 32; pixels beyond 32 px go to channels, so cost hardly grows.
    width: channels of the first feature map, an even number.
    """

    def __init__(
        self,
        *,
        n_styles: int,
        input_nc: int = 6,
        input_size: int = 256,
        style_dim: int = 512,
        width: int = 64,
    ) -> None:
        super().__init__()
        if input_size % _START:
            raise ValueError(
                f'LightEncoder takes input sizes that are multiples of {_START}, not {input_size}'
            )
        self.n_styles, self.style_dim = n_styles, style_dim
        self.patch = input_size // _START
        self.stem = nn.Conv2d(input_nc * self.patch**2, width, 3, padding=1)
        squeeze, hidden = int(width * _SQUEEZE), width * _HIDDEN
        blocks, in_ch = [], width
        for stage, out_ch in enumerate(int(width * factor) for factor in _WIDENING):
            for i in range(_BLOCKS):
                blocks.append(_Block(in_ch, out_ch, 2 if stage and i == 0 else 1))
                in_ch = out_ch
        self.body = nn.Sequential(*blocks)
        self.squeeze = nn.Conv2d(in_ch, squeeze, 1)
        self.hidden = nn.Linear(squeeze * 16, hidden)
        self.head = nn.Linear(hidden, n_styles * style_dim)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, a=0.2)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.head.weight.mul_(0.1)  # the first guess stays near the average latent

    def forward(self, x: Float[Tensor, 'N C S S']) -> Float[Tensor, 'N L D']:
        """x [N, input_nc, S, S] -> latent offsets [N, L, D]."""
        x = self.body(self.stem(F.pixel_unshuffle(x, self.patch)))
        x = F.leaky_relu(self.squeeze(F.leaky_relu(x, 0.2)), 0.2)
        x = F.leaky_relu(self.hidden(x.flatten(1)), 0.2)
        return self.head(x).unflatten(1, (self.n_styles, self.style_dim))
