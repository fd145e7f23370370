"""Small trials of the fused kernels against their PyTorch twins, on the GPU they are to run on."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from models.stylegan2.op.fused_act import fused_leaky_relu
from models.stylegan2.op.upfirdn2d import upfirdn2d

# Of the largest value; a wrong kernel is off by far more, rounding by less.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_LAYOUTS = (torch.contiguous_format, torch.channels_last)


def difference(op: str, device: torch.device) -> str | None:
    """Where the kernel of `op` first differs from its twin, in words; None when it does not.

    op: 'upfirdn2d' (blur, up 2, down 2 and an unusual filter) or 'activation' (with bias and
    clamp). Results and gradients, in float32, float16 and bfloat16, both memory layouts. An error
    the kernel raises counts as a difference.
    """
    for name, function in {'upfirdn2d': _resamplings, 'activation': _activations}[op]().items():
        for dtype in _TOLERANCE:
            for layout in _LAYOUTS:
                try:
                    found = _compare(function, dtype, layout, device)
                except RuntimeError as error:
                    return f'{name} in {dtype}: {error}'
                if not found <= _TOLERANCE[dtype]:  # NaN is a difference, too
                    return f'{name} in {dtype}, relative error {found:.2g}'
    return None


def _resamplings() -> dict[str, Callable]:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    usual, unusual = torch.outer(taps, taps) / 64, torch.tensor([[0.5, 0.2, -0.1], [0.1, 0.2, 0.1]])

    def call(kernel: Tensor, **options: Any) -> Callable:
        return lambda x, impl: upfirdn2d(x, kernel.to(x.device), impl=impl, **options)

    return {
        'blur': call(usual, pad=(2, 1)),
        'up 2': call(usual, up=2, pad=(2, 1)),
        'down 2': call(usual, down=2, pad=(1, 1)),
        'another filter': call(unusual, up=2, down=3, pad=(2, 3, 1, -1)),
    }


def _activations() -> dict[str, Callable]:
    def biased(x: Float[Tensor, 'N C *s'], impl: str) -> Float[Tensor, 'N C *s']:
        bias = torch.linspace(-0.5, 0.5, x.shape[1], device=x.device).to(x.dtype)
        return fused_leaky_relu(x, bias, impl=impl)

    return {
        'bias and activation': biased,
        'clamp': lambda x, impl: fused_leaky_relu(x, gain=1.0, clamp=1.03, impl=impl),
    }


def _compare(
    function: Callable, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> float:
    """Largest difference of results and gradients over the largest value."""
    # Values that no rounding brings to a kink, drawn on the CPU: the program's own stream of
    # random numbers is left alone.
    values = torch.randn(2, 8, 9, 14, generator=torch.Generator().manual_seed(0)).mul(4).round()
    x = (values / 4 + 0.11).to(device, dtype).contiguous(memory_format=layout)
    results = []
    for impl in ('cuda', 'ref'):
        leaf = x.clone().requires_grad_()
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            y = function(leaf, impl)
            (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y) * 0.7)
        results.append([y.detach().double(), grad.double()])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results))
