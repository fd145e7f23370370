"""The process group, beyond what the two-process tests of each training cover."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = f'''
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
'''


@pytest.mark.skipif(not Path('/proc/self/task').is_dir(), reason='lists threads in Linux\'s /proc')
def test_shutdown_ends_the_threads_of_the_group(tmp_path):
    """Threads that outlive it abort a finished run now and then while Python shuts down."""
    (tmp_path / 'program.py').write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
         str(tmp_path / 'program.py')], env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
