"""How every training stops: in good order, when a person, a scheduler or a time limit asks.

The step under way is finished, a state that goes on exactly is saved, and the exit code is the
signal's (128 + number), or 0 under torchrun, which would report another as a crash. All processes
stop after the same step. Loading processes leave signals to the training (utils.signals).
"""

import time
from collections.abc import Callable

import torch

from utils import distributed
from utils.signals import StopRequest


class Stopping:
    """Asked after every step in all processes: whether any of them is to stop.

    requested: this process's own wish, such as a `StopRequest`. max_minutes: time from now on.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        requested: Callable[[], bool] | None = None,
        max_minutes: float | None = None,
    ) -> None:
        self.device, self.requested = device, requested
        self.limit = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def wished(self) -> bool:
        """Whether this process is to stop."""
        late = self.limit is not None and time.monotonic() > self.limit
        return late or (self.requested is not None and self.requested())

    def __call__(self) -> bool:
        return distributed.any_process(self.wished(), self.device)


def finish(request: StopRequest) -> int:
    """Leaves the process group and returns the exit code of a training."""
    alone = distributed.world_size() == 1
    distributed.shutdown()
    return 128 + request.number if request() and alone else 0
