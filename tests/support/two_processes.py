"""A script under torchrun, in one process and in two."""

import os
import subprocess
import sys
from pathlib import Path


def run_in_one_and_two(code: str, folder: Path) -> None:
    """Runs `code` under torchrun, in one process and in two at the same time, on the CPU.

    Its sys.argv[1] is `folder`/1 or `folder`/2, and it imports what this process can import.
    AssertionError, with what was printed, when one of them fails.
    """
    script = folder / 'run.py'
    script.write_text(f'import sys\nsys.path[:] = {sys.path!r}\n{code}', encoding='utf-8')
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    jobs = [
        subprocess.Popen(
            [*launch, f'--nproc_per_node={n}', str(script), str(folder / str(n))],
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg'},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for n in (1, 2)
    ]
    for job in jobs:
        output = job.communicate(timeout=900)[0]
        assert job.returncode == 0, output.decode()
