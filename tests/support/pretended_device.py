"""A pretended GPU with real numbers: what a GPU would refuse or wait for, found without one.

Tensors stay on the CPU; their storages are tagged 'cuda' or 'cpu', and the tags followed through
every operation, backward passes included. The fused kernels are stood in for by their PyTorch
twins and count as one operation each.

    with pretended_gpu() as gpu:
        trainer = Trainer(..., device='cuda')
        gpu.clear()
        trainer.step()
    assert not gpu.faults and gpu.n_waits <= 2 and gpu.n_operations < 4000

As a program it runs a script, with small matrices for its measure of speed, and fails on faults:

    PYTHONPATH=. python tests/support/pretended_device.py SCRIPT ARGUMENTS

Not seen: speed, memory, races, pinned memory changed too early, cuDNN's own refusals.
"""

import contextlib
import runpy
import sys
from collections.abc import Iterator
from unittest import mock

import torch
from pretended.modes import Dispatch, Functions
from pretended.record import PretendedGPU
from pretended.stand_ins import patches


@contextlib.contextmanager
def pretended_gpu(kernels: object = None) -> Iterator[PretendedGPU]:
    """Inside, device='cuda' is a pretended GPU; yields what is noted about it.

    kernels: a library with the emulated kernels (cuda_emulation.py), in place of the stand-ins.
    """
    gpu = PretendedGPU()
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches(gpu, kernels):
            if hasattr(owner, name):  # benchmarks/launches.py counts older versions too
                stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(Functions(gpu))
        stack.enter_context(Dispatch(gpu))
        yield gpu


class _Event:
    """Of a GPU's clock, which stands still."""

    def __init__(self, **_: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def elapsed_time(self, _: '_Event') -> float:
        return 1.0


def run_script(path: str, arguments: list[str]) -> PretendedGPU:
    """Runs a script as a program on a machine with a pretended GPU."""
    from benchmarks.machine import matrix_rate
    from utils import cli

    def resolved(name: str) -> torch.device:
        cli.full_precision()
        return torch.device('cuda' if name == 'auto' else name)

    # PyTorch itself is not told: its optimisers would look for the driver.
    answers = {'device_count': 1, 'current_device': 0, 'get_device_name': 'pretended GPU'}
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(
                mock.patch.object(torch.cuda, name, lambda *_, answer=answer: answer)
            )
        stack.enter_context(mock.patch.object(cli, 'resolve_device', resolved))
        stack.enter_context(mock.patch.object(torch.cuda, 'Event', _Event))
        stack.enter_context(mock.patch.object(matrix_rate, '__defaults__', (64,)))
        stack.enter_context(mock.patch.object(sys, 'argv', [path, *arguments]))
        gpu = stack.enter_context(pretended_gpu())
        try:
            runpy.run_path(path, run_name='__main__')
        except SystemExit as end:
            if end.code:
                raise
    return gpu


if __name__ == '__main__':
    found = run_script(sys.argv[1], sys.argv[2:]).faults
    sys.exit('\n'.join(f'{n} x {what}' for what, n in found.items()) or 0)
