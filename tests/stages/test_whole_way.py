"""All stages, trainings included, at toy size: killed in every stage, resumed, same release."""

import re
import signal

from conftest import load_script
from killed_stages import killers, run_until_killed

from datasets.phantoms.dataset import make_dataset


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


def test_killed_in_every_stage_and_resumed_it_makes_the_same_release(tmp_path):
    data, whole, broken = (tmp_path / name for name in ('phantoms', 'whole', 'broken'))
    make_dataset(data, n_patients=28, size=64, seed=3, eyes=('left',))
    script = load_script('photos_to_release', 'scripts')
    for number, name in enumerate(killers(broken)):
        assert run_until_killed(name, broken, flags(data, broken)) == -signal.SIGKILL, name
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
