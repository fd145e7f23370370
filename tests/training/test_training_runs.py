"""Every training is stopped in every way, goes on, and ends as one that nothing disturbed.

A cell is a training, a signal to its whole process group (as `timeout`, SLURM or a terminal send
it) in the middle of a step, loading processes, and processes that train together. Graders and the
pair attack hold their pictures in memory and train in one process, so they have no cells with
loading processes, nor with two processes.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT
from toy_trainings import STEPS, Stop, Toy, make_inputs, play, toys

from utils.io import load_weights

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)


class Cell(NamedTuple):
    name: str
    number: signal.Signals
    workers: int
    processes: int


CELLS = [
    Cell(name, number, workers, processes)
    for name, toy in toys().items()
    for number in SIGNALS
    for workers in ((0, 2) if toy.loads and name != 'e4e' else (0,))
    for processes in ((1, 2) if not toy.alone and name != 'e4e' else (1,))
]
Runner = Callable[[str, int], Path]


@pytest.fixture(scope='module')
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_inputs(tmp_path_factory.mktemp('inputs') / 'all')


def flags_of(toy: Toy, folder: Path, inputs: dict[str, str]) -> list[str]:
    return [toy.folder, str(folder), *(flag.format(**inputs) for flag in toy.flags)]


def steps_of(path: Path) -> int:
    """The steps done in a state, whatever it calls them."""
    state = load_weights(path)
    if 'history' in state:
        return len(state['history'])
    return next(state[key] for key in ('n_steps', 'step', 'epoch') if key in state)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, str]) -> Runner:
    """undisturbed(name, processes) -> the folder of a run that nothing disturbed."""
    done: dict[tuple[str, int], Path] = {}

    def run(name: str, processes: int) -> Path:
        if (name, processes) not in done:
            folder = tmp_path_factory.mktemp(name) / 'whole'
            flags = flags_of(toys()[name], folder, inputs)
            assert play(name, flags, processes=processes) == 0
            done[name, processes] = folder
        return done[name, processes]

    return run


def assert_same(a: object, b: object, where: str = '') -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f'{where}/{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f'{where}/{i}')
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b or a != a, where


@pytest.mark.parametrize(
    'cell',
    CELLS,
    ids=lambda c: f'{c.name}-{c.number.name}-{c.workers}workers-{c.processes}processes',
)
def test_stopped_and_gone_on_is_undisturbed(
    cell: Cell, undisturbed: Runner, inputs: dict[str, str], tmp_path: Path
) -> None:
    toy, folder = toys()[cell.name], tmp_path / 'stopped'
    killed = cell.number == signal.SIGKILL
    done = 3 if killed else 2  # steps when the signal comes
    settings = {'workers': cell.workers, 'processes': cell.processes}
    flags = flags_of(toy, folder, inputs)
    code = play(cell.name, flags, **settings, stop=Stop(cell.number, done))
    saved = max(steps_of(path) for path in folder.glob(toy.states))
    if killed:
        assert code == -signal.SIGKILL
        assert done - toy.interval < saved <= done
    else:
        assert code == (0 if cell.processes > 1 else 128 + cell.number)
        assert saved == done + 1 < STEPS
    again = toy.again(folder)
    assert play(cell.name, again if toy.folder == '--outdir' else [*flags, *again], **settings) == 0
    whole = undisturbed(cell.name, cell.processes)
    results = [path.relative_to(whole) for path in whole.glob(toy.result)]
    assert results
    for result in results:
        (stopped,) = folder.glob(str(result))
        assert_same(load_weights(whole / result), load_weights(stopped), str(result))


def test_torchrun_hands_the_signal_on(inputs: dict[str, str], tmp_path: Path) -> None:
    """What a scheduler sends to the command reaches the processes that torchrun has started."""
    toy, folder = toys()['generator'], tmp_path / 'stopped'
    command = [str(ROOT / 'scripts/train_stylegan2_ada.py'), *flags_of(toy, folder, inputs)]
    with subprocess.Popen(
        [sys.executable, *command, '--kimg=1000', '--gpus=2', '--device=cpu'],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
        stderr=subprocess.PIPE,
    ) as process:
        while not list(folder.glob(toy.states)):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.terminate()
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    steps = max(steps_of(path) for path in folder.glob(toy.states))
    length = f'--kimg={(steps + 1) * 0.004}'
    assert play('generator', [*toy.again(folder), length], processes=2) == 0
    whole = tmp_path / 'whole'
    assert play('generator', [*flags_of(toy, whole, inputs), length], processes=2) == 0
    name = f'*/network-snapshot-{(steps + 1) * 0.004:09.3f}.pt'
    (one,), (two,) = whole.glob(name), folder.glob(name)
    assert_same(load_weights(one), load_weights(two))
