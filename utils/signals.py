"""Stopping in good order when a person (Ctrl-C) or a scheduler (SIGTERM) asks for it."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME_SIGNAL = 3.0  # seconds


class StopRequest:
    """Calling it tells whether a stop was asked for; `number` is the signal's, or None."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.time = 0.0

    def __call__(self) -> bool:
        return self.number is not None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Yields a StopRequest that the first SIGINT or SIGTERM sets; a later one acts as usual.

    Within `_SAME_SIGNAL` seconds it counts as the same: launchers such as torchrun pass on what
    a terminal's Ctrl-C has sent to all processes already. Outside the main thread, where no
    handler can be set, the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        if request.number is None:
            request.number, request.time = number, time.monotonic()
        elif time.monotonic() - request.time > _SAME_SIGNAL:
            restore()
            os.kill(os.getpid(), number)

    for number in _SIGNALS:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        restore()


def leave_signals_to_parent(worker: int) -> None:
    """`worker_init_fn` of loaders: the process ignores SIGINT and SIGTERM.

    A terminal's Ctrl-C and a scheduler's SIGTERM go to the whole process group, and the last step
    of a training that stops in good order still needs its loading processes. They end with it.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def run_launcher(command: Sequence[str]) -> int:
    """Runs a launcher such as torchrun to its end; returns its exit code.

    SIGINT and SIGTERM go to the processes it has started, which then stop in good order, while the
    launcher itself would answer with a traceback; the exit code is then the signal's, 128 + number.
    """
    received = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        for target in psutil.Process(process.pid).children() or [process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                target.send_signal(number)

    # In a session of its own a terminal's Ctrl-C reaches it once, through here.
    with subprocess.Popen(command, start_new_session=True) as process:
        before = {number: signal.signal(number, forward) for number in _SIGNALS}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 128 + received[0] if received else code


def start_processes(n: int, script: str | Path, argv: Sequence[str]) -> int:
    """Runs a script under torchrun with `n` processes on this machine; returns its exit code."""
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    return run_launcher(
        [*torchrun, f'--nproc_per_node={n}', '--', str(Path(script).resolve()), *argv]
    )
