"""What the benchmarks measure about the machine itself."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; nothing to wait for on the CPU."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> float:
    """Seconds, after waiting for a GPU.

    On a CPU with one thread they are those of the process, which others on the machine do not
    lengthen (OMP_NUM_THREADS=1 on a shared machine); otherwise those of the wall clock.
    """
    synchronize(device)
    alone = device.type == 'cpu' and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def matrix_rate(device: torch.device, dtype: torch.dtype, n: int = 4096) -> float:
    """Operations per second of an n x n matrix product, best of ten."""
    n = n if device.type == 'cuda' else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float('inf')
    for _ in range(10):
        begin = clock(device)
        a @ b
        best = min(best, clock(device) - begin)
    return 2 * n**3 / best


class OperationCount(TorchDispatchMode):
    """Counts the operations of matrix products and convolutions run within it, in `total`.

    PyTorch's own counter also follows modules by hooks, which fail in a step that mixes passes
    with and without gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func.overloadpacket)
        if formula is None:
            with self:
                parts = func.decompose(*args, **kwargs)
                if parts is not NotImplemented:
                    return parts
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def describe(device: torch.device) -> str:
    """One line: the device and the version of torch."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == 'cuda'
        else (f'CPU, {torch.get_num_threads()} thread(s)')
    )
    return f'{name}, torch {torch.__version__}'


def print_rows(rows: Sequence[Sequence[str]], *, markdown: bool) -> None:
    """Prints rows, the first of which are the headings, as Markdown or separated by tabs."""
    for i, row in enumerate(rows):
        print('| ' + ' | '.join(row) + ' |' if markdown else '\t'.join(row))
        if i == 0 and markdown:
            print('|' + '---|' * len(row))
