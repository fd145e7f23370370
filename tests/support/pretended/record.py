"""What is noted about a pretended GPU: whose each tensor is, faults, waits and operations."""

import collections
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
OWN = (f'{HERE}/', f'{HERE}_device.py')  # files of the pretence, no places of the project


class PretendedGPU:
    """What has happened since `clear`: Counters of descriptions and of operations.

    faults: what a GPU would refuse. waits: where the host waits for the device. operations: by
    name; views and empty tensors are none. places: operations by the project's line.
    """

    def __init__(self) -> None:
        self.faults, self.waits = collections.Counter(), collections.Counter()
        self.operations, self.places = collections.Counter(), collections.Counter()
        self._tags: dict[int, str | None] = {}
        self._pinned: set[int] = set()
        self.counting = True
        self.recorded: list | None = None  # operations since the capture of a graph began
        self.inside = 0  # PyTorch's own Python code below is to see the real device

    def clear(self) -> None:
        """Forgets what has been counted."""
        for counter in (self.faults, self.waits, self.operations, self.places):
            counter.clear()

    @property
    def n_waits(self) -> int:
        return self.waits.total()

    @property
    def n_operations(self) -> int:
        return self.operations.total()

    def tag(self, tensor: torch.Tensor) -> str | None:
        """'cuda', 'cpu', or None where it is not known."""
        try:
            return self._tags.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):
            return None

    def set_tag(self, tensor: torch.Tensor, value: str | None, *, pinned: bool = False) -> None:
        with contextlib.suppress(NotImplementedError, RuntimeError):
            key = tensor.untyped_storage()._cdata
            self._tags[key] = value
            (self._pinned.add if pinned else self._pinned.discard)(key)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def fault(self, what: str) -> None:
        if self.counting:
            self.faults[f'{what} at {_where()}'] += 1

    def wait(self, what: str) -> None:
        if self.counting:
            self.waits[f'{what} at {_where()}'] += 1

    def count(self, name: str) -> None:
        if self.counting:
            self.operations[name] += 1
            self.places[_where(1)] += 1

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Nothing is counted; tags are still followed."""
        before, self.counting = self.counting, False
        try:
            yield
        finally:
            self.counting = before

    def move(self, tensor: torch.Tensor, target: str, non_blocking: bool) -> torch.Tensor:
        """`tensor` on the 'cuda' or 'cpu' device, itself when it is there."""
        if (self.tag(tensor) or 'cpu') == target:
            return tensor
        if target == 'cpu' or not (non_blocking and self.is_pinned(tensor)):
            self.wait(f'copy {"from" if target == "cpu" else "to"} the GPU {tuple(tensor.shape)}')
        self.count('copy between devices')
        with self.silent():
            out = tensor.clone()
        self.set_tag(out, target)
        return out

    def report(self, title: str = '') -> str:
        """Everything as text, the most frequent first."""
        lines = [
            f'{title}: {len(self.faults)} faults, {self.n_waits} waits, '
            f'{self.n_operations} operations'
        ]
        for name in ('faults', 'waits', 'operations', 'places'):
            lines += [
                f'  {name[:-1]} {n:5d} x {what}' for what, n in getattr(self, name).most_common(25)
            ]
        return '\n'.join(lines)


def _where(depth: int = 3) -> str:
    """The innermost lines of the project that led here."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < depth:
        path = frame.f_code.co_filename
        if path.startswith(str(ROOT)) and not path.startswith(OWN):
            found.append(f'{path[len(str(ROOT)) + 1 :]}:{frame.f_lineno}')
        frame = frame.f_back
    return ' < '.join(found)
