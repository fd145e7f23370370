"""Encoder training: one step by hand, Ranger by hand, resume, processes, files, bad input."""

import logging
import math
from pathlib import Path

import pytest
import torch
from golden_fill import fill_image, fill_tensor
from restyle_nets import make_psp, photographs
from two_processes import run_code, run_in_one_and_two, run_together

from criteria.w_norm import latent_norm
from models.psp import invert, load_psp, psp_checkpoint
from training.coach_config import CoachConfig, build_optimizer
from training.coach_restyle_psp import Coach, encoder_run
from training.reconstruction import L2Term
from utils.images import from_uint8, load_rgb
from utils.logs import read_jsonl
from utils.seeds import torch_generator


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
    sheet = load_rgb(tmp_path / 'logs/images/test/000120.png')
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
    code = """
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
coach = make_coach(losses={'l2': (Overflowing(), 1.0)}, learning_rate=1e-3)
coach.scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
start = {k: v.clone() for k, v in coach.psp.encoder.named_parameters()}
found = []
for _ in range(2):
    coach.step(from_uint8(photographs(4))[2 * rank:2 * rank + 2])
    weights = dict(coach.psp.encoder.named_parameters())
    found.append({'same': all(torch.equal(weights[k], v) for k, v in start.items()),
                   'scale': coach.scaler.get_scale(), 'sum': sum(
                       float(v.double().sum()) for v in weights.values())})
torch.save(found, Path(sys.argv[1]) / f'{rank}.pt')
distributed.shutdown()
"""
    run_together(2, tmp_path / 'log', run_code, code, str(tmp_path))
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    assert first == second
    assert [step['same'] for step in first] == [True, False]
    assert [step['scale'] for step in first] == [512.0, 512.0]
    assert math.isfinite(first[1]['sum'])
