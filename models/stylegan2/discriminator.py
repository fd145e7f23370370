"""StyleGAN2 discriminator ('resnet').

Shapes: N images, C channels. Names, shapes and source as in models/stylegan2/model.py.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.stylegan2.model import (
    Blur,
    EqualLinear,
    FusedLeakyReLU,
    channel_table,
    check_channels,
    check_size,
)
from models.stylegan2.op.fused_act import SQRT2


class EqualConv2d(nn.Module):
    """Convolution with run-time weight scaling; its bias, if any, belongs to the activation."""

    def __init__(
        self, in_ch: int, out_ch: int, kernel_size: int, *, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_ch, in_ch, kernel_size, kernel_size))
        self.scale = 1 / math.sqrt(in_ch * kernel_size**2)
        self.stride, self.padding = stride, padding

    def forward(
        self,
        x: Float[Tensor, 'N C H W'],
        *,
        gain: float = 1.0,
        bias: Float[Tensor, ' K'] | None = None,
    ) -> Float[Tensor, 'N K h w']:
        weight = (self.weight * (self.scale * gain)).to(x.dtype)
        return F.conv2d(x, weight, bias, stride=self.stride, padding=self.padding)


class ConvLayer(nn.Sequential):
    """[blur,] convolution [, bias + leaky ReLU] under the child numbers of the weight format.

    gain: a further factor of the output.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        kernel_size: int,
        *,
        downsample: bool = False,
        activate: bool = True,
        gain: float = 1.0,
    ) -> None:
        layers: list[nn.Module] = [Blur()] if downsample else []
        layers.append(
            EqualConv2d(
                in_ch,
                out_ch,
                kernel_size,
                stride=2 if downsample and kernel_size > 1 else 1,
                padding=0 if downsample else kernel_size // 2,
            )
        )
        if activate:
            layers.append(FusedLeakyReLU(out_ch, SQRT2 * gain))
        super().__init__(*layers)
        self.kernel_size, self.gain = kernel_size, gain

    def forward(self, x: Float[Tensor, 'N C H W']) -> Float[Tensor, 'N K h w']:
        blur, activate = self[0], self[-1]
        convolve = self[1] if isinstance(blur, Blur) else self[0]
        if isinstance(blur, Blur):
            # Decimated before the 1x1 convolution, which commutes with it, not after.
            x = blur(x, down=2, pad=(1, 1)) if self.kernel_size == 1 else blur(x, pad=(2, 2))
        if not isinstance(activate, FusedLeakyReLU):
            return convolve(x, gain=self.gain)
        if x.is_cuda:
            return activate(convolve(x))
        x = convolve(x, gain=activate.gain, bias=activate.scaled_bias(x.dtype))
        return activate.after(x)


class ResBlock(nn.Module):
    """Residual block of the discriminator; halves the resolution."""

    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        self.conv1 = ConvLayer(in_ch, in_ch, 3)
        half = math.sqrt(0.5)  # keeps the variance of the sum
        self.conv2 = ConvLayer(in_ch, out_ch, 3, downsample=True, gain=half)
        self.skip = ConvLayer(in_ch, out_ch, 1, downsample=True, activate=False, gain=half)

    def forward(self, x: Float[Tensor, 'N C H W']) -> Float[Tensor, 'N K h w']:
        return self.conv2(self.conv1(x)) + self.skip(x)


class Discriminator(nn.Module):
    """StyleGAN2 discriminator; channel arguments as in Generator.

    mbstd_group: group size of the minibatch standard deviation; the largest divisor of the
    batch not above it is used, so any batch size works.
    """

    def __init__(
        self,
        size: int,
        *,
        channel_multiplier: float = 2,
        channels: Mapping[int, int] | None = None,
        mbstd_group: int = 4,
    ) -> None:
        super().__init__()
        check_size(size)
        self.size, self.mbstd_group = size, mbstd_group
        self.channels = check_channels(size, channels or channel_table(size, channel_multiplier))
        # dtype, lowest resolution computed in it
        self.low_precision: tuple[torch.dtype, int] | None = None
        table = list(self.channels.items())[::-1]
        blocks: list[nn.Module] = [ConvLayer(3, table[0][1], 1)]
        blocks += [ResBlock(a[1], b[1]) for a, b in zip(table, table[1:])]
        self.convs = nn.Sequential(*blocks)
        c4 = self.channels[4]
        self.final_conv = ConvLayer(c4 + 1, c4, 3)
        self.final_linear = nn.Sequential(
            EqualLinear(c4 * 16, c4, activation=True), EqualLinear(c4, 1)
        )

    def forward(self, x: Float[Tensor, 'N 3 R R'], *, parts: int = 1) -> Float[Tensor, 'N 1']:
        """Images [N, 3, size, size] in [-1, 1] -> logits [N, 1].

        parts: of so many batches, one after the other, that are judged apart.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != (3, self.size, self.size):
            raise ValueError(
                f'images have shape {tuple(x.shape)}, want [N, 3, {self.size}, {self.size}]'
            )
        full = x.dtype
        for i, block in enumerate(self.convs):
            if self.low_precision is not None:
                resolution = self.size if i == 0 else self.size >> (i - 1)
                low = resolution >= self.low_precision[1]
                x = (
                    x.to(dtype=self.low_precision[0], memory_format=torch.channels_last)
                    if low
                    else x.to(full)
                )
            x = block(x)
        x = self.final_conv(self._append_stddev(x.to(full), parts))
        return self.final_linear(x.flatten(1))

    def _append_stddev(self, x: Float[Tensor, 'N C H W'], parts: int) -> Float[Tensor, 'N C+1 H W']:
        n, c, h, w = x.shape
        n //= parts
        group = max(g for g in range(1, min(n, self.mbstd_group) + 1) if n % g == 0)
        y = x.reshape(parts, group, n // group, c, h, w)
        std = (y.var(1, correction=0) + 1e-8).sqrt().mean((2, 3, 4))  # [parts, n / group]
        std = std.repeat(1, group).view(-1, 1, 1, 1)
        return torch.cat([x, std.expand(-1, 1, h, w)], 1)
