"""Encoder training: one step by hand, Ranger by hand, resume, processes, files, bad input."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from golden_fill import fill_image, fill_state_dict, fill_tensor
from PIL import Image
from two_processes import run_in_one_and_two

from criteria.w_norm import latent_norm
from datasets import pictures
from models.encoders import build_encoder
from models.psp import PSP, invert, load_psp, psp_checkpoint
from models.stylegan2 import Generator
from scripts import train_restyle_psp
from training.coach_config import CoachConfig, build_optimizer
from training.coach_restyle_psp import Coach, encoder_run
from training.reconstruction import L2Term
from utils.errors import UserError
from utils.images import from_uint8
from utils.io import save_torch
from utils.logs import read_jsonl
from utils.seeds import torch_generator

SMALL = {4: 8, 8: 8, 16: 8, 32: 8}


def make_psp(name='LightEncoder'):
    decoder = Generator(32, style_dim=16, n_mlp=2, channels=SMALL)
    decoder.load_state_dict(fill_state_dict(decoder.state_dict(), equalized=True))
    options = {'width': 8} if name == 'LightEncoder' else {}
    encoder = build_encoder(name, n_styles=8, input_size=32, style_dim=16, **options)
    filled = fill_state_dict(encoder.state_dict(), equalized=False)
    if name == 'LightEncoder':
        filled['head.weight'] *= 0.02
    encoder.load_state_dict(filled)
    return PSP(encoder, decoder, fill_tensor('latent_avg', (8, 16), 0.1), 32)


def photographs(n=12, size=32):
    img = fill_image('photographs', (n, 3, size, size))
    return img.mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)


def make_coach(psp=None, *, losses=None, train=None, test=None, **settings):
    settings = {
        'batch_size': 4,
        'test_batch_size': 3,
        'max_steps': 4,
        'val_interval': 2,
        'board_interval': 1,
        'image_interval': 2,
        'n_iters': 3,
        **settings,
    }
    return Coach(
        psp or make_psp(),
        Pictures(photographs() if train is None else train),
        Pictures(photographs(5) if test is None else test),
        CoachConfig(**settings),
        losses=losses or {'l2': (L2Term(), 1.0)},
        device='cpu',
    )


class Pictures(torch.utils.data.Dataset):
    """uint8 [n, 3, S, S] as a dataset of (index, mirrored) items."""

    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, item):
        i, mirrored = item if isinstance(item, tuple) else (item, False)
        return self.pixels[i].flip(2) if mirrored else self.pixels[i]


class CountingTerm(L2Term):
    def __init__(self):
        self.calls = 0

    def targets(self, x):
        self.calls += 1
        return super().targets(x)


@pytest.mark.parametrize('name', ['ResNetBackboneEncoder', 'LightEncoder'])
def test_one_step_by_hand(name):
    # In float64, so that no kink of a leaky ReLU depends on the order of summation.
    x = fill_image('psp/source', (4, 3, 32, 32)).double()
    penalty = latent_norm(fill_tensor('latent_avg', (8, 16), 0.1))
    term = CountingTerm()
    coach = make_coach(
        make_psp(name).double(), losses={'l2': (term, 0.7)}, n_iters=5, learning_rate=0.01, seed=3
    )
    coach.latent_penalty = penalty, 0.05
    values, pictures = coach.step(x)
    assert term.calls == 1
    assert all(p.grad is None for p in coach.psp.decoder.parameters())
    assert [tuple(p.shape) for p in pictures] == [(4, 3, 32, 32)] * 6

    # The same by hand: five detached refinements, summed gradients, one Ranger step.
    psp = make_psp(name).double()
    net, generator = psp.encoder.train(), psp.decoder.requires_grad_(False)
    parameters = dict(net.named_parameters())
    total = {k: torch.zeros_like(p) for k, p in parameters.items()}
    w = psp.latent_avg.repeat(4, 1, 1)
    y = generator.synthesis(psp.latent_avg[None]).repeat(4, 1, 1, 1)
    for t in range(5):
        draw = torch_generator(3, 'noise', 0, t)
        noise = [
            torch.randn(4, 1, side, side, generator=draw) for side in (4, 8, 8, 16, 16, 32, 32)
        ]
        w = net(torch.cat([x, y], 1)) + w
        y = generator.synthesis(w, noise=noise)
        l2 = torch.nn.functional.mse_loss(y, x)
        norm = (w - psp.latent_avg).norm(2, dim=(1, 2)).mean()
        grads = torch.autograd.grad(0.7 * l2 + 0.05 * norm, list(parameters.values()))
        for k, g in zip(parameters, grads):
            total[k] += g
        w, y = w.detach(), y.detach()
    assert float(values['l2']) == pytest.approx(l2.item(), rel=1e-6)
    assert float(values['w_norm']) == pytest.approx(norm.item(), rel=1e-6)
    got = dict(coach.psp.encoder.named_parameters())
    for k, g in total.items():
        if g.ndim > 1:
            g = g - g.mean(tuple(range(1, g.ndim)), keepdim=True)
        want = parameters[k].detach() - 0.01 * g  # first step: momentum / its bias correction
        assert (got[k].detach() - want).abs().max() < 1e-6 * (0.01 * g).abs().max() + 1e-15, k


def test_ranger_by_hand():
    torch.manual_seed(0)
    start = {'kernel': torch.randn(4, 3, 3, 3), 'bias': torch.randn(4)}
    grads = [{k: torch.randn_like(v) for k, v in start.items()} for _ in range(14)]
    parameters = {k: torch.nn.Parameter(v.clone()) for k, v in start.items()}
    optimizer = build_optimizer('ranger', list(parameters.values()), 1e-2)
    for g in grads:
        for k, p in parameters.items():
            p.grad = g[k].clone()
        optimizer.step()
    for k, value in start.items():
        p, slow = value.double().clone(), value.double().clone()
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        for t, all_grads in enumerate(grads, 1):
            g = all_grads[k].double()
            if g.ndim > 1:
                g = g - g.mean((1, 2, 3), keepdim=True)
            m, v = 0.95 * m + 0.05 * g, 0.999 * v + 0.001 * g * g
            longest = 2 / 0.001 - 1
            length = longest - 2 * t * 0.999**t / (1 - 0.999**t)
            if length > 5:
                r = math.sqrt(
                    (1 - 0.999**t)
                    * (length - 4)
                    / (longest - 4)
                    * (length - 2)
                    / length
                    * longest
                    / (longest - 2)
                )
                p = p - 1e-2 * r / (1 - 0.95**t) * m / (v.sqrt() + 1e-5)
            else:
                p = p - 1e-2 / (1 - 0.95**t) * m
            if t % 6 == 0:
                p = slow = slow + 0.5 * (p - slow)
        assert torch.allclose(parameters[k].detach().double(), p, rtol=1e-4, atol=1e-6)


def test_accumulation_changes_nothing():
    x = fill_image('psp/source', (4, 3, 32, 32))
    states = []
    for accumulate in (1, 2):
        coach = make_coach(accumulate=accumulate, learning_rate=0.01)
        coach.step(x)
        states.append(coach.psp.encoder.state_dict())
    for k, v in states[0].items():
        assert torch.allclose(v, states[1][k], rtol=1e-4, atol=1e-6), k


def test_decoder_is_trained_only_when_asked():
    x = fill_image('psp/source', (4, 3, 32, 32))
    for wanted in (False, True):
        coach = make_coach(train_decoder=wanted, learning_rate=0.01)
        before = coach.psp.decoder.convs[0].conv.weight.clone()
        average = coach.average_image().clone()
        coach.step(x)
        assert torch.equal(before, coach.psp.decoder.convs[0].conv.weight) is not wanted
        assert torch.equal(average, coach.average_image()) is not wanted


def test_training_learns_and_refinement_helps(tmp_path):
    """Pictures of the generator itself can be inverted, so the loss must fall."""
    psp = make_psp()
    with torch.no_grad():
        ws = psp.latent_avg + 0.5 * torch.randn(24, 1, 16, generator=torch.manual_seed(1))
        u8 = psp.decode(ws).mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)
    coach = make_coach(
        psp,
        train=u8,
        test=u8[:8],
        max_steps=120,
        val_interval=120,
        learning_rate=2e-3,
        optim_name='adam',
        amp='bf16',
        batch_size=8,
    )
    assert encoder_run(coach, tmp_path).to_the_end()
    records = {r['step']: r for r in read_jsonl(tmp_path / 'stats.jsonl') if 'test/l2_3' in r}
    assert records[120]['test/l2_3'] < 0.5 * records[0]['test/l2_3']
    assert max(records[120]['test/l2_1'], records[120]['test/l2_3']) < records[120]['test/l2_0']
    best = load_psp(tmp_path / 'checkpoints' / 'best_model.pt')
    error = (invert(best, from_uint8(u8[:8]), n_iters=3).recon - from_uint8(u8[:8])).square()
    assert float(error.mean()) == pytest.approx(records[120]['test/l2_3'], rel=1e-3)
    for name in (
        'curves.png',
        'avg_image.png',
        'logs/images/test/000120.png',
        'logs/images/train/000120.png',
        'checkpoints/iteration_120.pt',
        'checkpoints/state_120.pt',
    ):
        assert (tmp_path / name).stat().st_size > 0
    sheet = Image.open(tmp_path / 'logs/images/test/000120.png')
    assert sheet.size == (4 * 34 + 2, 8 * 34 + 2)


def test_half_export(tmp_path):
    psp = make_psp()
    torch.save(psp_checkpoint(psp, {}, half_encoder=True), tmp_path / 'half.pt')
    again, x = load_psp(tmp_path / 'half.pt'), fill_image('psp/source', (2, 3, 32, 32))
    assert all(v.dtype == torch.float32 for v in again.parameters())
    whole, half = invert(psp.eval(), x, n_iters=2).recon, invert(again, x, n_iters=2).recon
    assert float((whole - half).abs().max()) < 0.02


def same_state(a, b):
    assert a.keys() == b.keys()
    for k in a:
        if isinstance(a[k], dict):
            same_state(a[k], b[k])
        elif isinstance(a[k], torch.Tensor):
            assert torch.equal(a[k], b[k]), k
        else:
            assert a[k] == b[k], k


def test_resume_is_exact_and_survives_a_damaged_state(tmp_path, caplog):
    full = make_coach(max_steps=6)
    encoder_run(full, tmp_path / 'full').to_the_end()
    encoder_run(make_coach(max_steps=4), tmp_path / 'part').to_the_end()
    path = tmp_path / 'part' / 'checkpoints' / 'state_4.pt'
    path.write_bytes(path.read_bytes()[:-1000])
    rest = make_coach(max_steps=6)
    run = encoder_run(rest, tmp_path / 'part')
    with caplog.at_level(logging.INFO):
        assert run.resume()
    assert 'falling back' in caplog.text and rest.step_count == 2
    run.to_the_end()
    same_state(full.state(), rest.state())
    kept = []
    for folder in ('full', 'part'):
        records = read_jsonl(tmp_path / folder / 'stats.jsonl')
        kept.append([{k: v for k, v in r.items() if k != 'images_per_second'} for r in records])
    assert kept[0] == kept[1]


def test_stopping_early_keeps_a_state(tmp_path):
    assert encoder_run(make_coach(), tmp_path).to_the_end(max_minutes=1e-6) is False
    again = make_coach()
    assert encoder_run(again, tmp_path).resume() and again.step_count == 1


def test_validation_does_not_depend_on_the_batch():
    results = [make_coach(test_batch_size=b).validate()[0] for b in (1, 2, 5)]
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5)
    assert len(results[0]) == 2 * 4  # l2 and loss, refinements 0 to 3


def test_two_processes_agree_with_one(tmp_path):
    """Same global batch, batch normalisation included, under torchrun with gloo."""
    code = """
import torch
from pathlib import Path
from test_restyle_training import encoder_run, make_coach, make_psp
from utils import distributed
distributed.init('cpu')
coach = make_coach(make_psp('ResNetBackboneEncoder'), max_steps=3, learning_rate=1e-3)
encoder_run(coach, Path(sys.argv[1])).to_the_end()
distributed.shutdown()
"""
    run_in_one_and_two(code, tmp_path)
    one, two = (torch.load(tmp_path / n / 'checkpoints' / 'state_3.pt') for n in '12')
    start = make_psp('ResNetBackboneEncoder').encoder.state_dict()
    moved = sum(float((one['weights'][k] - v).float().square().sum()) for k, v in start.items())
    apart = sum(
        float((one['weights'][k] - v).float().square().sum()) for k, v in two['weights'].items()
    )
    assert apart < 1e-4 * moved
    a, b = ([r for r in read_jsonl(tmp_path / n / 'stats.jsonl') if 'test/l2_3' in r] for n in '12')
    assert a[0] == pytest.approx(b[0], rel=1e-6)


def test_an_overflow_in_one_process_is_skipped_by_all(tmp_path: Path) -> None:
    """Loss scaling as float16 on GPUs uses it; only the first process overflows, in one step."""
    script = tmp_path / 'run.py'
    script.write_text(f"""
import sys
sys.path[:] = {sys.path!r}
import torch
from pathlib import Path
from test_restyle_training import make_coach, photographs
from training.reconstruction import L2Term
from utils import distributed
from utils.images import from_uint8

class Overflowing(L2Term):
    def distance(self, y, targets):
        overflow = coach.step_count == 0 and distributed.rank() == 0
        return super().distance(y, targets) * (float('inf') if overflow else 1)

distributed.init('cpu')
rank = distributed.rank()
coach = make_coach(losses={{'l2': (Overflowing(), 1.0)}}, learning_rate=1e-3)
coach.scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
start = {{k: v.clone() for k, v in coach.psp.encoder.named_parameters()}}
found = []
for _ in range(2):
    coach.step(from_uint8(photographs(4))[2 * rank:2 * rank + 2])
    weights = dict(coach.psp.encoder.named_parameters())
    found.append({{'same': all(torch.equal(weights[k], v) for k, v in start.items()),
                   'scale': coach.scaler.get_scale(), 'sum': sum(
                       float(v.double().sum()) for v in weights.values())}})
torch.save(found, Path(sys.argv[1]) / f'{{rank}}.pt')
distributed.shutdown()
""")
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            str(script),
            str(tmp_path),
        ],
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg'},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    assert first == second
    assert [step['same'] for step in first] == [True, False]
    assert [step['scale'] for step in first] == [512.0, 512.0]
    assert math.isfinite(first[1]['sum'])


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    """A generator file and folders of pictures, as a user would have them."""
    root = tmp_path_factory.mktemp('project')
    psp = make_psp()
    save_torch(
        root / 'generator.pt', {'g_ema': psp.decoder.state_dict(), 'latent_avg': psp.latent_avg[0]}
    )
    for part, n in (('train', 8), ('test', 1)):
        (root / part / 'sub').mkdir(parents=True)
        for i, img in enumerate(photographs(n, 40)):
            Image.fromarray(img.permute(1, 2, 0).numpy()).save(root / part / 'sub' / f'{i}.png')
    return root


def command(project, exp_dir, *more):
    return [
        '--exp_dir',
        str(exp_dir),
        '--train_path',
        str(project / 'train'),
        '--test_path',
        str(project / 'test'),
        '--stylegan_weights',
        str(project / 'generator.pt'),
        '--encoder_type',
        'LightEncoder',
        '--light_width',
        '8',
        '--encoder_size',
        '32',
        '--l2_lambda',
        '1',
        '--batch_size',
        '4',
        '--max_steps',
        '2',
        '--n_iters_per_batch',
        '2',
        '--device',
        'cpu',
        *more,
    ]


def test_command_line(project, tmp_path):
    assert train_restyle_psp.main(command(project, tmp_path / 'run', '--val_interval', '1')) == 0
    psp = load_psp(tmp_path / 'run' / 'checkpoints' / 'best_model.pt')
    assert psp.input_size == 32 and psp.decoder.size == 32
    saved = torch.load(tmp_path / 'run' / 'checkpoints' / 'iteration_2.pt')
    assert set(saved) == {'state_dict', 'opts', 'latent_avg'}
    assert not any('/' in str(v) for v in saved['opts'].values())
    record = json.loads((tmp_path / 'run' / 'options.json').read_text())
    assert record['options']['encoder_type'] == 'LightEncoder' and record['inputs']
    with pytest.raises(UserError, match='already holds a run'):
        train_restyle_psp.main(command(project, tmp_path / 'run'))
    with pytest.raises(UserError, match='other settings.*l2_lambda'):
        train_restyle_psp.main(
            command(
                project, tmp_path / 'run', '--resume', '--val_interval', '1', '--l2_lambda', '2'
            )
        )
    longer = command(
        project, tmp_path / 'run', '--resume', '--val_interval', '1', '--max_steps', '3'
    )
    assert train_restyle_psp.main(longer) == 0
    assert (tmp_path / 'run' / 'checkpoints' / 'iteration_3.pt').exists()
    warm = [a for a in command(project, tmp_path / 'warm') if 'generator.pt' not in a]
    warm.remove('--stylegan_weights')
    assert (
        train_restyle_psp.main(
            [
                *warm,
                '--max_steps',
                '1',
                '--checkpoint_path',
                str(tmp_path / 'run/checkpoints/iteration_3.pt'),
            ]
        )
        == 0
    )


@pytest.mark.parametrize(
    'more,message',
    [
        (['--id_lambda', '1', '--moco_lambda', '1'], 'exclude each other'),
        (['--id_lambda', '1'], 'identity loss compares faces'),
        (['--l2_lambda', '0'], 'no reconstruction loss'),
        (['--input_nc', '3'], '6 channels'),
        (['--output_size', '64'], '--output_size 64: the generator in .* makes 32 px'),
        (['--batch_size', '9'], '8 training images are fewer than one batch of 9'),
        (['--batch_size', '3', '--accumulate', '2'], 'cannot be divided'),
        (['--amp', 'fp16'], 'needs a GPU'),
        (['--encoder_size', '40'], '--encoder_size: LightEncoder takes'),
        (['--train_path', 'no/such/folder'], 'no/such/folder'),
        (['--stylegan_weights', 'absent.pt'], 'absent.pt'),
        (['--checkpoint_path', 'absent.pt'], 'absent.pt'),
        (['--moco_lambda', '1', '--content_weights', 'absent.pth'], 'absent.pth'),
        (['--lpips_lambda', '1', '--lpips_weights', 'absent.pth'], 'absent.pth'),
        (['--resnet34_weights', 'absent.pth'], 'absent.pth'),
    ],
)
def test_bad_flags_leave_nothing_behind(project, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        train_restyle_psp.main(command(project, tmp_path / 'run', *more))
    assert not (tmp_path / 'run').exists()


def test_unset_data_paths_say_what_to_do(project, tmp_path):
    flags = [
        '--exp_dir',
        str(tmp_path / 'run'),
        '--l2_lambda',
        '1',
        '--stylegan_weights',
        str(project / 'generator.pt'),
        '--dataset_type',
        'eyepacs_encode',
    ]
    with pytest.raises(UserError, match='--train_path.*eyepacs_encode.*paths_config'):
        train_restyle_psp.main(flags)


def test_paths_follow_the_environment():
    code = (
        'from configs.data_configs import DATASETS\n'
        'from configs.paths_config import model_paths\n'
        'print(DATASETS["aptos_encode"]["train_source_root"], model_paths["moco"])'
    )
    env = {**os.environ, 'KSALSA_APTOS_TRAIN': '/data/aptos', 'KSALSA_MOCO': '/w/moco.pt'}
    output = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, env=env, text=True, capture_output=True, check=True
    ).stdout
    assert output.split() == ['/data/aptos', '/w/moco.pt']


def test_all_unreadable_pictures_are_listed(project, tmp_path):
    for i in (3, 5):
        (tmp_path / f'{i}.png').write_bytes(b'not a picture')
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / 'grey.png')
    with pytest.raises(UserError, match='(?s)2 of 3.*3.png.*5.png'):
        pictures.Pictures(tmp_path, 32)
    dataset = pictures.Pictures(project / 'train', 16)
    assert torch.equal(dataset[2, True], dataset[2].flip(2))
