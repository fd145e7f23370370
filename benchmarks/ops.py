"""Fused CUDA ops beside the PyTorch path and torch.compile of it, as shares of copy bandwidth.

    python benchmarks/ops.py --markdown

Every row is one op on one shape, dtype and layout. 'of copy' is the fraction of the bandwidth a
plain device-to-device copy reaches on the same card in the same run, counting each input and
output element once. Without a GPU the PyTorch path alone is timed, on the CPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from models.stylegan2.op import build, fused_leaky_relu, upfirdn2d
from utils.cli import parser_of, positive_int, resolve_device, run

# (name, function of (x, kernel, bias, impl), output elements per input element)
OPS = {
    'blur': (lambda x, k, b, impl: upfirdn2d(x, k, pad=(2, 1), impl=impl), 1.0),
    'upsample x2': (lambda x, k, b, impl: upfirdn2d(x, k, up=2, pad=(2, 1), impl=impl), 4.0),
    'downsample x2': (lambda x, k, b, impl: upfirdn2d(x, k, down=2, pad=(1, 1), impl=impl), 0.25),
    'bias+lrelu': (lambda x, k, b, impl: fused_leaky_relu(x, b, impl=impl), 1.0),
}
_CALLS = 20  # on a GPU, between two events
DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}


def build_parser() -> argparse.ArgumentParser:
    p = parser_of(__doc__)
    p.add_argument('--device', default='auto', help='cpu, cuda, cuda:N or auto')
    p.add_argument(
        '--repeats',
        type=positive_int,
        default=20,
        metavar='INT',
        help='timed calls; the median counts',
    )
    p.add_argument(
        '--shapes',
        default='16x512x64x64,8x128x256x256,4x64x512x512',
        help='NxCxHxW, comma separated',
    )
    p.add_argument('--dtypes', default='fp32,fp16,bf16', help='of fp32, fp16, bf16')
    p.add_argument('--no_compile', action='store_true', help='leave torch.compile out')
    p.add_argument('--markdown', action='store_true', help='print a Markdown table')
    return p


def seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of one call, after a warm-up; on a GPU of many calls in a row.

    A single call between two events would time Python, which takes longer to start short kernels
    than they run.
    """
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        if device.type == 'cuda':
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(device)
            start.record(stream)
            for _ in range(_CALLS):
                function()
            stop.record(stream)
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(stop) / 1000 / _CALLS)
        else:
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes per second, read plus written, of copying 256 MiB."""
    x = torch.empty(2**26 if device.type == 'cuda' else 2**24, device=device).normal_()
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / seconds(lambda: y.copy_(x), device, repeats)


def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    device = resolve_device(opts.device)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'
    copy = copy_bandwidth(device, opts.repeats)
    print(f'{name}, torch {torch.__version__}, copy {copy / 1e9:.0f} GB/s')
    impls = ['ref']
    if not opts.no_compile:
        impls.append('compile')
    if (
        device.type == 'cuda'
        and build.library(torch.cuda.current_device() if device.index is None else device.index)
        is not None
    ):
        impls.append('cuda')
    header = ['op', 'shape', 'dtype', 'layout', 'pass']
    header += [f'{i} {unit}' for i in impls for unit in ('ms', 'of copy')]
    print_row(header, opts.markdown, head=True)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=device)
    kernel = torch.outer(taps, taps) / 64
    for shape in opts.shapes.split(','):
        size = [int(v) for v in shape.split('x')]
        for dtype_name in opts.dtypes.split(','):
            dtype = DTYPES[dtype_name]
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(size, device=device, dtype=dtype).contiguous(memory_format=layout)
                bias = torch.randn(size[1], device=device, dtype=dtype)
                for op, (function, growth) in OPS.items():
                    measure(
                        op,
                        function,
                        growth,
                        x,
                        kernel,
                        bias,
                        impls,
                        copy,
                        opts,
                        shape,
                        dtype_name,
                        layout,
                        device,
                    )
    return 0


def measure(
    op: str,
    function: Callable[..., Tensor],
    growth: float,
    x: Float[Tensor, 'N C H W'],
    kernel: Float[Tensor, '4 4'],
    bias: Float[Tensor, ' C'],
    impls: Sequence[str],
    copy: float,
    opts: argparse.Namespace,
    shape: str,
    dtype: str,
    layout: torch.memory_format,
    device: torch.device,
) -> None:
    """Prints the forward and the backward row of one op."""
    traffic = x.numel() * x.element_size() * (1 + growth)
    forward, backward = [], []
    for impl in impls:
        called = torch.compile(function, dynamic=False) if impl == 'compile' else function
        name = 'ref' if impl == 'compile' else impl
        with torch.no_grad():
            took = seconds(partial(called, x, kernel, bias, name), device, opts.repeats)
        forward += [f'{took * 1e3:.3f}', f'{traffic / took / copy:.2f}']
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = called(leaf, kernel, bias, name)
        grad = torch.ones_like(y)
        # The activation's backward also reads the saved output.
        extra = y.numel() * y.element_size() if 'lrelu' in op else 0
        took = seconds(
            partial(torch.autograd.grad, y, leaf, grad, retain_graph=True), device, opts.repeats
        )
        backward += [f'{took * 1e3:.3f}', f'{(traffic + extra) / took / copy:.2f}']
    kind = 'NHWC' if layout == torch.channels_last else 'NCHW'
    print_row([op, shape, dtype, kind, 'forward', *forward], opts.markdown)
    print_row([op, shape, dtype, kind, 'backward', *backward], opts.markdown)


def print_row(cells: Sequence[str], markdown: bool, head: bool = False) -> None:
    print('| ' + ' | '.join(cells) + ' |' if markdown else '\t'.join(cells))
    if head and markdown:
        print('|' + '---|' * len(cells))


if __name__ == '__main__':
    run(main)
