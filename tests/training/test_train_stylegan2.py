"""The generator's training loop: exact resume, equal processes, adaptive strength, commands."""

import json

import pytest
import torch
from conftest import load_script
from PIL import Image
from tiny_generator import Discs, tiny_config, tiny_trainer
from two_processes import run_together

from datasets.archive import ImageArchive
from scripts import train_stylegan2_ada
from training.stylegan2_loop import Draws, Trainer
from training.stylegan2_run import snapshots
from utils.errors import UserError
from utils.io import load_weights
from utils.logs import read_jsonl
from utils.seeds import torch_generator


@pytest.fixture
def archive(tmp_path):
    folder = tmp_path / 'archive'
    folder.mkdir()
    for i, (image, _) in enumerate(Discs(12)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f'img{i:08d}.png')
    return folder


def equal_states(a, b):
    for part in ('g_ema', 'g', 'd'):
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), (part, name)


def test_resumed_training_equals_uninterrupted(tmp_path):
    straight = tiny_trainer(augment='fixed', augment_p=0.5)
    for _ in range(4):
        straight.step()
    first = tiny_trainer(augment='fixed', augment_p=0.5)
    for _ in range(2):
        first.step()
    snapshots(tmp_path).save(first.n_img, first.state())
    second = tiny_trainer(augment='fixed', augment_p=0.5)
    second.load_state(snapshots(tmp_path).latest()[0])
    for _ in range(2):
        second.step()
    assert second.n_img == straight.n_img == 16
    equal_states(straight.state(), second.state())
    assert torch.equal(straight.pl_mean, second.pl_mean)


class FixedLatents(Trainer):
    """Latents depend on the step and on their place in the batch alone, not on the pass."""

    def _passes(self, phase):
        return [Draws(number, number) for number in range(self.rounds)]

    def _latents(self, draw, n):
        bank = torch.randn(
            self.config.batch, self.config.style_dim, generator=torch_generator(self.n_steps)
        )
        return self.g.broadcast(self.g.mapping(bank[draw.images * n : (draw.images + 1) * n]))


def test_gradients_accumulate_over_passes():
    # Four images in one pass or in two passes of two. Minibatch statistics see the pass, and
    # augmentations are drawn per pass, so both are off.
    whole, parts = (
        FixedLatents(
            Discs(12),
            tiny_config(mbstd_group=1, batch_gpu=n, pl_weight=0, use_noise=False),
            device='cpu',
            augment='noaug',
        )
        for n in (4, 2)
    )
    assert (whole.rounds, parts.rounds) == (1, 2)
    for _ in range(3):
        one, two = whole.step(), parts.step()
        assert one.keys() == two.keys() >= {'loss_g', 'loss_d'}
        for name in one:
            assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-3, abs=1e-5), name


def test_two_processes_give_the_losses_of_one(archive, tmp_path):
    flags = [
        '--data',
        str(archive),
        '--cfg=small',
        '--batch=4',
        '--batch-gpu=2',
        '--kimg=0.016',
        '--aug=fixed',
        '--p=0.3',
        '--pl_weight=2',
        '--device=cpu',
        '--workers=0',
    ]
    rows = {}
    for gpus in (1, 2):
        out = tmp_path / f'gpus{gpus}'
        asked = ['--outdir', str(out), *flags]
        run_together(gpus, tmp_path / f'{gpus}.log', train_stylegan2_ada.main, asked)
        (run_dir,) = out.iterdir()
        rows[gpus] = read_jsonl(run_dir / 'stats.jsonl')
        assert (run_dir / 'generator.pt').is_file() and (run_dir / 'curves.png').is_file()
    assert len(rows[1]) == len(rows[2]) > 1
    for one, two in zip(rows[1], rows[2]):
        for name in ('loss_g', 'loss_d', 'score_real'):
            # Summation order of the averaged gradients is all that differs.
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-4), name


def test_command_trains_resumes_and_transfers(archive, tmp_path, capsys):
    script = load_script('train_stylegan2_ada')
    out = tmp_path / 'runs'
    base = [
        '--outdir',
        str(out),
        '--data',
        str(archive),
        '--cfg=small',
        '--batch=4',
        '--device=cpu',
        '--aug=noaug',
        '--workers=0',
    ]
    assert script.main([*base, '--kimg=0.008']) == 0
    (run_dir,) = out.iterdir()
    record = json.loads((run_dir / 'options.json').read_text())
    assert record['options']['batch'] == 4 and record['seed'] == 0
    # Going on in the same folder to a longer goal equals one straight run.
    assert script.main(['--outdir', str(out), '--resume', str(run_dir), '--kimg=0.016']) == 0
    assert script.main([*base, '--kimg=0.016']) == 0
    straight = out / sorted(p.name for p in out.iterdir())[-1]
    name = 'network-snapshot-00000.016.pt'
    equal_states(load_weights(run_dir / name), load_weights(straight / name))
    assert script.main([*base, '--kimg=0.004', '--resume', str(run_dir / 'generator.pt')]) == 0
    capsys.readouterr()
    assert script.main([*base, '--dry-run']) == 0
    assert json.loads(capsys.readouterr().out)['batch'] == 4


@pytest.fixture
def finished_run(archive, tmp_path):
    """A run folder at 8 images, and the function that runs the command with the same settings."""
    script = load_script('train_stylegan2_ada')

    def command(*flags):
        return script.main(
            [
                '--outdir',
                str(tmp_path / 'runs'),
                '--data',
                str(archive),
                '--cfg=small',
                '--batch=4',
                '--device=cpu',
                '--aug=noaug',
                *flags,
            ]
        )

    command('--kimg=0.008')
    (run_dir,) = (tmp_path / 'runs').iterdir()
    return run_dir, command, script.main


def test_snapshot_file_goes_on_or_is_transferred(finished_run):
    run_dir, command, _ = finished_run
    snapshot = str(run_dir / 'network-snapshot-00000.008.pt')
    runs = run_dir.parent
    for flags, message in (
        (['--resume', snapshot, '--kimg=0.008'], 'at 0.008 kimg already'),
        (['--resume', snapshot, '--kimg=0.1', '--freezed=2'], '--transfer=1'),
        (['--resume', str(run_dir / 'generator.pt'), '--freezed=2'], 'no discriminator'),
        (['--resume', snapshot, '--transfer=1', '--freezed=99'], '10 layers'),
        (['--resume', snapshot, '--transfer=1', '--map-depth=3'], '3 mapping layers'),
        (['--freezed=2'], 'untrained'),
        (['--transfer=1'], '--resume FILE'),
    ):
        with pytest.raises(UserError, match=message):
            command(*flags)
    assert list(runs.iterdir()) == [run_dir]
    command('--kimg=0.004', '--resume', snapshot, '--transfer=1', '--freezed=2')
    (new,) = set(runs.iterdir()) - {run_dir}
    state, old = load_weights(new / 'network-snapshot-00000.004.pt'), load_weights(snapshot)
    assert state['n_img'] == 4 and state['ema_warm']
    frozen, trained = 'convs.1.conv1.0.weight', 'convs.2.conv1.0.weight'
    assert torch.equal(state['d'][frozen], old['d'][frozen])
    assert not torch.equal(state['d'][trained], old['d'][trained])
    again = tiny_trainer()
    assert again.ada.adjust_kimg == 500
    again.load_state({**again.state(), 'ema_warm': True})
    assert again.ada.adjust_kimg == 100


def test_run_folder_goes_on_only_as_it_began(finished_run, archive, tmp_path):
    run_dir, _, main = finished_run
    before = {p.name for p in run_dir.iterdir()}
    other = tmp_path / 'other'
    other.mkdir()
    for file in archive.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    for flags in (['--batch=8'], ['--data', str(other)], ['--gamma=3'], ['--use_noise=1']):
        with pytest.raises(UserError, match='other settings.*' + flags[0].split('=')[0]):
            main(['--resume', str(run_dir), '--kimg=0.016', *flags])
    with pytest.raises(UserError, match='leave --outdir out'):
        main(['--resume', str(run_dir), '--outdir', str(other)])
    assert {p.name for p in run_dir.iterdir()} == before
    main(['--resume', str(run_dir), '--kimg=0.016'])
    record = json.loads((run_dir / 'options.json').read_text())
    assert record['continued'][0]['flags'][-1] == '--kimg=0.016'
    assert record['continued'][0]['from_snapshot'] == 'network-snapshot-00000.008.pt'


def test_time_limit_is_told_and_not_inherited(archive, tmp_path, caplog):
    main = load_script('train_stylegan2_ada').main
    main(
        [
            '--outdir',
            str(tmp_path / 'runs'),
            '--data',
            str(archive),
            '--cfg=small',
            '--batch=4',
            '--device=cpu',
            '--aug=noaug',
            '--kimg=0.008',
            '--max_minutes',
            '1e-9',
        ]
    )
    (run_dir,) = (tmp_path / 'runs').iterdir()
    log = (run_dir / 'log.txt').read_text()
    assert 'stopped at kimg 0.004 of 0.008' in log and f'--resume={run_dir} goes on' in log
    main(['--resume', str(run_dir)])
    assert (run_dir / 'network-snapshot-00000.008.pt').is_file()


def test_fractions_of_a_tick_between_snapshots(archive, tmp_path):
    load_script('train_stylegan2_ada').main(
        [
            '--outdir',
            str(tmp_path),
            '--data',
            str(archive),
            '--cfg=small',
            '--batch=4',
            '--device=cpu',
            '--aug=fixed',
            '--p=0',
            '--kimg=0.024',
            '--snap=0.002',
        ]
    )
    (run_dir,) = tmp_path.glob('0*')
    assert run_dir.name == '00000-archive-small-batch4-fixed'
    assert [p.stem[-9:] for p in sorted(run_dir.glob('network*.pt'))] == [
        '00000.008',
        '00000.016',
        '00000.024',
    ]
    # How sure the discriminator is of real images is told whatever the augmentation.
    assert any(row['overfitting'] for row in read_jsonl(run_dir / 'stats.jsonl'))


def test_same_command_writes_the_same_bytes(finished_run):
    run_dir, command, _ = finished_run
    command('--kimg=0.008')
    (again,) = set(run_dir.parent.iterdir()) - {run_dir}
    for name in ('generator.pt', 'network-snapshot-00000.008.pt', 'fakes00000.008.png'):
        assert (run_dir / name).read_bytes() == (again / name).read_bytes(), name


def test_command_rejects_bad_input(archive, tmp_path):
    script = load_script('train_stylegan2_ada')
    base = ['--outdir', str(tmp_path / 'runs'), '--data', str(archive), '--device=cpu']
    for flags, message in (
        (['--cond=1'], 'no class input'),
        (['--aug=fixed'], 'needs --p'),
        (['--batch=64'], 'fewer than one batch'),
        (['--subset=99'], 'holds 12 images'),
        (['--metrics=bogus', '--batch=4'], "unknown metric 'bogus'"),
        (['--metrics=', '--batch=4'], "unknown metric ''"),
        (['--metrics=none,fid', '--batch=4'], "unknown metric 'none'"),
        (['--batch=2', '--gpus=4', '--dry-run'], 'number of processes'),
        (['--fp32=1', '--precision=bf16'], 'contradict'),
        (['--aug=noaug', '--augpipe=bg'], '--augpipe goes with'),
        (['--resume', str(tmp_path / 'none')], 'no such'),
    ):
        with pytest.raises(UserError, match=message):
            script.main([*base, *flags])
    with pytest.raises(UserError, match='not a run folder'):
        script.main(['--resume', str(tmp_path)])
    with pytest.raises(UserError, match='--outdir and --data must be given'):
        script.main([])
    assert not (tmp_path / 'runs').exists()


def test_damaged_snapshot_falls_back(tmp_path, caplog):
    trainer = tiny_trainer(augment='noaug')
    trainer.step()
    good = snapshots(tmp_path).save(trainer.n_img, trainer.state())
    trainer.step()
    bad = snapshots(tmp_path).save(trainer.n_img, trainer.state())
    bad.write_bytes(bad.read_bytes()[:1000])
    state, path = snapshots(tmp_path).latest()
    assert path == good and state['n_steps'] == 1
    assert 'damaged' in caplog.text


def test_archive_mirror_doubles(archive):
    plain, mirrored = ImageArchive(archive), ImageArchive(archive, mirror=True)
    assert len(mirrored) == 2 * len(plain)
    assert torch.equal(mirrored[len(plain)][0], plain[0][0].flip(2))
