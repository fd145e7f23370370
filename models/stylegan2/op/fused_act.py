"""Bias, leaky ReLU, gain and clamp as one step."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.stylegan2.op import build

SQRT2 = 2**0.5


def fused_leaky_relu(
    x: Float[Tensor, 'N C *s'],
    bias: Float[Tensor, ' C'] | None = None,
    *,
    slope: float = 0.2,
    gain: float = SQRT2,
    clamp: float | None = None,
    impl: str = 'auto',
) -> Float[Tensor, 'N C *s']:
    """gain * leaky_relu(x + bias, slope), clamped to [-clamp, clamp] when given.

    x: [N, C, ...], any float dtype and layout. bias: [C] or None. impl: 'ref', the PyTorch
    path; 'cuda', the fused kernel (saves its output only); 'auto', the kernel where it builds.
    Both have derivatives of any order. Returns x's shape and dtype.
    Raises ValueError when the bias does not fit. Source: StyleGAN2, section 2 (activation
    scaled by sqrt(2) to keep the variance).
    """
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != x.shape[1]):
        raise ValueError(f'bias {tuple(bias.shape)} does not fit x {tuple(x.shape)}')
    if build.get(x, impl, 'activation') is not None and slope > 0 and gain > 0:
        bias = None if bias is None else bias.to(x.dtype)
        return _FusedLeakyReLU.apply(x, bias, slope, gain, clamp)
    return _fused_leaky_relu_ref(x, bias, slope, gain, clamp)


def _fused_leaky_relu_ref(
    x: Float[Tensor, 'N C *s'],
    bias: Float[Tensor, ' C'] | None,
    slope: float,
    gain: float,
    clamp: float | None,
) -> Float[Tensor, 'N C *s']:
    if bias is not None:
        x = x + bias.to(x.dtype).view(1, -1, *[1] * (x.ndim - 2))
    x = F.leaky_relu(x, slope)
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


class _FusedLeakyReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, 'N C *s'],
        bias: Float[Tensor, ' C'] | None,
        slope: float,
        gain: float,
        clamp: float | None,
    ) -> Float[Tensor, 'N C *s']:
        y = _launch(x, bias, None, slope, gain, clamp)
        ctx.save_for_backward(y)
        ctx.arguments, ctx.has_bias = (slope, gain, clamp), bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, 'N C *s']) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        grad_x = _FusedLeakyReLUGrad.apply(grad, y, *ctx.arguments)
        grad_bias = None
        if ctx.has_bias and ctx.needs_input_grad[1]:
            grad_bias = grad_x.sum([0, *range(2, grad_x.ndim)])
        return grad_x, grad_bias, None, None, None


class _FusedLeakyReLUGrad(torch.autograd.Function):
    """Linear in the gradient and constant between the kinks, so it is its own derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Float[Tensor, 'N C *s'],
        y: Float[Tensor, 'N C *s'],
        slope: float,
        gain: float,
        clamp: float | None,
    ) -> Float[Tensor, 'N C *s']:
        ctx.save_for_backward(y)
        ctx.arguments = slope, gain, clamp
        return _launch(grad, None, y, slope, gain, clamp)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, 'N C *s']) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        return _FusedLeakyReLUGrad.apply(grad, y, *ctx.arguments), None, None, None, None


def _launch(
    x: Float[Tensor, 'N C *s'],
    bias: Float[Tensor, ' C'] | None,
    saved: Float[Tensor, 'N C *s'] | None,
    slope: float,
    gain: float,
    clamp: float | None,
) -> Float[Tensor, 'N C *s']:
    # The saved output dictates the layout, so that both tensors are walked in the same order.
    like = x if saved is None else saved
    channels_last = (
        like.ndim == 4
        and not like.is_contiguous()
        and like.is_contiguous(memory_format=torch.channels_last)
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    if saved is not None:
        saved = saved.contiguous(memory_format=layout)
    y = torch.empty_like(x, memory_format=layout)
    inner = 1 if channels_last else x[0, 0].numel() if x.numel() else 1
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device(x.device):
        code = build.kernels_of(x).ksalsa_activate(
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if saved is None else saved.data_ptr(),
            y.data_ptr(),
            x.numel(),
            inner,
            x.shape[1],
            slope,
            gain,
            -1.0 if clamp is None else clamp,
            build.DTYPES[x.dtype],
            torch.cuda.current_stream().cuda_stream,
        )
    build.check(code, 'activation')
    return y
