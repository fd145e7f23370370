"""Going on with a generator training: what comes from the snapshot, and what survives NaN."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import load_script
from PIL import Image
from test_train_stylegan2 import Discs, tiny_config, tiny_trainer

from training.run import TrainingRun
from training.stylegan2_config import make_config
from training.stylegan2_loop import Draws
from training.stylegan2_resume import resumed_config
from training.stylegan2_run import GeneratorTraining, generator_run
from utils.errors import UserError
from utils.io import load_weights, save_torch
from utils.logs import read_jsonl

Command = Callable[..., int]


@pytest.fixture(scope='module')
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('archive')
    for i, (image, _) in enumerate(Discs(12)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f'img{i:08d}.png')
    return folder


@pytest.fixture(scope='module')
def command(archive: Path) -> Command:
    script = load_script('train_stylegan2_ada')

    def call(*flags: str) -> int:
        return script.main(['--data', str(archive), '--device=cpu', *flags])

    return call


@pytest.fixture(scope='module')
def original(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp('runs')
    command(
        '--outdir',
        str(runs),
        '--cfg=small',
        '--mirror=1',
        '--aug=fixed',
        '--p=0.3',
        '--seed=4',
        '--kimg=0.016',
        '--cbase=256',
        '--cmax=8',
    )
    (run_dir,) = runs.iterdir()
    return run_dir


@pytest.fixture
def begun(original: Path, tmp_path: Path) -> Path:
    """The folder of a run of 16 images per step whose settings no flag below repeats."""
    return Path(shutil.copytree(original, tmp_path / 'runs' / original.name))


def test_the_number_of_processes_changes_nothing_that_is_learnt(
    begun: Path, command: Command, capsys: pytest.CaptureFixture
) -> None:
    saved = load_weights(begun / 'network-snapshot-00000.016.pt')['config']
    capsys.readouterr()
    command('--resume', str(begun), '--gpus=2', '--kimg=1', '--dry-run')
    resolved = json.loads(capsys.readouterr().out)
    for name in ('batch', 'gamma', 'ema_kimg', 'mbstd_group', 'lr'):
        assert resolved[name] == saved[name], name
    # A new run with two processes would have other settings: the test could fail.
    assert make_config('small', 32, 2).gamma != saved['gamma']
    assert (resolved['batch_gpu'], resolved['kimg']) == (8, 1)
    with pytest.raises(UserError, match='16 images per step, which 3 processes cannot share'):
        command('--resume', str(begun), '--gpus=3', '--dry-run')
    assert resumed_config(saved, 4).batch_gpu == 4


def test_a_snapshot_brings_its_settings(begun: Path, command: Command, tmp_path: Path) -> None:
    snapshot = begun / 'network-snapshot-00000.016.pt'
    command('--outdir', str(tmp_path / 'more'), '--resume', str(snapshot), '--kimg=0.032')
    (run_dir,) = (tmp_path / 'more').iterdir()
    record = json.loads((run_dir / 'options.json').read_text())
    assert record['seed'] == 4
    for name, value in (('aug', 'fixed'), ('p', 0.3), ('mirror', True), ('cfg', 'small')):
        assert record['options'][name] == value, name
    # As the same run, gone on with in its own folder.
    command('--resume', str(begun), '--kimg=0.032')
    a, b = (load_weights(d / 'network-snapshot-00000.032.pt') for d in (begun, run_dir))
    assert all(torch.equal(a['g'][k], b['g'][k]) for k in a['g'])


@pytest.mark.parametrize(
    'flag',
    [
        '--batch=8',
        '--gamma=50',
        '--mirror=0',
        '--aug=noaug',
        '--seed=9',
        '--p=0.1',
        '--cmax=4',
        '--map-depth=3',
        '--cfg=auto',
        '--use_noise=1',
        '--subset=3',
    ],
)
def test_contradicting_flags_are_refused_by_name(
    begun: Path, command: Command, tmp_path: Path, flag: str
) -> None:
    snapshot = begun / 'network-snapshot-00000.016.pt'
    flags = [flag, '--aug=fixed'] if flag.startswith('--p=') else [flag]
    name = flag.split('=')[0]
    with pytest.raises(UserError, match=f'{name}.* was .*, now .*--transfer=1'):
        command('--outdir', str(tmp_path / 'more'), '--resume', str(snapshot), '--kimg=1', *flags)
    with pytest.raises(UserError, match=f'other settings.*{name}'):
        command('--resume', str(begun), '--kimg=1', *flags)


def test_other_pictures_are_refused(
    begun: Path, command: Command, archive: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    snapshot = begun / 'network-snapshot-00000.016.pt'
    changed = archive / 'img00000003.png'
    request.addfinalizer(partial(changed.write_bytes, changed.read_bytes()))
    Image.new('RGB', (32, 32), (9, 200, 7)).save(changed)
    for flags in (
        ['--outdir', str(tmp_path / 'more'), '--resume', str(snapshot)],
        ['--resume', str(begun)],
    ):
        with pytest.raises(UserError, match='other pictures than'):
            command('--kimg=1', *flags)


def test_a_file_without_a_generator_is_refused(command: Command, tmp_path: Path) -> None:
    save_torch(tmp_path / 'empty.pt', {'g_ema': None})
    with pytest.raises(UserError, match='empty.pt.* holds no generator'):
        command(
            '--outdir',
            str(tmp_path / 'runs'),
            '--cfg=small',
            '--batch=4',
            '--resume',
            str(tmp_path / 'empty.pt'),
        )


def test_a_damaged_record_is_told(begun: Path, command: Command) -> None:
    for text in ('{', '[]', '{"options": {"flags": 3}, "inputs": {}}'):
        (begun / 'options.json').write_text(text)
        with pytest.raises(UserError, match='options.json is damaged'):
            command('--resume', str(begun))


def test_target_of_zero_is_kept(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command('--outdir', str(tmp_path), '--cfg=small', '--batch=4', '--target=0', '--dry-run')
    assert json.loads(capsys.readouterr().out)['target'] == 0


def test_batch_leaves_the_other_settings_of_auto() -> None:
    assert make_config('auto', 64, 1).batch == 32
    for batch in (None, 16, 64):
        config = make_config('auto', 64, 1, batch=batch)
        assert (config.gamma, config.ema_kimg, config.mbstd_group) == (0.0256, 10, 4)


class Spoilt(GeneratorTraining):
    """Scores are NaN in the steps `bad`."""

    bad: range = range(0)

    def _judge(self, draw: Draws, *batches: torch.Tensor) -> torch.Tensor:
        logits = super()._judge(draw, *batches)
        return logits * (float('nan') if self.n_steps in self.bad else 1)


def spoilt(bad: range, precision: str | None) -> Spoilt:
    config = tiny_config(batch=2, channels=dict.fromkeys((4, 8, 16, 32), 4))
    trainer = Spoilt(
        Discs(12),
        config,
        device='cpu',
        augment='ada',
        precision=precision,
        augment_names=(),
        n_grid=1,
    )
    trainer.bad = bad
    return trainer


def test_one_step_that_is_not_finite_is_survived(tmp_path: Path) -> None:
    trainer = spoilt(range(1, 2), 'fp16')
    run = generator_run(trainer, tmp_path, kimg=0.012, snapshot_kimg=1, tick_kimg=0.006)
    assert run.to_the_end()
    rows = read_jsonl(tmp_path / 'stats.jsonl')
    assert [r['step'] for r in rows] == [6, 12]
    assert all(value == value for row in rows for value in row.values())
    assert trainer.ada.p == trainer.ada.p and trainer.weights_finite()
    assert load_weights(run.checkpoints.path(12))['ada']['p'] == trainer.ada.p
    assert trainer.pl_mean.isfinite()


@pytest.mark.parametrize('stop', [0.004, 0.01])  # within a tick, and on the edge of one
def test_ticks_do_not_move_when_a_run_is_gone_on_with(tmp_path: Path, stop: float) -> None:
    def begun(folder: str, kimg: float) -> TrainingRun:
        config = tiny_config(batch=2, channels=dict.fromkeys((4, 8, 16, 32), 4))
        training = GeneratorTraining(Discs(12), config, device='cpu', augment='noaug', n_grid=1)
        return generator_run(
            training, tmp_path / folder, kimg=kimg, snapshot_kimg=1, tick_kimg=0.005
        )

    begun('whole', 0.02).to_the_end()
    begun('parts', stop).to_the_end()
    resumed = begun('parts', 0.02)
    assert resumed.resume() and resumed.to_the_end()
    whole, parts = (
        [row['step'] for row in read_jsonl(tmp_path / name / 'stats.jsonl')]
        for name in ('whole', 'parts')
    )
    assert whole == [6, 10, 16, 20]
    assert parts == sorted({*whole, int(stop * 1000)})


def test_messages_name_the_file(begun: Path, command: Command, tmp_path: Path) -> None:
    snapshot = begun / 'network-snapshot-00000.016.pt'
    flags = [
        '--outdir',
        str(tmp_path / 'more'),
        '--resume',
        str(snapshot),
        '--transfer=1',
        '--kimg=0.016',
        '--batch=4',
        '--cfg=small',
    ]
    with pytest.raises(UserError, match=f'{snapshot} holds networks for 32 px'):
        command(*flags, '--cbase=512', '--cmax=16')


@pytest.mark.parametrize(
    'precision,bad',
    [
        (None, range(1, 2)),  # without cleaned gradients, the weights are lost
        ('fp16', range(1, 99)),
    ],
)  # the weights stay, but nothing is learnt
def test_what_stays_not_finite_ends_the_training(
    tmp_path: Path, precision: str | None, bad: range
) -> None:
    trainer = spoilt(bad, precision)
    with pytest.raises(UserError, match='training diverged'):
        generator_run(trainer, tmp_path, kimg=0.4, snapshot_kimg=0.02, tick_kimg=0.002).to_the_end()
    assert trainer.n_steps < 20
    for path in tmp_path.glob('network-snapshot-*.pt'):
        state = load_weights(path)
        assert all(v.isfinite().all() for v in state['g_ema'].values())
        assert state['ada']['p'] == state['ada']['p']


def test_scores_of_both_passes_count_for_the_strength() -> None:
    trainer = tiny_trainer()
    trainer.step()  # with the penalty on the discriminator, every second time
    assert float(trainer._signs[1]) == 2 * trainer.config.batch
    trainer.step()
    assert float(trainer._signs[1]) == 3 * trainer.config.batch


def test_the_path_length_target_moves_first() -> None:
    trainer = tiny_trainer(config=tiny_config(pl_decay=0.25, use_noise=False))
    trainer.pl_mean.fill_(0.5)
    ws = trainer.g.broadcast(trainer.g.mapping(torch.randn(3, 16))).detach().requires_grad_()
    draw = torch.Generator().manual_seed(1)
    loss, mean = trainer._path_length(ws, Draws(draw, draw))
    got = torch.autograd.grad(loss, trainer.g.input.input)[0]

    noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) / 32
    image = trainer.g.synthesis(ws, noise='none')
    (grad,) = torch.autograd.grad((image * noise).sum(), ws, create_graph=True)
    lengths = grad.square().sum(2).mean(1).sqrt()
    target = 0.75 * 0.5 + 0.25 * lengths.mean()
    want = 2.0 * (lengths - target).square().mean()
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    assert float(mean) == pytest.approx(float(lengths.detach().mean()), rel=1e-6)
    expected = torch.autograd.grad(want, trainer.g.input.input)[0]
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-7)
