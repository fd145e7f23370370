"""The batches of a training: a function of (seed, step), for every process and loading process."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from utils import distributed
from utils.images import from_uint8
from utils.seeds import numpy_generator
from utils.signals import leave_signals_to_parent


class StepSampler(Sampler[list]):
    """This process's batches of dataset items for steps `start`, `start` + 1, ... without end.

    A function of (seed, step) alone, so that a run that goes on sees what the undisturbed one
    would have seen. Every epoch is a fresh permutation of the `n` items. A step takes
    `batch_size` of them, in passes of `pass_size`; pass m goes to process m % processes, so that
    the items of a step do not depend on the processes. pass_size None: one pass per process.
    whole_batches: what is left after an epoch's last full batch waits for a later one; otherwise
    it opens the next epoch's first batch. mirror: None yields indices; otherwise items are
    (index, mirrored), with half of them mirrored when it is true.
    """

    def __init__(
        self,
        n: int,
        *,
        batch_size: int,
        seed: int,
        pass_size: int | None = None,
        start: int = 0,
        whole_batches: bool = True,
        mirror: bool | None = None,
    ) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.pass_size = pass_size or batch_size // distributed.world_size()
        self.start, self.whole_batches, self.mirror = start, whole_batches, mirror
        # Taken here: loaders may ask for batches where there is no process group.
        self.rank, self.world = distributed.rank(), distributed.world_size()

    def __iter__(self) -> Iterator[list]:
        epoch, order = -1, []
        for step in itertools.count(self.start):
            first = self._first(step)
            items = []
            for place in range(first, first + self.batch_size):
                if place // self.n != epoch:
                    epoch = place // self.n
                    order = self._epoch(epoch)
                items.append(order[place % self.n])
            passes = range(0, self.batch_size, self.pass_size)
            for number in passes[self.rank :: self.world]:
                yield items[number : number + self.pass_size]

    def _first(self, step: int) -> int:
        """Where the batch of a step begins in the sequence of all epochs."""
        if not self.whole_batches:
            return step * self.batch_size
        epoch, number = divmod(step, self.n // self.batch_size)
        return epoch * self.n + number * self.batch_size

    def _epoch(self, epoch: int) -> list:
        draw = numpy_generator(self.seed, 'epoch', epoch)
        order = draw.permutation(self.n).tolist()
        if self.mirror is None:
            return order
        flips = draw.random(self.n) < (0.5 if self.mirror else 0)
        return [(i, bool(flips[i])) for i in order]


class Batches:
    """Pictures for a training's steps; `next()` gives the next pass, [N, 3, S, S] in [-1, 1].

    dataset: of uint8 pictures [3, S, S], or tuples that begin with one. Loading begins with the
    first `next()`. workers: loading processes, which leave signals to the training.
    """

    def __init__(
        self, dataset: Dataset, sampler: StepSampler, *, device: torch.device, workers: int = 0
    ) -> None:
        self.dataset, self.sampler, self.device = dataset, sampler, device
        self.workers = workers
        self._loaded: Iterator[Any] | None = None

    def __next__(self) -> Tensor:
        if self._loaded is None:
            self._loaded = iter(
                DataLoader(
                    self.dataset,
                    batch_sampler=self.sampler,
                    num_workers=self.workers,
                    pin_memory=self.device.type == 'cuda',
                    worker_init_fn=leave_signals_to_parent,
                )
            )
        found = next(self._loaded)
        pictures = found[0] if isinstance(found, (list, tuple)) else found
        return from_uint8(pictures.to(self.device, non_blocking=True))
