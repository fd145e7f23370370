"""Synthesis by a generator whose weights do not change: faster, with gradients of latents only.

Everything that follows from weights and stored noise is worked out once. The whole network is one
autograd function with a hand-written backward pass, which keeps a single map per layer, gets most
sums over positions from sums it needs anyway, and works in place. Activations are channels-last.

Shapes: N images, L styles, D style dimension, C channels, H x W positions, R image side.
Source: Karras et al. 2020, 'Analyzing and Improving the Image Quality of StyleGAN', section 2.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.stylegan2.model import EqualLinear, Generator, StyledConv, ToRGB
from models.stylegan2.op import upfirdn2d

_SLOPE, _GAIN = 0.2, 2**0.5
_LAST = torch.channels_last


class FrozenSynthesis:
    """A callable ws [N, L, D] -> images [N, 3, R, R], equal to Generator.synthesis(ws).

    generator: models.stylegan2.Generator; its present weights and stored noise are copied, to
    its present device. dtype: of the activations (float64, float32 or bfloat16). Styles, their
    gradients and the image are float32 (float64 for dtype float64), as ws must be. First
    derivatives with respect to ws only.
    """

    def __init__(self, generator: Generator, *, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.size, self.n_latent = generator.size, generator.n_latent
        self.style_dim = generator.style_dim
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        with torch.no_grad():
            self.start = generator.input.input.to(dtype).contiguous(memory_format=_LAST)
            noises = generator.noise_maps('stored', 1, self.start.device)
            self.layers = [
                _Layer(conv, noise, dtype, wide)
                for conv, noise in zip([generator.conv1, *generator.convs], noises)
            ]
            self.rgbs = [_ToRGB(rgb, wide) for rgb in [generator.to_rgb1, *generator.to_rgbs]]

    def __call__(self, ws: Float[Tensor, 'N L D']) -> Float[Tensor, 'N 3 R R']:
        if ws.ndim != 3 or tuple(ws.shape[1:]) != (self.n_latent, self.style_dim):
            raise ValueError(
                f'ws has shape {tuple(ws.shape)}, want [N, {self.n_latent}, {self.style_dim}]'
            )
        modulation = []
        for i, layer in enumerate(self.layers):
            style = layer.affine(ws[:, i])
            modulation += [style, layer.demodulation(style)]
        # RGB layers stand after every second convolution and share the style of the next one.
        modulation += [rgb.affine(ws[:, 2 * j + 1]) for j, rgb in enumerate(self.rgbs)]
        return _Synthesis.apply(self, *modulation)


class _Affine:
    """The style of a layer: w [N, D] -> [N, Cin]."""

    def __init__(self, linear: EqualLinear, dtype: torch.dtype) -> None:
        self.weight = (linear.weight * linear.scale).to(dtype)
        self.bias = (linear.bias * linear.lr_mul).to(dtype)

    def __call__(self, w: Float[Tensor, 'N D']) -> Float[Tensor, 'N C']:
        return F.linear(w, self.weight, self.bias)


class _Layer:
    """A 3x3 convolution with what surrounds it.

    weight: [Cout, Cin, 3, 3], or [Cin, Cout, 3, 3] with stride 2 where it upsamples; offset
    [1, C, H, W]: noise and bias, with the gain of the activation; power [Cin, Cout]: squared
    weights, for the demodulation.
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
        self.affine = _Affine(conv.modulation, wide)
        self.power = weight.square().sum((2, 3)).T.contiguous()
        if self.upsample:
            weight = weight.transpose(0, 1)
            self.kernel = conv.blur.kernel.to(wide)
            self.adjoint_kernel = self.kernel.flip(0, 1)
        self.weight = weight.to(dtype).contiguous(memory_format=_LAST)
        self.noise = (_GAIN * styled.noise.weight * noise).to(wide)  # [1, 1, H, W]
        self.bias = (_GAIN * styled.activate.bias).to(wide)  # [C]
        self.offset = (
            (self.noise + self.bias[:, None, None]).to(dtype).contiguous(memory_format=_LAST)
        )
        # What `offset` is made of, [2, HW]: the noise times 1, and 1 times the bias.
        self.sources = torch.stack(
            [self.noise.flatten(), torch.ones_like(self.noise).flatten()]
        ).to(dtype)

    def demodulation(self, style: Float[Tensor, 'N C']) -> Float[Tensor, 'N K']:
        """The factor of each output channel, with the gain of the activation, [N, Cout]."""
        return torch.rsqrt(style.square() @ self.power + 1e-8) * _GAIN

    def convolve(self, x: Float[Tensor, 'N C h w']) -> Float[Tensor, 'N K H W']:
        if not self.upsample:
            return F.conv2d(x, self.weight, padding=1)
        return _filter(F.conv_transpose2d(x, self.weight, stride=2), self.kernel, 1)

    def convolve_adjoint(self, grad: Float[Tensor, 'N K H W']) -> Float[Tensor, 'N C h w']:
        """What `convolve` does to gradients: [N, Cout, ...] -> [N, Cin, ...]."""
        if not self.upsample:
            return F.conv_transpose2d(grad, self.weight, padding=1)
        return F.conv2d(_filter(grad, self.adjoint_kernel, 2), self.weight, stride=2)

    def offset_product(self, grad: Float[Tensor, 'N C H W']) -> Float[Tensor, 'N C']:
        """Sum over positions of grad * offset, [N, C], without the product."""
        sums = self.sources.expand(len(grad), -1, -1) @ _positions(grad)  # [N, 2, C]
        return sums[:, 0].to(self.bias.dtype) + self.bias * sums[:, 1].to(self.bias.dtype)


class _ToRGB:
    """A 1x1 convolution to RGB, without demodulation. weight [3, Cin], bias [1, 3, 1, 1]."""

    def __init__(self, to_rgb: ToRGB, wide: torch.dtype) -> None:
        self.affine = _Affine(to_rgb.conv.modulation, wide)
        self.weight = (to_rgb.conv.weight[0, :, :, 0, 0] * to_rgb.conv.scale).to(wide)
        self.bias = to_rgb.bias.detach().to(wide)
        self.kernel = self.adjoint_kernel = None
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


def _columns(factor: Float[Tensor, 'N C'], like: Tensor) -> Float[Tensor, 'N C 1 1']:
    """[N, C] -> [N, C, 1, 1] in the type of `like`."""
    return factor.to(like.dtype)[:, :, None, None]


class _Synthesis(torch.autograd.Function):
    """Modulation of all layers -> image.

    Arguments after the synthesis: style and demodulation of every convolution in turn, then the
    styles of the RGB layers.
    """

    @staticmethod
    def forward(
        ctx: Any, net: FrozenSynthesis, *modulation: Float[Tensor, 'N _']
    ) -> Float[Tensor, 'N 3 R R']:
        n_layers = len(net.layers)
        styles, factors = modulation[: 2 * n_layers : 2], modulation[1 : 2 * n_layers : 2]
        rgb_styles = modulation[2 * n_layers :]
        keep = any(ctx.needs_input_grad)
        x = net.start.expand(len(styles[0]), -1, -1, -1)
        maps, image = [x], None
        for i, layer in enumerate(net.layers):
            y = layer.convolve(x * _columns(styles[i], x))
            torch.addcmul(layer.offset, y, _columns(factors[i], y), out=y)
            x = F.leaky_relu_(y, _SLOPE)
            if keep:
                maps.append(x)
            if i % 2 == 0:
                image = net.rgbs[i // 2](x, rgb_styles[i // 2], image)
        if keep:
            ctx.net = net
            ctx.save_for_backward(*modulation, *maps)
        return image

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_image: Float[Tensor, 'N 3 R R']) -> tuple[Tensor | None, ...]:
        net, n_layers = ctx.net, len(ctx.net.layers)
        saved = ctx.saved_tensors
        split = 2 * n_layers + len(net.rgbs)
        styles, factors = saved[: 2 * n_layers : 2], saved[1 : 2 * n_layers : 2]
        rgb_styles, maps = saved[2 * n_layers : split], saved[split:]
        grads = [None] * split
        grad_x = None  # of the scaled input of the layer above, [N, C, H, W]
        for i in reversed(range(n_layers)):
            layer, x, factor = net.layers[i], maps[i + 1], factors[i]
            # The gradient of x times the demodulation factor, which commutes with the rest.
            grad, product = None, 0
            if grad_x is not None:
                grad = grad_x.mul_(_columns(styles[i + 1] * factor, x))
                product = styles[i + 1] * grads[2 * (i + 1)]
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
            grads[2 * i + 1] = (product - layer.offset_product(grad) / factor) / factor
            grad_x = layer.convolve_adjoint(grad)
            grads[2 * i] = _sum_of_product(grad_x, maps[i]).to(factor.dtype)
        return None, *grads


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
