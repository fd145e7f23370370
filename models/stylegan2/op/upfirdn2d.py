"""Zero-insert, pad, filter, decimate: the resampling step of StyleGAN2."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.stylegan2.op import build

Pad = tuple[int, int, int, int]  # left, right, top, bottom


def upfirdn2d(
    x: Float[Tensor, 'N C H W'],
    kernel: Float[Tensor, 'kh kw'],
    *,
    up: int = 1,
    down: int = 1,
    pad: Sequence[int] = (0, 0),
    impl: str = 'auto',
) -> Float[Tensor, 'N C h w']:
    """Upsamples by zero insertion, pads, applies a FIR filter, keeps every `down`-th sample.

    x: [N, C, H, W], any float dtype and layout. kernel: [kh, kw], used as a true convolution
    (flipped). up, down: whole factors for both axes. pad: (before, after) for both axes, or
    (left, right, top, bottom) in samples of the upsampled image; negative values crop.
    impl: 'ref', the PyTorch path; 'cuda', the fused kernel; 'auto', the kernel where it builds.
    Both have derivatives of any order with respect to x; the kernel's is taken by 'ref' only.
    Returns [N, C, (H*up + pads - kh)//down + 1, (W*up + pads - kw)//down + 1] in x's dtype.
    Raises ValueError on shapes or factors that do not fit. Source: StyleGAN2, appendix B.
    """
    pad = full_pad(pad)
    _check(x, kernel, up, down, pad)
    kernels = build.get(x, impl, 'upfirdn2d')
    if kernel.requires_grad:
        return _upfirdn2d_ref(x, kernel, up, down, pad)
    compute = _upfirdn2d_ref if kernels is None else _launch
    return _UpFirDn2d.apply(x, kernel, up, down, pad, compute)


def full_pad(pad: Sequence[int]) -> Pad:
    """(before, after) or (left, right, top, bottom) -> (left, right, top, bottom)."""
    pad = tuple(int(p) for p in pad)
    if len(pad) == 2:
        pad = pad + pad
    if len(pad) != 4:
        raise ValueError(f'pad={pad}, want 2 or 4 numbers')
    return pad


def _check(x: Tensor, kernel: Tensor, up: int, down: int, pad: Pad) -> None:
    if x.ndim != 4 or kernel.ndim != 2:
        raise ValueError(
            f'want x [N, C, H, W] and kernel [kh, kw], got {tuple(x.shape)} and '
            f'{tuple(kernel.shape)}'
        )
    if up < 1 or down < 1:
        raise ValueError(f'up={up} and down={down} must be 1 or more')
    if min(_output_size(x, kernel, up, 1, pad)) < 1:
        raise ValueError(
            f'the padded image {tuple(x.shape)} is smaller than the '
            f'{kernel.shape[0]}x{kernel.shape[1]} kernel'
        )


def _output_size(
    x: Float[Tensor, 'N C H W'], kernel: Float[Tensor, 'kh kw'], up: int, down: int, pad: Pad
) -> tuple[int, int]:
    left, right, top, bottom = pad
    return (
        (x.shape[2] * up + top + bottom - kernel.shape[0]) // down + 1,
        (x.shape[3] * up + left + right - kernel.shape[1]) // down + 1,
    )


def _upfirdn2d_ref(
    x: Float[Tensor, 'N C H W'], kernel: Float[Tensor, 'kh kw'], up: int, down: int, pad: Pad
) -> Float[Tensor, 'N C h w']:
    kh, kw = kernel.shape
    left, right, top, bottom = pad
    weight = kernel.to(x.dtype)[None, None].expand(x.shape[1], 1, kh, kw)
    if up > 1 and (x.is_cuda or x.element_size() > 2):
        # A strided transposed convolution is the filter over the zero-inserted image without the
        # zeros ever being stored; it starts kh-1 samples early and ends before the last zeros.
        x = F.conv_transpose2d(x, weight, stride=up, groups=x.shape[1])
        x = F.pad(x, (left - kw + 1, right - kw + up, top - kh + 1, bottom - kh + up))
        return x[:, :, ::down, ::down] if down > 1 else x
    if up > 1:  # in half precision CPUs take ten times as long for a transposed convolution
        wide = torch.empty(
            (*x.shape[:2], x.shape[2] * up, x.shape[3] * up),
            dtype=x.dtype,
            device=x.device,
            memory_format=_layout(x),
        ).zero_()
        wide[:, :, ::up, ::up] = x
        x = wide
    # conv2d correlates, so the kernel is flipped to give a convolution.
    weight = weight.flip(2, 3)
    if left == right >= 0 and top == bottom >= 0:
        return F.conv2d(x, weight, stride=down, padding=(top, left), groups=x.shape[1])
    return F.conv2d(F.pad(x, pad), weight, stride=down, groups=x.shape[1])


def _layout(x: Float[Tensor, 'N C H W']) -> torch.memory_format:
    last = (
        x.is_contiguous(memory_format=torch.channels_last)
        and x.shape[1] > 1
        and not x.is_contiguous()
    )
    return torch.channels_last if last else torch.contiguous_format


class _UpFirDn2d(torch.autograd.Function):
    """`compute` (the kernel or the PyTorch path) with a derivative of its own.

    That is the same operation with up and down exchanged, on CPUs many times faster than
    autograd's for grouped convolutions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, 'N C H W'],
        kernel: Float[Tensor, 'kh kw'],
        up: int,
        down: int,
        pad: Pad,
        compute: Callable[..., Tensor],
    ) -> Float[Tensor, 'N C h w']:
        ctx.save_for_backward(kernel)
        y = compute(x, kernel, up, down, pad)
        left, _, top, _ = pad
        kh, kw = kernel.shape
        ctx.arguments = (
            down,
            up,
            (
                kw - 1 - left,
                x.shape[3] * up - y.shape[3] * down + left - up + 1,
                kh - 1 - top,
                x.shape[2] * up - y.shape[2] * down + top - up + 1,
            ),
            compute,
        )
        return y

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, 'N C H W']) -> tuple[Tensor | None, ...]:
        (kernel,) = ctx.saved_tensors
        return (_UpFirDn2d.apply(grad, kernel.flip(0, 1), *ctx.arguments), *[None] * 5)


def _launch(
    x: Float[Tensor, 'N C H W'], kernel: Float[Tensor, 'kh kw'], up: int, down: int, pad: Pad
) -> Float[Tensor, 'N C h w']:
    layout = _layout(x)
    x = x.contiguous(memory_format=layout)
    height, width = _output_size(x, kernel, up, down, pad)
    y = torch.empty(
        (x.shape[0], x.shape[1], height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=layout,
    )
    taps = kernel.to(device=x.device, dtype=torch.float32).contiguous()
    sizes = (ctypes.c_int64 * 14)(
        x.shape[0], x.shape[1], x.shape[2], x.shape[3], height, width, *x.stride(), *y.stride()
    )
    with torch.cuda.device(x.device):
        code = build.kernels_of(x).ksalsa_upfirdn2d(
            x.data_ptr(),
            taps.data_ptr(),
            y.data_ptr(),
            sizes,
            up,
            down,
            pad[0],
            pad[2],
            *kernel.shape,
            build.DTYPES[x.dtype],
            torch.cuda.current_stream().cuda_stream,
        )
    build.check(code, 'upfirdn2d')
    return y
