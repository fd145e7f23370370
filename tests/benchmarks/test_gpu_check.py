"""The checks for a machine with a GPU, as far as they can be checked without one."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, load_script
from pretended_device import run_script


def script(out: Path, python: str) -> tuple[list[str], dict[str, Any]]:
    """The command of the check, and how to start it."""
    how = {'cwd': ROOT, 'env': {**os.environ, 'PYTHON': python, 'TOY': '1'}, 'text': True}
    return ['bash', 'benchmarks/gpu_check.sh', str(out)], how


def check(out: Path, python: str) -> subprocess.CompletedProcess[str]:
    command, how = script(out, python)
    return subprocess.run(command, **how, capture_output=True, check=False)


def stand_in(path: Path, text: str) -> Path:
    """A program in place of Python that notes its arguments in `path`.log and does `text`."""
    path.write_text(f'#!/bin/sh\necho "$@" >> "$0.log"\n{text}\n', encoding='utf-8')
    path.chmod(0o755)
    return path


def calls(program: Path) -> list[str]:
    return program.with_name(f'{program.name}.log').read_text(encoding='utf-8').splitlines()


def test_failures_are_counted_and_what_passed_is_not_run_again(tmp_path: Path) -> None:
    program = stand_in(
        tmp_path / 'program', 'echo "1.0 s/kimg"; case "$*" in *ops.py*) [ -e "$0.fixed" ];; esac'
    )
    first = check(tmp_path / 'out', str(program))
    assert first.returncode == 1 and 'failed: ops' in first.stdout, first.stderr
    begun = calls(program)
    assert begun[0].startswith('benchmarks/anonymise.py') and len(begun) == len(set(begun)) > 8
    table = (tmp_path / 'out' / 'table.md').read_text(encoding='utf-8').splitlines()
    assert len(table) == 2 + len(begun) and table[3].count('1.0 s/kimg | 0 exit, ') == 1
    (tmp_path / 'program.fixed').touch()
    again = check(tmp_path / 'out', str(program))
    assert again.returncode == 0 and 'all passed' in again.stdout, again.stderr
    more = calls(program)[len(begun) :]
    assert len(more) == 1 and 'ops.py' in more[0]
    table = (tmp_path / 'out' / 'table.md').read_text(encoding='utf-8')
    assert table.count('| 0 exit, ') == len(begun) and table in again.stdout


def test_an_interrupted_check_stops_its_command_and_goes_on_later(tmp_path: Path) -> None:
    program = stand_in(
        tmp_path / 'program',
        'case "$*" in *ops.py*) [ -e "$0.fixed" ] || '
        '{ echo $$ > "$0.pid"; exec sleep 600; };; esac',
    )
    command, how = script(tmp_path / 'out', str(program))
    running = subprocess.Popen(command, **how, stdout=subprocess.DEVNULL)
    pid_file = tmp_path / 'program.pid'
    while not (pid_file.exists() and pid_file.read_text().endswith('\n')):
        assert running.poll() is None
        time.sleep(0.05)
    begun = calls(program)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 143
    for _ in range(600):  # the signal is passed on, and not waited for
        if not psutil.pid_exists(int(pid_file.read_text())):
            break
        time.sleep(0.1)
    assert not psutil.pid_exists(int(pid_file.read_text()))
    (tmp_path / 'program.fixed').touch()
    again = check(tmp_path / 'out', str(program))
    assert again.returncode == 0, again.stderr
    more = calls(program)[len(begun) :]
    assert 'ops.py' in more[0] and not set(more[1:]) & set(begun)


def test_every_command_of_the_check_is_understood(tmp_path: Path) -> None:
    program = stand_in(tmp_path / 'program', '')
    assert check(tmp_path / 'out', str(program)).returncode == 0
    commands = [command.split() for command in calls(program)]
    assert len(commands) > 10
    for path, *arguments in commands:
        load_script(Path(path).stem, Path(path).parent.name).build_parser().parse_args(arguments)


@pytest.mark.parametrize('name', ['ops', 'step', 'cluster'])
def test_commands_of_the_check_run_on_a_pretended_gpu(name: str, tmp_path: Path) -> None:
    program = stand_in(tmp_path / 'program', '')
    check(tmp_path / 'out', str(program))
    path, *arguments = next(
        c for c in calls(program) if c.startswith(f'benchmarks/{name}.py')
    ).split()
    assert not run_script(path, arguments).faults
