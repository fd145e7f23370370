"""Two checkouts timed in turn, and operations counted side by side."""

import argparse
from pathlib import Path

import pytest
from conftest import ROOT, load_script

from benchmarks.against import compare, told_elsewhere
from utils.errors import UserError

STEP = """
from pathlib import Path

def generator_step(opts, device):
    def step():
        with open({log!r}, 'a') as file:
            file.write({name!r})
    return step, 1, 1
"""


def checkout(folder: Path, log: Path) -> Path:
    """A folder with what is timed of a checkout: a step that writes the folder's name."""
    (folder / 'benchmarks').mkdir(parents=True)
    (folder / 'utils').symlink_to(ROOT / 'utils')
    (folder / 'benchmarks' / 'machine.py').symlink_to(ROOT / 'benchmarks' / 'machine.py')
    text = STEP.format(log=str(log), name=folder.name)
    (folder / 'benchmarks' / 'train_step.py').write_text(text, encoding='utf-8')
    return folder


def test_two_checkouts_take_turns(tmp_path: Path) -> None:
    log = tmp_path / 'log'
    this, other = (checkout(tmp_path / name, log) for name in 'ab')
    opts = argparse.Namespace(net='generator', steps=2, rounds=3, device='cpu', against=str(other))
    found = compare('train_step', opts, this)
    (took,) = found.values()
    assert list(found) == ['2 steps of the generator'] and len(took) == 2
    assert all(seconds >= 0 for side in took for seconds in side)
    warm_up, rounds = log.read_text()[:4], log.read_text()[4:]
    assert sorted(warm_up) == list('aabb') and rounds == 'bbaa' + 'aabb' + 'bbaa'
    (other / 'benchmarks' / 'train_step.py').write_text('raise SystemExit(1)')
    with pytest.raises(UserError, match='cannot be timed'):
        compare('train_step', opts, this)
    opts.against = str(tmp_path)
    with pytest.raises(UserError, match='no benchmarks/train_step.py'):
        compare('train_step', opts, this)


def test_a_program_runs_with_the_code_of_another_checkout(tmp_path: Path) -> None:
    program = tmp_path / 'program.py'
    program.write_text('import json, sys, there; print(json.dumps([there.NAME, sys.argv[1]]))')
    (tmp_path / 'other').mkdir()
    with pytest.raises(UserError, match='cannot be measured'):
        told_elsewhere(tmp_path / 'other', str(program), ['x'])
    (tmp_path / 'other' / 'there.py').write_text("NAME = 'other'")
    assert told_elsewhere(tmp_path / 'other', str(program), ['x']) == ['other', 'x']


def test_operations_stand_beside_those_of_another_checkout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    launches = load_script('launches', 'benchmarks')
    launches.main(['--size=32', '--parts', 'generator', f'--against={ROOT}'])
    row = capsys.readouterr().out.splitlines()[-1]
    name, waits_before, waits, before, now, change, _ = row.strip('| ').split(' | ') + ['']
    assert name == 'generator, fp16, mean of 16 steps' and change == '+0%'
    assert (waits_before, before) == (waits, now)
    assert float(waits) < 1 and 1000 < int(now.replace(',', '')) < 4000
