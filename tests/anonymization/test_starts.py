"""Starting, stopping and going on: folders that are not what they should be, and Ctrl-C."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from conftest import ROOT, load_script
from release_fixture import arguments, save_networks, save_photographs, tree_bytes

from anonymization import pipeline
from utils.errors import UserError

k_salsa = load_script('k-SALSA')
dataset_tool, verify_release = load_script('dataset_tool'), load_script('verify_release')


@pytest.fixture
def inputs(tmp_path):
    save_networks(tmp_path)
    save_photographs(tmp_path / 'data', 11)
    return tmp_path


def command(folder, exp_dir=None, **options):
    return arguments(folder, folder / 'data', exp_dir or folder / 'run', **options)


@pytest.fixture
def no_work(monkeypatch):
    """Computing anything is an error."""
    monkeypatch.delattr(pipeline, 'invert_all')


def test_killed_in_the_first_second(inputs):
    private = inputs / 'run/private'
    private.mkdir(parents=True)
    (private / '.lock').touch()
    (private / '.options.a1b2c3d4.tmp').write_text('{')
    assert k_salsa.main(command(inputs)) == 0
    assert not list(private.rglob('.*.tmp'))


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{"options": ', 'options.json is not a readable run record'),
        ('[]', 'options.json is not the record of a run'),
        (None, 'put its options.json back'),
    ],
)
def test_damaged_record(inputs, no_work, text, message):
    private = inputs / 'run/private'
    private.mkdir(parents=True)
    (private / 'latents.npy').touch()
    if text is not None:
        (private / 'options.json').write_text(text)
    with pytest.raises(UserError, match=message):
        k_salsa.main(command(inputs))


def test_a_finished_run_is_looked_at_before_it_is_called_complete(inputs):
    assert k_salsa.main(command(inputs)) == 0
    release = inputs / 'run/release'
    before = tree_bytes(release)
    picture = next((release / 'images').iterdir())
    picture.write_bytes(picture.read_bytes()[:-5])
    with pytest.raises(UserError, match=f'1 of its files are damaged(.|\n)*{picture.name}'):
        k_salsa.main(command(inputs))
    (release / 'manifest.json').unlink()
    with pytest.raises(UserError, match='no finished release'):
        k_salsa.main(command(inputs))
    release.rename(inputs / 'aside')
    assert k_salsa.main(command(inputs)) == 0
    assert tree_bytes(release) == before


def test_other_files_in_the_release_folder(inputs, no_work):
    (inputs / 'run/release').mkdir(parents=True)
    (inputs / 'run/release/notes.txt').write_text('mine')
    with pytest.raises(UserError, match='no finished release'):
        k_salsa.main(command(inputs))
    assert not (inputs / 'run/private').exists()


@pytest.mark.parametrize('place', ['', 'results/k5'])
def test_results_among_the_photographs(inputs, no_work, place):
    with pytest.raises(UserError, match='lies in --data_path'):
        k_salsa.main(command(inputs, exp_dir=inputs / 'data/images' / place))
    assert not (inputs / 'data/images/private').exists()


def test_nothing_is_written_into_a_release(inputs, no_work, tmp_path):
    release = tmp_path / 'other/release'
    release.mkdir(parents=True)
    (release / 'manifest.json').write_text('{"format": "k-salsa-release-5"}')
    with pytest.raises(UserError, match='--exp_dir .*/images/x lies in the release'):
        k_salsa.main(command(inputs, exp_dir=release / 'images/x'))
    with pytest.raises(UserError, match='--dest .* lies in the release'):
        dataset_tool.main(
            [
                '--source',
                str(inputs / 'data/images'),
                '--dest',
                str(release / 'a.zip'),
                '--width',
                '64',
            ]
        )
    with pytest.raises(UserError, match='--out .* lies in the release'):
        verify_release.main([str(release), '--out', str(release / 'verdict.json')])
    assert [p.name for p in release.iterdir()] == ['manifest.json']


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='needs /proc')
def test_a_folder_that_cannot_be_made(inputs, no_work):
    with pytest.raises(UserError, match='--exp_dir /proc/x cannot be made'):
        k_salsa.main(command(inputs, exp_dir='/proc/x'))


def test_nobody_else_reads_private_files(inputs):
    before = os.umask(0)
    try:
        assert k_salsa.main([*command(inputs), '--centroids', '--save_reconstructions']) == 0
    finally:
        os.umask(before)
    modes = {
        p: stat.S_IMODE(p.stat().st_mode)
        for p in (inputs / 'run/private').rglob('*')
        if p.name != '.lock'
    }
    assert any(p.parent.name == 'reconstructions' for p in modes)
    assert [p for p, mode in modes.items() if mode & 0o077] == []
    assert all(p.stat().st_mode & 0o044 for p in (inputs / 'run/release').rglob('*'))


@pytest.mark.parametrize(
    'flag', ['--lr=1e39', '--style_weight=1e39', '--content_weight=-1', '--lr=nan']
)
def test_numbers_that_float32_cannot_hold(inputs, no_work, capsys, flag):
    with pytest.raises(SystemExit):
        k_salsa.main([*command(inputs), flag])
    assert 'is not' in capsys.readouterr().err.splitlines()[-1]


def test_ctrl_c_is_one_line(inputs):
    """In a terminal it reaches the loading processes and threads too."""
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / 'scripts/k-SALSA.py'),
            *command(inputs, num_steps=4000, test_workers=1, group_batch=4),
        ],
        env={**os.environ, 'OMP_NUM_THREADS': '2'},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (inputs / 'run/private/groups.csv.sha256').exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    text = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert 'Traceback' not in text and text.strip().splitlines()[-1].startswith('interrupted')
