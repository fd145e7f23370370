"""Synthesis by a generator whose weights do not change: faster, with gradients of latents only.

Everything that follows from weights and stored noise is worked out once. The whole network is one
autograd function with a hand-written backward pass, which keeps a single map per layer, gets most
sums over positions from sums it needs anyway, and works in place. Activations are channels-last.

Shapes: N images, L styles, D style dimension, C channels, H x W positions, R image side.
Source: Karras et al. 2020, 'Analyzing and Improving the Image Quality of StyleGAN', section 2.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.stylegan2.model import EqualLinear, Generator, ModulatedConv2d, StyledConv, ToRGB
from models.stylegan2.op import upfirdn2d

_SLOPE, _GAIN = 0.2, 2**0.5
_LAST = torch.channels_last


class FrozenSynthesis:
    """A callable ws [N, L, D] -> images [N, 3, R, R], equal to Generator.synthesis(ws).

    generator: models.stylegan2.Generator; its present weights and stored noise are copied, to
    its present device. dtype: of the activations (float64, float32 or bfloat16). Styles, their
    gradients and the image are float32 (float64 for dtype float64), as ws must be. First
    derivatives with respect to ws only. noise: maps [N, 1, r, r] in place of the stored ones.
    """

    def __init__(self, generator: Generator, *, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.size, self.n_latent = generator.size, generator.n_latent
        self.style_dim = generator.style_dim
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        with torch.no_grad():
            self.start = generator.input.input.to(dtype).contiguous(memory_format=_LAST)
            noises = generator.stored_noise()
            self.layers = [
                _Layer(conv, noise, dtype, wide)
                for conv, noise in zip([generator.conv1, *generator.convs], noises)
            ]
            to_rgbs = [generator.to_rgb1, *generator.to_rgbs]
            self.rgbs = [_ToRGB(rgb, wide) for rgb in to_rgbs]
            convs = [styled.conv for styled in (generator.conv1, *generator.convs)]
            # RGB layers stand after every second convolution and share the style of the next one.
            self.affines = _Affines(
                [conv.modulation for conv in [*convs, *(rgb.conv for rgb in to_rgbs)]],
                [*range(len(convs)), *range(1, 2 * len(to_rgbs), 2)],
                wide,
            )
            self.demodulations = _Demodulations(convs, wide)

    def __call__(
        self, ws: Float[Tensor, 'N L D'], noise: Sequence[Float[Tensor, 'N 1 _ _']] | None = None
    ) -> Float[Tensor, 'N 3 R R']:
        if ws.ndim != 3 or tuple(ws.shape[1:]) != (self.n_latent, self.style_dim):
            raise ValueError(
                f'ws has shape {tuple(ws.shape)}, want [N, {self.n_latent}, {self.style_dim}]'
            )
        styles = self.affines(ws)
        factors = self.demodulations(styles)
        sources = [layer.sources for layer in self.layers] if noise is None else self._drawn(noise)
        return _Synthesis.apply(self, noise is None, sources, *factors, *styles)

    @torch.no_grad()
    def _drawn(self, noise: Sequence[Float[Tensor, 'N 1 _ _']]) -> list[Float[Tensor, '_ 2 _']]:
        """What _Layer.sources is, for noise of this call."""
        scaled = torch._foreach_mul(list(noise), [layer.strength for layer in self.layers])
        sources = [m.new_empty(2, len(m), m[0].numel(), dtype=self.dtype) for m in scaled]
        torch._foreach_copy_([s[0] for s in sources], [m.flatten(1) for m in scaled])
        ones = [s[1] for s in sources]
        torch._foreach_zero_(ones)
        torch._foreach_add_(ones, 1)
        return [s.transpose(0, 1) for s in sources]


def _alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """The places of equal keys."""
    return [[i for i, other in enumerate(keys) if other == key] for key in dict.fromkeys(keys)]


class _Affines:
    """The styles of all layers, by one product for all layers of one width.

    rows: which of the latents each layer takes.
    """

    def __init__(
        self, linears: Sequence[EqualLinear], rows: Sequence[int], dtype: torch.dtype
    ) -> None:
        self.groups = []
        for places in _alike([len(linear.bias) for linear in linears]):
            chosen = [linears[i] for i in places]
            weight = torch.stack([(linear.weight * linear.scale).T for linear in chosen])
            bias = torch.stack([linear.bias * linear.lr_mul for linear in chosen])[:, None]
            taken = torch.tensor([rows[i] for i in places], device=bias.device)
            self.groups.append((places, taken, bias.to(dtype), weight.to(dtype)))

    def __call__(self, ws: Float[Tensor, 'N L D']) -> list[Float[Tensor, 'N _']]:
        found: dict[int, Tensor] = {}
        for places, taken, bias, weight in self.groups:
            chosen = ws.index_select(1, taken).transpose(0, 1)  # [layers, N, D]
            found |= dict(zip(places, torch.baddbmm(bias, chosen, weight)))
        return [found[i] for i in range(len(found))]


class _Demodulations:
    """The factors of the output channels of all convolutions, with the gain of the activation.

    By one product for all layers of one shape, with half the squared weights: the gain is sqrt(2).
    """

    def __init__(self, convs: Sequence[ModulatedConv2d], dtype: torch.dtype) -> None:
        powers = [
            (conv.weight[0] * conv.scale).to(dtype).square().sum((2, 3)).T / _GAIN**2
            for conv in convs
        ]
        self.groups = [
            (places, torch.stack([powers[i] for i in places]))
            for places in _alike([power.shape for power in powers])
        ]
        self.least = torch.full((1, 1, 1), 1e-8 / _GAIN**2, device=powers[0].device, dtype=dtype)

    def __call__(self, styles: Sequence[Float[Tensor, 'N _']]) -> list[Float[Tensor, 'N _']]:
        found: dict[int, Tensor] = {}
        for places, powers in self.groups:
            squares = torch.stack([styles[i] for i in places]).square()  # [layers, N, Cin]
            found |= dict(zip(places, torch.baddbmm(self.least, squares, powers).rsqrt()))
        return [found[i] for i in range(len(found))]


class _Layer:
    """A 3x3 convolution with what surrounds it.

    weight: [Cout, Cin, 3, 3], or [Cin, Cout, 3, 3] with stride 2 where it upsamples; offset
    [1, C, H, W]: noise and bias, with the gain of the activation.
    """

    def __init__(
        self,
        styled: StyledConv,
        noise: Float[Tensor, '1 1 H W'],
        dtype: torch.dtype,
        wide: torch.dtype,
    ) -> None:
        conv = styled.conv
        weight = (conv.weight[0] * conv.scale).to(wide)
        self.upsample = conv.upsample
        if self.upsample:
            weight = weight.transpose(0, 1)
            self.kernel = conv.blur.kernel.to(wide)
            self.adjoint_kernel = self.kernel.flip(0, 1)
        self.weight = weight.to(dtype).contiguous(memory_format=_LAST)
        self.strength = (_GAIN * styled.noise.weight).to(wide)  # [1]
        stored = (self.strength * noise).to(wide)  # [1, 1, H, W]
        self.bias = (_GAIN * styled.activate.bias).to(wide)  # [C]
        self.offset = (stored + self.bias[:, None, None]).to(dtype)
        self.offset = self.offset.contiguous(memory_format=_LAST)
        self.level = self.bias[:, None, None].to(dtype)
        # What `offset` is made of, [2, HW]: the noise times 1, and 1 times the bias.
        self.sources = torch.stack([stored.flatten(), torch.ones_like(stored).flatten()]).to(dtype)

    def activate(
        self,
        y: Float[Tensor, 'N C H W'],
        factor: Float[Tensor, 'N C'],
        drawn: Float[Tensor, 'N 2 P'] | None,
    ) -> Float[Tensor, 'N C H W']:
        """Demodulation, noise, bias and activation, in place. drawn: in place of stored noise."""
        offset = self.offset if drawn is None else self.level
        torch.addcmul(offset, y, _columns(factor), out=y)
        if drawn is not None:
            y += drawn[:, :1].view(len(y), 1, *y.shape[2:])
        return F.leaky_relu_(y, _SLOPE)

    def convolve(self, x: Float[Tensor, 'N C h w']) -> Float[Tensor, 'N K H W']:
        if not self.upsample:
            return F.conv2d(x, self.weight, padding=1)
        return _filter(F.conv_transpose2d(x, self.weight, stride=2), self.kernel, 1)

    def convolve_adjoint(self, grad: Float[Tensor, 'N K H W']) -> Float[Tensor, 'N C h w']:
        """What `convolve` does to gradients: [N, Cout, ...] -> [N, Cin, ...]."""
        if not self.upsample:
            return F.conv_transpose2d(grad, self.weight, padding=1)
        return F.conv2d(_filter(grad, self.adjoint_kernel, 2), self.weight, stride=2)

    def offset_product(
        self, grad: Float[Tensor, 'N C H W'], sources: Float[Tensor, '*N 2 P']
    ) -> Float[Tensor, 'N C']:
        """Sum over positions of grad * offset, [N, C], without the product."""
        sums = sources.expand(len(grad), -1, -1) @ _positions(grad)  # [N, 2, C]
        return sums[:, 0].to(self.bias.dtype) + self.bias * sums[:, 1].to(self.bias.dtype)


class _ToRGB:
    """A 1x1 convolution to RGB, without demodulation. weight [3, Cin], bias [1, 3, 1, 1]."""

    def __init__(self, to_rgb: ToRGB, wide: torch.dtype) -> None:
        self.weight = (to_rgb.conv.weight[0, :, :, 0, 0] * to_rgb.conv.scale).to(wide)
        self.bias = to_rgb.bias.detach().to(wide)
        if hasattr(to_rgb, 'upsample'):
            self.kernel = to_rgb.upsample.kernel.to(wide)
            self.adjoint_kernel = self.kernel.flip(0, 1)

    def __call__(
        self,
        x: Float[Tensor, 'N C H W'],
        style: Float[Tensor, 'N C'],
        skip: Float[Tensor, 'N 3 h w'] | None,
    ) -> Float[Tensor, 'N 3 H W']:
        n, _, h, w = x.shape
        weight = (self.weight * style[:, None]).to(x.dtype)  # [N, 3, Cin]
        # The long matrix comes first: the other order would copy it in bfloat16.
        rgb = (_positions(x) @ weight.mT).mT.reshape(n, 3, h, w).to(style.dtype).add_(self.bias)
        return rgb if skip is None else rgb.add_(upfirdn2d(skip, self.kernel, up=2, pad=(2, 1)))

    def skip_adjoint(self, grad: Float[Tensor, 'N 3 H W']) -> Float[Tensor, 'N 3 h w']:
        """The gradient of the RGB image of half the size."""
        return upfirdn2d(grad, self.adjoint_kernel, down=2, pad=(1, 1))


def _positions(x: Float[Tensor, 'N C H W']) -> Float[Tensor, 'N P C']:
    """Channels-last [N, C, H, W] as [N, HW, C], a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _filter(
    x: Float[Tensor, 'N C H W'], kernel: Float[Tensor, '4 4'], pad: int
) -> Float[Tensor, 'N C h w']:
    """Filters every channel with `kernel` [4, 4] (true convolution), zero padding on all sides."""
    if x.is_cuda:
        return upfirdn2d(x, kernel, pad=(pad, pad))
    channels = x.shape[1]
    weight = kernel.flip(0, 1).to(x.dtype).expand(channels, 1, -1, -1)
    return F.conv2d(x, weight, padding=pad, groups=channels)


def _sum_of_product(
    a: Float[Tensor, 'N C H W'], b: Float[Tensor, 'N C H W']
) -> Float[Tensor, 'N C']:
    """Sum over positions of a * b, [N, C]."""
    return (a * b).sum((2, 3))


def _columns(factor: Float[Tensor, 'N C']) -> Float[Tensor, 'N C 1 1']:
    return factor[:, :, None, None]


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`tensors` in `dtype`, by one operation for all of them."""
    if tensors[0].dtype == dtype:
        return list(tensors)
    made = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(made, list(tensors))
    return made


class _Synthesis(torch.autograd.Function):
    """Modulation of all layers -> image.

    Arguments after the synthesis: whether the noise is the stored one, the `sources` of every
    layer; factors and styles of the convolutions, and the styles of the RGB layers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        net: FrozenSynthesis,
        stored: bool,
        sources: Sequence[Float[Tensor, '... 2 _']],
        *modulation: Float[Tensor, 'N _'],
    ) -> Float[Tensor, 'N 3 R R']:
        n_layers = len(net.layers)
        factors, styles = modulation[:n_layers], modulation[n_layers : 2 * n_layers]
        rgb_styles = modulation[2 * n_layers :]
        scales = _cast([*styles, *factors], net.dtype)
        keep = any(ctx.needs_input_grad)
        x = net.start.expand(len(styles[0]), -1, -1, -1)
        maps = [x]
        image: Any = None
        for i, layer in enumerate(net.layers):
            y = layer.convolve(x * _columns(scales[i]))
            x = layer.activate(y, scales[n_layers + i], None if stored else sources[i])
            if keep:
                maps.append(x)
            if i % 2 == 0:
                image = net.rgbs[i // 2](x, rgb_styles[i // 2], image)
        if keep:
            ctx.net, ctx.sources = net, sources
            ctx.save_for_backward(*modulation, *maps)
        return image

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_image: Float[Tensor, 'N 3 R R']) -> tuple[Tensor | None, ...]:
        net, n_layers = ctx.net, len(ctx.net.layers)
        saved = ctx.saved_tensors
        split = 2 * n_layers + len(net.rgbs)
        factors, styles = saved[:n_layers], saved[n_layers : 2 * n_layers]
        rgb_styles, maps = saved[2 * n_layers : split], saved[split:]
        scales = _cast(torch._foreach_mul(styles[1:], factors[:-1]), net.dtype)
        grads: list[Any] = [None] * split
        grad_x = None  # of the scaled input of the layer above, [N, C, H, W]
        for i in reversed(range(n_layers)):
            layer, x, factor = net.layers[i], maps[i + 1], factors[i]
            # The gradient of x times the demodulation factor, which commutes with the rest.
            grad, product = None, 0
            if grad_x is not None:
                grad = grad_x.mul_(_columns(scales[i]))
                product = styles[i + 1] * grads[n_layers + i + 1]
            if i % 2 == 0:
                rgb, style = net.rgbs[i // 2], rgb_styles[i // 2]
                grad, grads[2 * n_layers + i // 2] = _rgb_adjoint(
                    rgb, grad_image, grad, x, style, factor
                )
                product = product + style * grads[2 * n_layers + i // 2]
                if i:
                    grad_image = rgb.skip_adjoint(grad_image)
            torch.ops.aten.leaky_relu_backward.grad_input(grad, x, _SLOPE, True, grad_input=grad)
            # `product` is the sum of gradient times map, after and, as the activation is
            # homogeneous, before the activation; less the offset's part it is the convolution's.
            offset = layer.offset_product(grad, ctx.sources[i])
            grads[i] = (product - offset / factor) / factor
            grad_x = layer.convolve_adjoint(grad)
            grads[n_layers + i] = _sum_of_product(grad_x, maps[i]).to(factor.dtype)
        return None, None, None, *grads


def _rgb_adjoint(
    rgb: _ToRGB,
    grad_image: Float[Tensor, 'N 3 H W'],
    grad: Float[Tensor, 'N C H W'] | None,
    x: Float[Tensor, 'N C H W'],
    style: Float[Tensor, 'N C'],
    factor: Float[Tensor, 'N C'],
) -> tuple[Float[Tensor, 'N C H W'], Float[Tensor, 'N C']]:
    """Adds what the RGB layer contributes to `grad` (times factor); also its style's gradient."""
    n, channels, h, w = x.shape
    colours = grad_image.to(x.dtype).flatten(2)  # [N, 3, HW]
    grad_style = ((colours @ _positions(x)).to(style.dtype) * rgb.weight).sum(1)
    weight = (rgb.weight * (style * factor)[:, None]).to(x.dtype)  # [N, 3, C]
    if grad is None:
        grad = colours.mT @ weight
    else:
        grad = _positions(grad).baddbmm_(colours.mT, weight)
    return grad.view(n, h, w, channels).permute(0, 3, 1, 2), grad_style
