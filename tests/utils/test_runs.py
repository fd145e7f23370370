"""The record of a run and the guards around its folder."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from utils.errors import UserError
from utils.runs import add_continuation, hold_run, run_record, start_run

_HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
from utils.runs import hold_run
hold_run(sys.argv[2])
print('held', flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time(tmp_path):
    run_dir = tmp_path / 'run'
    other = subprocess.Popen(
        [sys.executable, '-c', _HOLDER, str(ROOT), str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout.readline() == b'held\n'
    for enter in (hold_run, lambda d: start_run(d, run_record({}))):
        with pytest.raises(UserError, match='another process is working in'):
            enter(run_dir)
    assert not (run_dir / 'options.json').exists()
    other.kill()  # as after kill -9, nothing has to be tidied up
    other.communicate()
    start_run(run_dir, run_record({}))
    hold_run(run_dir)  # the holder itself may ask again


_WRITER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from utils.io import atomic_path
with atomic_path(sys.argv[2]) as temp:
    temp.write_text('photographs')
    if sys.argv[3] == 'killed':
        os.kill(os.getpid(), signal.SIGKILL)
    print('writing', flush=True)
    sys.stdin.read()
"""


def test_leftovers_of_killed_processes_are_removed_with_the_lock(tmp_path):
    run_dir = tmp_path / 'run'
    command = [sys.executable, '-c', _WRITER, str(ROOT)]
    assert subprocess.run([*command, str(run_dir / 'options.json'), 'killed']).returncode == -9
    assert subprocess.run([*command, str(run_dir / 'states/s.pt'), 'killed']).returncode == -9
    other = subprocess.Popen(
        [*command, str(run_dir / 'states/t.pt'), 'alive'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout.readline() == b'writing\n'
    (run_dir / '.notes.tmp').write_text('not of this tool')
    with pytest.raises(UserError, match='not empty'):
        start_run(run_dir, run_record({}))
    (run_dir / '.notes.tmp').rename(run_dir / 'states' / '.notes.tmp')
    (run_dir / 'states').rename(tmp_path / 'states')
    # A folder that holds only the tool's own temporary files is the tool's.
    assert not start_run(run_dir, run_record({}))
    assert sorted(p.name for p in run_dir.iterdir()) == ['.lock', 'options.json']
    hold_run(tmp_path)
    left = [p.name for p in (tmp_path / 'states').iterdir()]
    assert len(left) == 2 and '.notes.tmp' in left
    assert any(name.startswith('.t.') for name in left)  # its writer lives
    other.communicate()


@pytest.mark.parametrize(
    'text',
    [
        '',
        '{',
        '[]',
        'null',
        '{"options": []}',
        '[' * 100_000,
        '{"options": {}, "inputs": 7}',
        '\x00\x01',
    ],
)
def test_damaged_records_are_named(text, tmp_path):
    (tmp_path / 'options.json').write_text(text)
    for use in (
        lambda: start_run(tmp_path, run_record({}), resume=True),
        lambda: add_continuation(tmp_path, []),
    ):
        with pytest.raises(UserError, match='options.json is not'):
            use()


def test_record_and_its_guards(tmp_path):
    run_dir = tmp_path / 'run'
    (tmp_path / 'input').write_text('x')
    record = run_record({'k': 5, 'workers': 1}, inputs={'file': tmp_path / 'input'}, seed=3)
    assert not start_run(run_dir, record)
    with pytest.raises(UserError, match='already holds a run; --again goes on'):
        start_run(run_dir, record, resume_flag='--again')
    assert start_run(
        run_dir,
        run_record({'k': 5, 'workers': 2}, seed=3, inputs={'file': tmp_path / 'input'}),
        resume=True,
        free_options=('workers',),
    )
    (tmp_path / 'input').write_text('y')
    with pytest.raises(UserError, match='k: was 5, now 6.*file: was'):
        start_run(
            run_dir,
            run_record({'k': 6, 'workers': 1}, seed=3, inputs={'file': tmp_path / 'input'}),
            resume=True,
        )
    add_continuation(run_dir, ['--more'], step=7)
    found = json.loads((run_dir / 'options.json').read_text())
    assert found['options']['k'] == 5
    assert found['continued'][0]['flags'] == ['--more'] and found['continued'][0]['step'] == 7
    (tmp_path / 'strange').mkdir()
    (tmp_path / 'strange' / 'holiday.jpg').write_text('')
    with pytest.raises(UserError, match='not empty'):
        start_run(tmp_path / 'strange', record)
