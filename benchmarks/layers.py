"""Ways to compute a generator's convolutions: what models/stylegan2/frozen.py chooses from.

    python benchmarks/layers.py --size=256 --precision=fp32 --markdown

For every resolution, forward and input gradient of the 3x3 convolution in both memory layouts, and
of the upsampling layer as a transposed convolution followed by the 4x4 filter, as one convolution
with four 3x3 phase kernels per output (both in one, polyphase), and as four 2x2 phase kernels
followed by the filter. Milliseconds for one image, the best of --repeats.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from anonymization.optimize import ACTIVATIONS, PRECISIONS, matmul_precision
from benchmarks.machine import clock, describe, matrix_rate, print_rows
from models.stylegan2.model import channel_table
from utils.cli import parser_of, positive_int, power_of_two, resolve_device, run

Layer = Callable[[Tensor], Tensor]
LAYOUTS = {'NCHW': torch.contiguous_format, 'NHWC': torch.channels_last}


def build_parser() -> argparse.ArgumentParser:
    p = parser_of(__doc__)
    p.add_argument('--size', type=power_of_two, default=256, metavar='PX', help='image side')
    p.add_argument(
        '--from_size', type=power_of_two, default=64, metavar='PX', help='lowest resolution'
    )
    p.add_argument('--precision', choices=PRECISIONS, default='fp32', help='of all maps')
    p.add_argument('--repeats', type=positive_int, default=3, metavar='INT', help='timed calls')
    p.add_argument('--device', default='auto', help='cpu, cuda, cuda:N or auto')
    p.add_argument('--markdown', action='store_true', help='print a Markdown table')
    return p


def conv(weight: Float[Tensor, 'K C 3 3']) -> Layer:
    return lambda x: F.conv2d(x, weight, padding=1)


def blurred(function: Layer, kernel: Float[Tensor, 'K 1 4 4']) -> Layer:
    """`function`, then the filter with one row and column less."""
    return lambda x: F.conv2d(function(x), kernel, padding=1, groups=len(kernel))


def upsampling_ways(
    c_in: int, c_out: int, random: Callable[[Sequence[int]], Tensor]
) -> dict[str, Layer]:
    """{name: function of x [N, c_in, H, W] -> [N, c_out, 2H, 2W]}; `random`(shape) -> weights."""
    kernel = random((c_out, 1, 4, 4))
    weight, phases3, phases2 = (
        random(s) for s in ((c_in, c_out, 3, 3), (4 * c_out, c_in, 3, 3), (4 * c_out, c_in, 2, 2))
    )
    return {
        'transposed + filter': blurred(lambda x: F.conv_transpose2d(x, weight, stride=2), kernel),
        'four 3x3 phases': lambda x: F.pixel_shuffle(F.conv2d(x, phases3, padding=1), 2),
        'four 2x2 phases + filter': lambda x: F.conv2d(
            F.pixel_shuffle(F.conv2d(x, phases2, padding=1), 2)[..., :-1, :-1],
            kernel,
            padding=1,
            groups=c_out,
        ),
    }


def best_ms(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    best = float('inf')
    for i in range(repeats + 1):
        begin = clock(device)
        function()
        took = clock(device) - begin
        if i:
            best = min(best, took)
    return 1000 * best


def measure(
    function: Layer, x: Float[Tensor, 'N C H W'], device: torch.device, repeats: int
) -> tuple[float, float]:
    """Milliseconds of forward and of the gradient with respect to x."""
    with torch.no_grad():
        forward = best_ms(lambda: function(x), device, repeats)
    leaf = x.detach().requires_grad_(True)
    y = function(leaf)
    grad = torch.randn_like(y)
    backward = best_ms(
        lambda: torch.autograd.grad(y, leaf, grad, retain_graph=True), device, repeats
    )
    return forward, backward


def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    device, dtype = resolve_device(opts.device), ACTIVATIONS[opts.precision]
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    rows = [['layer', 'way', 'layout', 'forward, ms', 'gradient, ms']]
    with matmul_precision(opts.precision):
        rate = matrix_rate(device, dtype)
        table = channel_table(opts.size)
        for side in [r for r in table if r >= opts.from_size]:
            for layout, order in LAYOUTS.items():
                rows += time_layers(table, side, layout, order, dtype, device, opts.repeats)
    print(f'{describe(device)}; {opts.precision} matrix rate {rate / 1e9:.0f} GFLOP/s')
    print_rows(rows, markdown=opts.markdown)
    return 0


def time_layers(
    table: dict[int, int],
    side: int,
    layout: str,
    order: torch.memory_format,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> list[list[str]]:
    """Rows of the table for the two convolutions that end at `side`."""

    def random(shape: Sequence[int]) -> Float[Tensor, '...']:
        return torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=order)

    c_in, c_out = table[side // 2], table[side]
    jobs = [
        (
            f'{c_out} to {c_out}, {side} px',
            'convolution',
            conv(random((c_out, c_out, 3, 3))),
            random((1, c_out, side, side)),
        )
    ]
    x = random((1, c_in, side // 2, side // 2))
    jobs += [
        (f'{c_in} to {c_out}, up to {side} px', name, function, x)
        for name, function in upsampling_ways(c_in, c_out, random).items()
    ]
    return [
        [layer, way, layout, *(f'{t:.1f}' for t in measure(function, x, device, repeats))]
        for layer, way, function, x in jobs
    ]


if __name__ == '__main__':
    run(main)
