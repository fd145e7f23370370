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

# Process 1 is slow: it is not done with its first piece of work before the others are gone.
for _ in range(2):
    first, items = distributed.rank() == 1, distributed.handed_out('abcdefg')
    mine = [next(items)] if first else []
    distributed.barrier()
    mine += [] if first else list(items)
    distributed.barrier()
    assert not list(items)
    assert distributed.all_gather_object(mine) == [list('bcdefg'), ['a']]

rows = list(distributed.by_turns('abc', lambda name: (name, distributed.rank())))
assert rows == [('a', 0), ('b', 1), ('c', 0)]

weights = [torch.nn.Parameter(torch.zeros(2, 3, 4, 4)), torch.nn.Parameter(torch.zeros(3))]
for i, weight in enumerate(weights):
    weight.grad = torch.arange(weight.numel()).view(weight.shape).float() * (1 + distributed.rank())
weights[0].grad = weights[0].grad.to(memory_format=torch.channels_last)
distributed.average_gradients(weights)
for weight in weights:
    wanted = torch.arange(weight.numel()).view(weight.shape).float() * 1.5
    assert torch.equal(weight.grad, wanted)
distributed.shutdown()
names = [open(f'/proc/self/task/{{t}}/comm').read() for t in os.listdir('/proc/self/task')]
assert not [n for n in names if 'gloo' in n], names
"""


@pytest.mark.skipif(not Path('/proc/self/task').is_dir(), reason="lists threads in Linux's /proc")
def test_two_processes_share_work_and_end_the_threads_of_the_group(tmp_path):
    """Threads that outlive the group abort a finished run now and then while Python shuts down."""
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
