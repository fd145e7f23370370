"""All stages, trainings included, at toy size: killed in the training, resumed, same release."""

import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, load_script

from datasets.phantoms.dataset import make_dataset


def flags(data, out):
    return [
        f'--photos={data / "images"}',
        f'--labels={data / "labels.csv"}',
        f'--out_dir={out}',
        '--size=64',
        '--k=3',
        '--steps=4',
        '--release_steps=2',
        '--held_out=0.3',
        '--device=cpu',
        '--force',
    ]


def release_files(out):
    (folder,) = out.glob('stages/*-release-*/run/release')
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('eyes') / 'phantoms'
    make_dataset(folder, n_patients=28, size=64, seed=3, eyes=('left',))
    return folder


def kill_when(out, pattern, arguments):
    """Starts the command and kills it as soon as there is a file of that pattern."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / 'scripts' / 'photos_to_release.py'), *arguments],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while not list(out.glob(pattern)):
        assert process.poll() is None, f'it ended before there was {pattern}'
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_and_resumed_it_makes_the_same_release(data, tmp_path):
    script = load_script('photos_to_release', 'scripts')
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    assert script.main(flags(data, whole)) == 0
    page = (whole / 'report.html').read_text()
    assert page.count('<h2>') == 6 and page.count('data:image/jpeg') >= 5
    assert whole.stat().st_mode & 0o777 == 0o700
    # Who is held out is in neither the training nor the release.
    (labels,) = whole.glob('stages/*-check-*/labels.csv')
    roles = dict(re.findall(r'^(\w+),.*,(release|held_out)$', labels.read_text(), re.M))
    (groups,) = whole.glob('stages/*-release-*/run/private/groups.csv')
    grouped = set(re.findall(r'^(\w+),\d', groups.read_text(), re.M))
    assert grouped == {name for name, role in roles.items() if role == 'release'}

    kill_when(broken, 'stages/*-encoder-*/joint/checkpoints/state_*.pt', flags(data, broken))
    assert not list(broken.glob('stages/*-encoder-*/stage.json'))
    assert script.main(flags(data, broken)) == 0
    assert release_files(broken) == release_files(whole)
    done = {p: p.stat().st_mtime_ns for p in broken.glob('stages/*/stage.json')}
    assert len(done) == 6 and script.main(flags(data, broken)) == 0
    assert {p: p.stat().st_mtime_ns for p in broken.glob('stages/*/stage.json')} == done
