"""The process group, beyond what the two-process tests of each training cover."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils import distributed

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from utils import distributed

distributed.init('cpu')
import torch.distributed.nn.functional
assert distributed.all_reduce_sum(torch.ones(3)).tolist() == [2, 2, 2]
distributed.shutdown()
names = [open(f'/proc/self/task/{{t}}/comm').read() for t in os.listdir('/proc/self/task')]
assert not [n for n in names if 'gloo' in n], names
"""


@pytest.mark.skipif(not Path('/proc/self/task').is_dir(), reason="lists threads in Linux's /proc")
def test_shutdown_ends_the_threads_of_the_group(tmp_path):
    """Threads that outlive it abort a finished run now and then while Python shuts down."""
    (tmp_path / 'program.py').write_text(PROGRAM)
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            str(tmp_path / 'program.py'),
        ],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    'message,lost',
    [
        ('[/pytorch/third_party/gloo/pair.cc:537] Connection closed by peer [127.0.0.1]:1', True),
        ('shapes do not match', False),
    ],
)
def test_a_lost_process_is_told_from_a_fault(
    monkeypatch: pytest.MonkeyPatch, message: str, lost: bool
) -> None:
    assert not distributed.lost_peer(RuntimeError(message))  # without a group there is no peer
    monkeypatch.setattr(distributed.dist, 'is_initialized', lambda: True)
    assert distributed.lost_peer(RuntimeError(message)) is lost
    assert not distributed.lost_peer(ValueError(message))


LEAVING = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import os, torch
import torch.distributed as dist
from utils import cli, distributed

def main():
    distributed.init('cpu')
    group = dist.distributed_c10d._get_default_group()
    assert group._get_backend(torch.device('cpu')).options._timeout == distributed.TIMEOUT
    distributed.barrier()
    if distributed.rank() == 1:
        os._exit(0)    # as if killed, but torchrun leaves the others alone
    distributed.all_reduce_sum(torch.ones(3))
cli.run(main)
"""


def test_the_end_of_another_process_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / 'program.py').write_text(LEAVING)
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            str(tmp_path / 'program.py'),
        ],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert 'error: another process of this run has ended' in done.stderr, done.stderr
    assert 'RuntimeError' not in done.stderr
