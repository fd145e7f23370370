"""StyleGAN2 generator ('skip'), and what it shares with the discriminator.

Shapes: N images, L style layers (n_latent), D style dimension, C channels, R resolution.
Parameter names, shapes and arithmetic follow the common PyTorch port, so its weight files load
with strict=True. Source: Karras et al. 2020, 'Analyzing and Improving the Image Quality of
StyleGAN', section 2 and appendix B.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.stylegan2.op import fused_leaky_relu, upfirdn2d
from models.stylegan2.op.fused_act import SQRT2

MIN_SIZE, MAX_SIZE = 32, 1024
FP16_CLAMP = 256.0  # keeps float16 activations finite; the published mixed-precision recipe


def channel_table(size: int, channel_multiplier: float = 2) -> dict[int, int]:
    """Channels per resolution {4: C, 8: C, ..., size: C} of the standard networks."""
    return {
        r: 512 if r <= 32 else 256 * 64 // r * channel_multiplier
        for r in (2**i for i in range(2, int(math.log2(size)) + 1))
    }


def truncate(
    w: Float[Tensor, '*N D'], mean: Float[Tensor, '*L D'], psi: float
) -> Float[Tensor, '*N D']:
    """Moves `w` [..., D] towards `mean` [D] or [L, D]: mean + psi * (w - mean)."""
    return mean + psi * (w - mean)


def _fir_kernel(gain: float = 1.0) -> Float[Tensor, '4 4']:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = taps[:, None] * taps[None, :]
    return kernel * (gain / kernel.sum())


def check_size(size: int) -> None:
    """ValueError for sides of pictures there are no networks for."""
    if size & (size - 1) or not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f'size {size} is not a power of two from {MIN_SIZE} to {MAX_SIZE}')


def check_channels(size: int, channels: Mapping[int, int]) -> dict[int, int]:
    """The table {resolution: channels} of a network of `size`; ValueError when it does not fit."""
    wanted = list(channel_table(size))
    if sorted(channels) != wanted:
        raise ValueError(f'channel table has resolutions {sorted(channels)}, want {wanted}')
    return {r: int(channels[r]) for r in wanted}


class PixelNorm(nn.Module):
    """Scales [N, D] to unit mean square."""

    def forward(self, x: Float[Tensor, 'N D']) -> Float[Tensor, 'N D']:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class Blur(nn.Module):
    """Holds a FIR kernel [4, 4] in the state dict; `gain` is its sum."""

    kernel: Tensor

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.register_buffer('kernel', _fir_kernel(gain))

    def forward(self, x: Float[Tensor, 'N C H W'], **resampling: Any) -> Float[Tensor, 'N C h w']:
        return upfirdn2d(x, self.kernel, **resampling)


class EqualLinear(nn.Module):
    """Linear layer whose weight is scaled at run time (equalised learning rate)."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        bias_init: float = 0.0,
        lr_mul: float = 1.0,
        activation: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_dim,), float(bias_init)))
        self.scale = lr_mul / math.sqrt(in_dim)
        self.lr_mul = lr_mul
        self.activation = activation

    def forward(self, x: Float[Tensor, 'N C']) -> Float[Tensor, 'N K']:
        bias = self.bias if self.lr_mul == 1 else self.bias * self.lr_mul
        if self.activation:
            return fused_leaky_relu(F.linear(x, self.weight * self.scale), bias)
        return F.linear(x, self.weight * self.scale, bias)


class FusedLeakyReLU(nn.Module):
    """Bias [C] and leaky ReLU, times `gain`.

    The activation is homogeneous, so the layer before it can add the bias and carry the gain in
    passes over the map it makes anyway (`after`); the kernel for GPUs does all in one pass.
    """

    def __init__(self, channels: int, gain: float = SQRT2) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.gain = gain

    def scaled_bias(self, dtype: torch.dtype) -> Float[Tensor, ' C']:
        return (self.bias * self.gain).to(dtype)

    def _clamp(self, x: Tensor) -> float | None:
        return FP16_CLAMP * self.gain / SQRT2 if x.dtype == torch.float16 else None

    def forward(self, x: Float[Tensor, 'N C H W']) -> Float[Tensor, 'N C H W']:
        return fused_leaky_relu(x, self.bias, gain=self.gain, clamp=self._clamp(x))

    def after(self, x: Float[Tensor, 'N C H W']) -> Float[Tensor, 'N C H W']:
        """The rest, for x with the scaled bias and the gain in it."""
        return fused_leaky_relu(x, gain=1.0, clamp=self._clamp(x))


class ModulatedConv2d(nn.Module):
    """Convolution whose input channels are scaled by a style and outputs renormalised.

    Computed with activations scaled and one weight shared by the batch, which equals the
    per-sample weights of the paper (section 2.2, equations 1 to 3).
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        kernel_size: int,
        style_dim: int,
        *,
        demodulate: bool = True,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, out_ch, in_ch, kernel_size, kernel_size))
        self.modulation = EqualLinear(style_dim, in_ch, bias_init=1.0)
        self.scale = 1 / math.sqrt(in_ch * kernel_size**2)
        self.padding = kernel_size // 2
        self.demodulate, self.upsample = demodulate, upsample
        if upsample:
            self.blur = Blur(gain=4.0)  # zero insertion quarters the mean; the gain restores it

    def forward(
        self,
        x: Float[Tensor, 'N C H W'],
        w: Float[Tensor, 'N D'],
        *,
        gain: float = 1.0,
        bias: Float[Tensor, ' K'] | None = None,
    ) -> Float[Tensor, 'N K h w']:
        """gain: factor of the demodulated map. bias [Cout]: added to it, in the same pass."""
        style = self.modulation(w)  # [N, Cin]
        scale = self.scale
        if self.demodulate and x.dtype == torch.float16:
            # Invisible after demodulation (to derivatives too, so these factors are constants),
            # but keeps float16 sums in range: at most the largest input times sqrt(Cin k k),
            # 17,400 of 65,504 for clamped maps of 512 channels.
            with torch.no_grad():
                scale = self.scale / self.weight[0].abs().amax((1, 2, 3), keepdim=True)
                largest = style.abs().amax(1, keepdim=True)
            style = style / largest
        weight = self.weight[0] * scale  # [Cout, Cin, k, k]
        y = x * style.to(x.dtype)[:, :, None, None]
        if self.upsample:
            y = F.conv_transpose2d(y, weight.to(x.dtype).transpose(0, 1), stride=2)
            y = self.blur(y, pad=(1, 1))
        else:
            y = F.conv2d(y, weight.to(x.dtype), padding=self.padding)
        if self.demodulate:
            power = style.square() @ weight.square().sum((2, 3)).T  # [N, Cout]
            factor = torch.rsqrt(power + 1e-8)
            factor = (factor if gain == 1 else factor * gain).to(x.dtype)[:, :, None, None]
            y = y * factor if bias is None else torch.addcmul(bias[:, None, None], y, factor)
        return y


class NoiseInjection(nn.Module):
    """Adds a learned multiple of single-channel noise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        x: Float[Tensor, 'N C H W'],
        noise: Float[Tensor, '#N 1 H W'] | None,
        *,
        gain: float = 1.0,
    ) -> Float[Tensor, 'N C H W']:
        strength = self.weight if gain == 1 else self.weight * gain
        return x if noise is None else x + (strength * noise).to(x.dtype)


class StyledConv(nn.Module):
    """Modulated 3x3 convolution, noise, bias and activation."""

    def __init__(self, in_ch: int, out_ch: int, style_dim: int, *, upsample: bool = False) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(in_ch, out_ch, 3, style_dim, upsample=upsample)
        self.noise = NoiseInjection()
        self.activate = FusedLeakyReLU(out_ch)

    def forward(
        self,
        x: Float[Tensor, 'N C h w'],
        w: Float[Tensor, 'N D'],
        noise: Float[Tensor, '#N 1 H W'] | None,
    ) -> Float[Tensor, 'N K H W']:
        if x.is_cuda:
            return self.activate(self.noise(self.conv(x, w), noise))
        gain = self.activate.gain
        x = self.conv(x, w, gain=gain, bias=self.activate.scaled_bias(x.dtype))
        return self.activate.after(self.noise(x, noise, gain=gain))


class ToRGB(nn.Module):
    """1x1 modulated convolution to RGB, added to the upsampled RGB of the block before."""

    def __init__(self, in_ch: int, style_dim: int, *, upsample: bool = True) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.conv = ModulatedConv2d(in_ch, 3, 1, style_dim, demodulate=False)
        if upsample:
            self.upsample = Blur(gain=4.0)

    def forward(
        self,
        x: Float[Tensor, 'N C H W'],
        w: Float[Tensor, 'N D'],
        skip: Float[Tensor, 'N 3 h w'] | None = None,
    ) -> Float[Tensor, 'N 3 H W']:
        rgb = self.conv(x, w)
        if x.dtype == torch.float16:
            rgb = rgb.clamp(-FP16_CLAMP, FP16_CLAMP)
        rgb = rgb.float() + self.bias if x.dtype != torch.float64 else rgb + self.bias
        if skip is None:
            return rgb
        return rgb + self.upsample(skip, up=2, pad=(2, 1))


class ConstantInput(nn.Module):
    """The learned 4x4 constant the synthesis starts from."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))


class Generator(nn.Module):
    """StyleGAN2 generator of any power-of-two size from 32 to 1024.

    channels: explicit {resolution: channels}; None takes the standard table with
    `channel_multiplier`. Raises ValueError for sizes or tables that do not fit.
    """

    def __init__(
        self,
        size: int,
        *,
        style_dim: int = 512,
        n_mlp: int = 8,
        channel_multiplier: float = 2,
        channels: Mapping[int, int] | None = None,
        lr_mlp: float = 0.01,
    ) -> None:
        super().__init__()
        check_size(size)
        self.size, self.style_dim, self.n_mlp = size, style_dim, n_mlp
        self.channels = check_channels(size, channels or channel_table(size, channel_multiplier))
        log_size = int(math.log2(size))
        self.n_latent = 2 * log_size - 2
        self.n_noise = 2 * log_size - 3
        # dtype, lowest resolution computed in it
        self.low_precision: tuple[torch.dtype, int] | None = None

        self.style = nn.Sequential(
            PixelNorm(),
            *[
                EqualLinear(style_dim, style_dim, lr_mul=lr_mlp, activation=True)
                for _ in range(n_mlp)
            ],
        )
        self.input = ConstantInput(self.channels[4])
        self.conv1 = StyledConv(self.channels[4], self.channels[4], style_dim)
        self.to_rgb1 = ToRGB(self.channels[4], style_dim, upsample=False)
        self.convs, self.to_rgbs, self.noises = nn.ModuleList(), nn.ModuleList(), nn.Module()
        in_ch = self.channels[4]
        for out_ch in list(self.channels.values())[1:]:
            self.convs.append(StyledConv(in_ch, out_ch, style_dim, upsample=True))
            self.convs.append(StyledConv(out_ch, out_ch, style_dim))
            self.to_rgbs.append(ToRGB(out_ch, style_dim))
            in_ch = out_ch
        for i in range(self.n_noise):
            r = 4 * 2 ** ((i + 1) // 2)
            self.noises.register_buffer(f'noise_{i}', torch.randn(1, 1, r, r))

    def mapping(self, z: Float[Tensor, 'N D']) -> Float[Tensor, 'N D']:
        """z [N, D] from N(0, I) -> w [N, D]."""
        return self.style(z)

    def broadcast(self, w: Float[Tensor, 'N D']) -> Float[Tensor, 'N L D']:
        """w [N, D] -> ws [N, L, D]."""
        return w[:, None].expand(-1, self.n_latent, -1)

    def stored_noise(self) -> list[Float[Tensor, '1 1 _ _']]:
        """The stored maps, one per layer that takes noise."""
        return [getattr(self.noises, f'noise_{i}') for i in range(self.n_noise)]

    def noise_maps(
        self,
        mode: str,
        n: int,
        device: torch.device | str,
        generator: torch.Generator | None = None,
    ) -> list[Tensor] | list[None]:
        """Noise for one synthesis: 'stored' buffers, fresh 'random' [n, 1, r, r], or 'none'."""
        stored = self.stored_noise()
        if mode == 'stored':
            return stored
        if mode == 'random':
            return [
                torch.randn(n, 1, *s.shape[2:], device=device, generator=generator) for s in stored
            ]
        if mode == 'none':
            return [None] * self.n_noise
        raise ValueError(f'noise={mode!r}, want stored, random, none or a list of maps')

    def synthesis(
        self,
        ws: Float[Tensor, 'N L D'],
        *,
        noise: str | Sequence[Tensor | None] = 'stored',
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, 'N 3 R R']:
        """ws [N, L, D] -> images [N, 3, size, size], nominal range [-1, 1], not clamped.

        noise: 'stored' (the same maps for every image), 'random', 'none', or a list of
        `n_noise` tensors [N or 1, 1, r, r]. generator: torch.Generator for 'random'.
        """
        if ws.ndim != 3 or tuple(ws.shape[1:]) != (self.n_latent, self.style_dim):
            raise ValueError(
                f'ws has shape {tuple(ws.shape)}, want [N, {self.n_latent}, {self.style_dim}]'
            )
        if isinstance(noise, str):
            noise = self.noise_maps(noise, ws.shape[0], ws.device, generator)
        x = self.input.input.expand(ws.shape[0], -1, -1, -1)
        x = self.conv1(x, ws[:, 0], noise[0])
        rgb = self.to_rgb1(x, ws[:, 1])
        for j, to_rgb in enumerate(self.to_rgbs):
            if self.low_precision is not None and 8 * 2**j >= self.low_precision[1]:
                x = x.to(dtype=self.low_precision[0], memory_format=torch.channels_last)
            x = self.convs[2 * j](x, ws[:, 2 * j + 1], noise[2 * j + 1])
            x = self.convs[2 * j + 1](x, ws[:, 2 * j + 2], noise[2 * j + 2])
            rgb = to_rgb(x, ws[:, 2 * j + 3], rgb)
        return rgb

    def forward(
        self,
        z: Float[Tensor, 'N D'],
        *,
        truncation: float = 1.0,
        truncation_latent: Float[Tensor, ' D'] | None = None,
        z2: Float[Tensor, 'N D'] | None = None,
        mix_at: int | None = None,
        noise: str | Sequence[Tensor | None] = 'stored',
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, 'N 3 R R']:
        """z [N, D] -> images [N, 3, size, size].

        truncation: psi, applied on all layers when below 1 and then needing
        `truncation_latent` [D]. z2, mix_at: style mixing, layers from `mix_at` on come from z2.
        """
        ws = [self.mapping(v) for v in (z, z2) if v is not None]
        if truncation < 1:
            if truncation_latent is None:
                raise ValueError('truncation below 1 needs truncation_latent')
            ws = [truncate(w, truncation_latent, truncation) for w in ws]
        ws = [self.broadcast(w) for w in ws]
        if z2 is not None:
            if mix_at is None or not 0 < mix_at < self.n_latent:
                raise ValueError(f'mix_at={mix_at}, want 1 to {self.n_latent - 1}')
            ws = [torch.cat([ws[0][:, :mix_at], ws[1][:, mix_at:]], 1)]
        return self.synthesis(ws[0], noise=noise, generator=generator)

    @torch.no_grad()
    def mean_latent(
        self, n: int = 100000, *, seed: int = 0, batch: int = 10000
    ) -> Float[Tensor, ' D']:
        """Mean of w over n draws of z, [D]."""
        device = self.input.input.device
        draw = torch.Generator().manual_seed(seed)
        total = torch.zeros(self.style_dim, dtype=torch.float64)
        for start in range(0, n, batch):
            z = torch.randn(min(batch, n - start), self.style_dim, generator=draw)
            total += self.mapping(z.to(device)).double().sum(0).cpu()
        return (total / n).float().to(device)


class _Resolutions(Protocol):
    """A generator or a discriminator."""

    size: int
    low_precision: tuple[torch.dtype, int] | None


_Network = TypeVar('_Network', bound=_Resolutions)


def set_low_precision(net: _Network, dtype: torch.dtype | None, n_resolutions: int = 4) -> _Network:
    """Computes the `n_resolutions` highest resolutions (never below 8) of G or D in `dtype`.

    dtype: torch.float16, torch.bfloat16, or None for full precision. Parameters stay float32.
    """
    net.low_precision = None if dtype is None else (dtype, max(8, net.size >> (n_resolutions - 1)))
    return net
