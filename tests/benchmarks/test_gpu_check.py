"""The checks for a machine with a GPU, as far as they can be checked without one."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def check(out: Path, python: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ['bash', 'benchmarks/gpu_check.sh', str(out)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, 'PYTHON': python, 'TOY': '1'},
        check=False,
    )


def test_failures_are_counted_and_what_passed_is_not_run_again(tmp_path: Path) -> None:
    program = tmp_path / 'program'
    program.write_text(
        '#!/bin/sh\necho "$@" >> "$0.log"\necho "1.0 s/kimg"\n'
        'case "$*" in *ops.py*) [ -e "$0.fixed" ];; esac\n',
        encoding='utf-8',
    )
    program.chmod(0o755)
    first = check(tmp_path / 'out', str(program))
    assert first.returncode == 1 and 'failed: ops' in first.stdout, first.stderr
    calls = (tmp_path / 'program.log').read_text(encoding='utf-8').splitlines()
    assert calls[0].startswith('benchmarks/anonymise.py') and len(calls) == len(set(calls)) > 8
    table = (tmp_path / 'out' / 'table.md').read_text(encoding='utf-8').splitlines()
    assert len(table) == 2 + len(calls) and table[3].count('1.0 s/kimg | 0 exit, ') == 1
    (tmp_path / 'program.fixed').touch()
    again = check(tmp_path / 'out', str(program))
    assert again.returncode == 0 and 'all passed' in again.stdout, again.stderr
    more = (tmp_path / 'program.log').read_text(encoding='utf-8').splitlines()[len(calls) :]
    assert len(more) == 1 and 'ops.py' in more[0]
    assert (tmp_path / 'out' / 'table.md').read_text(encoding='utf-8').count('| 0 exit, ') == len(
        calls
    )


def test_the_bandwidth_benchmark_runs_on_a_pretended_gpu() -> None:
    done = subprocess.run(
        [
            sys.executable,
            'tests/support/pretended_device.py',
            'benchmarks/ops.py',
            '--shapes=1x4x8x8',
            '--repeats=1',
            '--no_compile',
            '--dtypes=fp16',
            '--device=cuda',
            '--markdown',
        ],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert 'pretended GPU' in done.stdout and done.stdout.count('| blur |') == 4
    assert 'cuda ms' in done.stdout
