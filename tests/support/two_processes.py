"""Code in several processes that compute together, as torchrun starts them, and in one."""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fresh_process import start_fresh

_HANGS_AFTER = 900  # seconds


class Together:
    """target(*arguments), picklable, in n processes with the environment of torchrun, on the CPU.

    They import what this process can import; `output` is where they print.
    """

    def __init__(
        self, n: int, output: Path, target: Callable[..., Any], *arguments: Any, threads: int = 1
    ) -> None:
        port = free_port()
        self.output = output
        output.touch()
        self._processes = [
            start_fresh(_join, rank, n, port, output, threads, target, arguments)
            for rank in range(n)
        ]

    def wait(self) -> None:
        """AssertionError, with what was printed, when one of them fails."""
        for process in self._processes:
            process.join(_HANGS_AFTER)
        codes = [process.exitcode for process in self._processes]
        for process in self._processes:
            process.kill()
        assert not any(codes) and None not in codes, f'{codes}\n{self.output.read_text()}'


def run_together(n: int, output: Path, target: Callable[..., Any], *arguments: Any) -> None:
    """Starts them and waits, see `Together`."""
    Together(n, output, target, *arguments).wait()


def run_in_one_and_two(code: str, folder: Path) -> None:
    """Runs `code` in one process and in two at the same time; sys.argv[1] is `folder`/1 or /2."""
    jobs = [Together(n, folder / f'{n}.log', run_code, code, str(folder / str(n))) for n in (1, 2)]
    for job in jobs:
        job.wait()


def run_code(code: str, *arguments: str) -> None:
    """As a script with these arguments."""
    sys.argv[1:] = arguments
    exec(compile(code, 'run.py', 'exec'), {'__name__': '__main__', 'sys': sys})


def free_port() -> int:
    """A port of this machine at which processes can meet."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return free.getsockname()[1]


def become_rank(rank: int, n: int, port: int) -> None:
    """Gives this process the environment in which torchrun starts one of n."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(n),
        MASTER_ADDR='localhost',
        MASTER_PORT=str(port),
    )


def _join(
    rank: int,
    n: int,
    port: int,
    output: Path,
    threads: int,
    target: Callable[..., Any],
    arguments: tuple,
) -> None:
    become_rank(rank, n, port)
    os.environ['MPLBACKEND'] = 'Agg'
    with output.open('a') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    sys.exit(target(*arguments))
