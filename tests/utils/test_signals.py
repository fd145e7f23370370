"""Signals reach the processes of a launcher, and command lines end in good order."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from utils.signals import run_launcher

WORKER = """
import pathlib, signal, sys, time
def stop(number, frame):
    pathlib.Path(sys.argv[1], 'stopped').write_text(str(number))
    sys.exit(0)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1], 'ready').touch()
time.sleep(60)
"""
LAUNCHER = (
    'import subprocess, sys\nsys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)'
)


def wait_for(path, seconds=30):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f'{path} never came'
        time.sleep(0.05)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_launcher_passes_signals_to_what_it_started(tmp_path, number):
    (tmp_path / 'worker.py').write_text(WORKER)

    def send():
        wait_for(tmp_path / 'ready')
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    before = signal.getsignal(number)
    code = run_launcher(
        [sys.executable, '-c', LAUNCHER, str(tmp_path / 'worker.py'), str(tmp_path)]
    )
    assert code == 128 + number and signal.getsignal(number) is before
    assert (tmp_path / 'stopped').read_text() == str(int(number))


def test_launcher_returns_the_exit_code():
    assert run_launcher([sys.executable, '-c', 'raise SystemExit(3)']) == 3


@pytest.mark.parametrize(
    'body,code,said',
    [
        (
            "open(sys.argv[1] + '/file', 'w').close(); open(sys.argv[1] + '/file/x', 'w')",
            2,
            'file/x: Not a directory; choose another path',
        ),
        ('os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)', 143, ''),
    ],
)
def test_scripts_clean_up_and_say_why(tmp_path, body, code, said):
    program = (
        f'import os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n'
        'from utils import cli, io\n'
        'def main():\n'
        '    with io.atomic_path(sys.argv[1] + "/whole"):\n'
        f'        {body}\n'
        'cli.run(main)\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', program, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == code and said in done.stderr and 'Traceback' not in done.stderr
    assert not list(tmp_path.glob('.whole*')) and not (tmp_path / 'whole').exists()


LOADING = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from utils.signals import leave_signals_to_parent, stop_on_signal

with stop_on_signal() as stopped:
    loader = torch.utils.data.DataLoader(range(400), batch_size=4, num_workers=2,
                                         worker_init_fn=leave_signals_to_parent)
    for i, batch in enumerate(loader):
        if i == 5:
            os.killpg(0, getattr(signal, sys.argv[1]))
    assert stopped() and i == 99
"""


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
def test_loading_processes_outlive_a_signal_to_the_group(name: str) -> None:
    """What a terminal's Ctrl-C, `timeout` and schedulers send reaches them too."""
    done = subprocess.run(
        [sys.executable, '-c', LOADING, name],
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
