"""The steps of ADA's geometric transformations that touch pixels: doubling, sampling, halving.

Source: Karras et al. 2020, appendix B. Shapes: images [N, C, H, W].
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.stylegan2.op import upfirdn2d


class Margins(NamedTuple):
    """Pixels by which a picture is padded, by reflection."""

    left: int
    right: int
    top: int
    bottom: int


class GridSample(torch.autograd.Function):
    """Bilinear F.grid_sample with derivatives of any order with respect to the images.

    PyTorch before 2.13 has no second derivative of its own, which R1 needs.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, where: Tensor) -> Tensor:
        ctx.save_for_backward(images, where)
        return F.grid_sample(
            images, where, mode='bilinear', padding_mode='zeros', align_corners=False
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _GridSampleTranspose.apply(grad, *ctx.saved_tensors), None


class _GridSampleTranspose(torch.autograd.Function):
    """The transpose of the (linear) sampling; the transpose of that is sampling again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, images: Tensor, where: Tensor) -> Tensor:
        ctx.save_for_backward(where)
        # 0, 0: bilinear interpolation, zero padding; the mask skips the positions' gradient.
        return torch.ops.aten.grid_sampler_2d_backward(
            grad, images, where, 0, 0, False, [True, False]
        )[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (where,) = ctx.saved_tensors
        return GridSample.apply(grad, where), None, None


def _separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows [H', H] and columns [W', W] applied to [N, C, H, W] -> [N, C, H', W']."""
    return rows @ (images @ columns.T)


# On CPUs, padding, doubling and halving are linear maps of each axis, and as two matrix products
# much faster than filters over three channels. On GPUs the filters cost a tenth of the products.


def double_by_matrices(images: Tensor, taps: Tensor, margins: Margins) -> Tensor:
    """Pads by reflection and doubles both axes: [N, C, H, W] -> [N, C, 2H', 2W']."""
    height, width = images.shape[2:]
    return _separable(
        images,
        _doubling(taps, height, margins.top, margins.bottom),
        _doubling(taps, width, margins.left, margins.right),
    )


def double_by_filters(images: Tensor, taps: Tensor, margins: Margins) -> Tensor:
    """What double_by_matrices does."""
    half, taps = taps.numel() // 2, 2 * taps
    images = upfirdn2d(
        F.pad(images, margins, mode='reflect'), taps[None, :], up=2, pad=(half, half - 1, 0, 0)
    )
    return upfirdn2d(images, taps[:, None], pad=(0, 0, half, half - 1))


def halve_by_matrices(images: Tensor, taps: Tensor) -> Tensor:
    """Filters both axes, keeps every second sample and drops the outer ones."""
    return _separable(images, _halving(taps, images.shape[2]), _halving(taps, images.shape[3]))


def halve_by_filters(images: Tensor, taps: Tensor) -> Tensor:
    """What halve_by_matrices does."""
    crop, taps = _crop(taps), taps.flip(0)
    images = upfirdn2d(images, taps[None, :], pad=(crop, crop, 0, 0))
    return upfirdn2d(images, taps[:, None], down=2, pad=(0, 0, crop, crop))


def _crop(taps: Tensor) -> int:
    """Padding of the halving filter that leaves half the samples without the margin."""
    return taps.numel() // 2 - 1 - 2 * (taps.numel() // 4)


def _doubling(taps: Tensor, n: int, before: int, after: int) -> Tensor:
    """[2*(n + before + after), n]: reflect-pad an axis, insert zeros, filter with gain 2."""
    eye = F.pad(torch.eye(n, device=taps.device)[None], (before, after), mode='reflect')
    half = taps.numel() // 2
    # Each row is the image of one sample; of the doubled rows only the even ones hold any.
    return upfirdn2d(eye[None], 2 * taps[None, :], up=2, pad=(half, half - 1, 0, 0))[0, 0, ::2].T


def _halving(taps: Tensor, n: int) -> Tensor:
    """[(n - 4*reach)/2, n]: the flipped filter and every second sample, the margin cropped."""
    crop = _crop(taps)
    eye = torch.eye(n, device=taps.device)[None, None]
    return upfirdn2d(eye, taps.flip(0)[None, :], pad=(crop, crop, 0, 0))[0, 0, :, ::2].T
