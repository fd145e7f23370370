"""All stages, trainings included, at toy size: killed in every stage, resumed, same release.

The killed runs are forks of this process, before it has computed anything: they need not import
everything again.
"""

import multiprocessing
import os
import re
import signal
import threading
import time
from functools import partial

from conftest import load_script

from anonymization import optimisation
from anonymization.audit import recompute
from datasets.archive import ArchiveWriter
from datasets.phantoms.dataset import make_dataset
from stages import preparation, release


def flags(data, out):
    return [
        f'--photos={data / "images"}',
        f'--labels={data / "labels.csv"}',
        f'--out={out}',
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


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(number, place, name):
    """Kills this process when the function is called for that time."""
    real, calls = getattr(place, name), []

    def counted(*args, **options):
        calls.append(name)
        if len(calls) == number:
            die()
        return real(*args, **options)

    setattr(place, name, counted)


def die_at_file(out, pattern):
    """Kills this process as soon as there is a file of that pattern."""

    def look():
        while not list(out.glob(pattern)):
            time.sleep(0.01)
        die()

    threading.Thread(target=look, daemon=True).start()


def killers(out):
    """What has to be called to be killed in the middle of each stage."""
    return {
        'check': partial(die_at_call, 1, preparation, 'write_csv'),
        'crop': partial(die_at_call, 9, ArchiveWriter, 'add'),
        'encoder': partial(die_at_file, out, 'stages/*-encoder-*/joint/checkpoints/state_*.pt'),
        'release': partial(die_at_call, 2, optimisation, '_save_batch'),
        'verification': partial(die_at_call, 2, recompute, '_picture'),
        'evaluation': partial(die_at_call, 1, release, 'nearest_attack'),
    }


def go_on_until_killed(prepare, arguments):
    """Runs the command in a fork; returns its exit code."""

    def work():
        prepare()
        os._exit(load_script('photos_to_release', 'scripts').main(arguments))

    process = multiprocessing.get_context('fork').Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def test_killed_in_every_stage_and_resumed_it_makes_the_same_release(tmp_path):
    data, whole, broken = (tmp_path / name for name in ('phantoms', 'whole', 'broken'))
    make_dataset(data, n_patients=28, size=64, seed=3, eyes=('left',))
    script = load_script('photos_to_release', 'scripts')
    for number, (name, prepare) in enumerate(killers(broken).items()):
        assert go_on_until_killed(prepare, flags(data, broken)) == -signal.SIGKILL, name
        done = {p.parent.name.split('-')[1] for p in broken.glob('stages/*/stage.json')}
        assert done == set(list(killers(broken))[:number])
        assert list(broken.glob(f'stages/*-{name}-*'))
    assert script.main(flags(data, broken)) == 0
    done = {p: p.stat().st_mtime_ns for p in broken.glob('stages/*/stage.json')}
    assert len(done) == 6 and script.main(flags(data, broken)) == 0
    assert {p: p.stat().st_mtime_ns for p in broken.glob('stages/*/stage.json')} == done

    assert script.main(flags(data, whole)) == 0
    assert release_files(broken) == release_files(whole)
    page = (whole / 'report.html').read_text()
    assert page.count('<h2>') == 6 and page.count('data:image/jpeg') >= 5
    assert whole.stat().st_mode & 0o777 == 0o700
    # Who is held out is in neither the training nor the release.
    (labels,) = whole.glob('stages/*-check-*/labels.csv')
    roles = dict(re.findall(r'^(\w+),.*,(release|held_out)$', labels.read_text(), re.M))
    (groups,) = whole.glob('stages/*-release-*/run/private/groups.csv')
    grouped = set(re.findall(r'^(\w+),\d', groups.read_text(), re.M))
    assert grouped == {name for name, role in roles.items() if role == 'release'}
