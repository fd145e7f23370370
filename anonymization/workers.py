"""Who computes what: fixed units of work on CPUs, so that their number changes no byte.

With more than one thread an operation sums in another order. So each operation gets one thread,
each unit (a photograph, a group) is computed alone, and the cores are kept busy by several units
at a time.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from anonymization.optimize import Group, GroupOptimizer, Result
from utils import distributed
from utils.errors import UserError
from utils.io import is_intact

log = logging.getLogger(__name__)

Item = TypeVar('Item')


class _Stopped(Exception):
    """Another unit failed, or the run was interrupted."""


@contextlib.contextmanager
def one_thread() -> Iterator[int]:
    """One thread for each operation of torch within the block; yields how many it had before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """With `wanted`, operations whose result does not vary between runs, or RuntimeError.

    cuBLAS also needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment, before its first use.
    """
    before = (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
    if wanted:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def each(
    function: Callable[[Item, Callable[[], None]], None], items: Iterable[Item], n: int
) -> None:
    """Calls function(item, check) for every item, `n` at a time; the first error ends all.

    items are taken as they are needed, one after another. `function` calls check() now and then,
    which raises when it is to give up because of an error elsewhere or an interruption.
    """
    if n == 1:
        for item in items:
            function(item, lambda: None)
        return
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise _Stopped

    with ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = set()
        try:
            for item in items:
                waiting.add(pool.submit(function, item, check))
                if len(waiting) >= n:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            for future in waiting:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def unfinished(files: Sequence[Path], context: str = '') -> list[int]:
    """The numbers of the files that are not there whole, made from `context` (utils.io.sealing).

    Each is looked at by one process; the same answer in all.
    """
    mine = range(distributed.rank(), len(files), distributed.world_size())
    found = distributed.all_gather_object([i for i in mine if not is_intact(files[i], context)])
    return sorted(i for part in found for i in part)


def memory(device: str | torch.device) -> int:
    """Bytes free in main memory for the CPU; of a card all it has, whatever is free just now."""
    device = torch.device(device)
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available


def run_within_memory(
    engine: GroupOptimizer, groups: list[Group], *, on_step: Callable[[int], None] | None = None
) -> Result:
    """engine.run(groups), in halves where the card's memory does not suffice."""
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        return engine.run(groups, on_step=on_step)
    torch.cuda.empty_cache()  # here, where no traceback holds the tensors any more
    if len(groups) == 1:
        raise UserError(
            'one group does not fit the memory of the card; use `precision` bf16, or `device` cpu'
        )
    half = len(groups) // 2
    log.warning('out of memory with %d groups; going on in halves', len(groups))
    parts = [
        run_within_memory(engine, part, on_step=on_step) for part in (groups[:half], groups[half:])
    ]
    return Result(
        torch.cat([p.ws for p in parts]),
        torch.cat([p.image for p in parts]),
        torch.cat([p.losses for p in parts], 1),
        torch.cat([p.centroid for p in parts]),
    )
