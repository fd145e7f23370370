"""Every training and every step of the pipeline on a pretended GPU: nothing mixed, few waits.

BUDGETS are host waits and operations at toy size. A number that is exceeded names the lines in
the failure; who has a reason to raise it does so here.
"""

import importlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from pretended_device import PretendedGPU, pretended_gpu
from test_content_training import Pictures as Views
from test_e4e_training import E4E, make_e4e_psp
from test_restyle_training import Pictures, make_psp, photographs

from anonymization.grouping import assign_groups
from anonymization.optimize import Group, GroupOptimizer, OptimizeConfig
from classification.settings import Settings
from classification.train import train_grader
from evaluation.attacks.pairs import PairAttack, PairConfig, standardisation
from evaluation.attacks.vessels import best_correlations
from evaluation.features import extract_features
from models.encoders import build_encoder
from models.features.content import ContentNetwork, content_network_from_state
from models.features.pretrained import load_feature_network
from models.features.style import FilterBank
from models.psp import PSP, FrozenPSP, invert, refine
from models.resnet import build_resnet
from models.stylegan2 import Generator
from models.stylegan2.op import build, fused_leaky_relu
from models.stylegan2.op.build import trusted
from models.stylegan2.sampling import loop_styles, render, seed_styles
from training.augment import PIPES
from training.coach_config import CoachConfig
from training.coach_restyle_e4e import E4ECoach
from training.coach_restyle_psp import Coach
from training.moco import MocoConfig, MocoTrainer
from training.reconstruction import L2Term
from training.stylegan2_config import make_config
from training.stylegan2_loop import Trainer
from training.stylegan2_networks import sample_grid
from utils.cuda_graphs import captured

BUDGETS = {  # (host waits, operations)
    'generator': (0, 1060),
    'generator, all penalties': (0, 2790),
    'generator bf16': (0, 1215),
    'generator bf16, all penalties': (0, 3070),
    'generator fp16': (0, 1330),
    'generator fp16, all penalties': (0, 3280),
    'projected': (0, 1965),
    'encoder': (0, 1095),
    'encoder bf16': (0, 1250),
    'encoder fp16': (1, 1820),
    'e4e': (0, 1160),
    'content': (0, 495),
    'content bf16': (0, 570),
    'grader': (0, 243),
    'grader bf16': (0, 291),
    'grader fp16': (1, 303),
    # One wait at the end of the epoch of three steps.
    'pairs': (1 / 3, 241),
    'pairs bf16': (1 / 3, 290),
    'groups': (0, 395),
    'groups bf16': (0, 445),
    'groups by group means': (0, 810),
    'inversion': (0, 290),
    'inversion bf16': (0, 320),
    'refinement': (0, 510),
}


def within_budget(gpu: PretendedGPU, name: str, steps: int = 1) -> None:
    """No fault, and no more waits and operations than BUDGETS allows for `steps` steps."""
    waits, operations = BUDGETS[name]
    found = gpu.report(name)
    assert not gpu.faults, found
    assert gpu.n_waits <= waits * steps, found
    assert operations * steps / 2 < gpu.n_operations <= operations * steps, found
    gpu.clear()


def more_within_budget(
    gpu: PretendedGPU, found: list[tuple[int, int]], name: str, steps: int = 1
) -> None:
    """The same for what `steps` more steps cost, without what is done once: [(waits, operations)]
    of the smaller and the larger run."""
    waits, operations = (more - less for less, more in zip(*found))
    assert waits <= BUDGETS[name][0] * steps, gpu.report(name)
    allowed = BUDGETS[name][1] * steps
    assert allowed / 2 < operations <= allowed, gpu.report(name)


@pytest.fixture
def gpu() -> Iterator[PretendedGPU]:
    with pretended_gpu() as found:
        yield found


class Labelled(torch.utils.data.Dataset):
    """Random pictures as the generator training takes them."""

    def __init__(self, size: int) -> None:
        self.images = photographs(6, size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], torch.zeros(0)


def test_what_a_gpu_refuses_is_noticed(gpu: PretendedGPU) -> None:
    x, cpu = torch.ones(3, device='cuda', requires_grad=True), torch.ones(3)
    assert x.is_cuda and (x * 2).device.type == 'cuda' and not cpu.is_cuda
    (x * 2).sum().backward()
    assert x.grad.is_cuda and not gpu.faults and not gpu.n_waits
    x.detach() + torch.tensor(2.0)  # a number of the CPU
    assert not gpu.faults
    for mix in (
        lambda: x + cpu,
        lambda: torch.stack([x, cpu]),
        lambda: x.detach().numpy(),
        lambda: torch.randn(3, device='cuda', generator=torch.Generator()),
        lambda: torch.randn(3, generator=torch.Generator(device='cuda')),
    ):
        mix()
        assert len(gpu.faults) == 1, gpu.report()
        gpu.clear()


def test_waits_are_noticed(gpu: PretendedGPU) -> None:
    x, cpu = torch.ones(3, device='cuda'), torch.ones(3)
    for wait in (
        lambda: float(x.sum()),
        x.tolist,
        x.cpu,
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: cpu.to('cuda'),
        lambda: cpu.to('cuda', non_blocking=True),
        lambda: torch.tensor([1.0], device='cuda'),
        lambda: x.copy_(cpu),
        lambda: x.new_tensor([2.0]),
        lambda: x[np.array([0, 1])],
    ):
        gpu.clear()
        wait()
        assert gpu.n_waits == 1 and not gpu.faults, gpu.report()
        assert 'test_pretended_device.py' in next(iter(gpu.waits))
    gpu.clear()
    cpu.pin_memory().to('cuda', non_blocking=True)
    assert not gpu.n_waits


def test_a_wrong_kernel_is_left_out(gpu: PretendedGPU, caplog: pytest.LogCaptureFixture) -> None:
    module = importlib.import_module('models.stylegan2.op.upfirdn2d')
    right, x = module._launch, torch.ones(1, 4, 8, 8, device='cuda')
    trusted.cache_clear()
    with (
        mock.patch.object(build, 'trusted', trusted),
        mock.patch.object(module, '_launch', lambda *arguments: right(*arguments) * 1.01),
    ):
        for _ in range(2):
            gpu.clear()
            module.upfirdn2d(x, torch.ones(4, 4, device='cuda'))
            fused_leaky_relu(x)
        assert gpu.operations['activation'] == 1 and not gpu.operations['upfirdn2d']
    trusted.cache_clear()
    assert caplog.text.count('path for upfirdn2d: the kernel differs from it') == 1
    assert not gpu.faults, gpu.report()


@pytest.mark.parametrize('precision, pipe', [(None, 'bgcfnc'), ('bf16', 'bgc'), ('fp16', 'bgc')])
def test_generator_training(gpu: PretendedGPU, precision: str | None, pipe: str) -> None:
    config = make_config(
        'auto',
        32,
        1,
        batch=2,
        batch_gpu=2,
        style_dim=16,
        n_mlp=2,
        channels={4: 8, 8: 8, 16: 8, 32: 8},
    )
    trainer = Trainer(
        Labelled(32),
        config,
        device='cuda',
        augment='fixed',
        augment_p=0.6,
        augment_names=PIPES[pipe],
        precision=precision,
    )
    for net in (trainer.g, trainer.d, trainer.g_ema):
        assert all(gpu.tag(t) == 'cuda' for t in net.state_dict().values())
    name = f'generator {precision}' if precision else 'generator'
    gpu.clear()
    trainer.step()
    within_budget(gpu, f'{name}, all penalties')
    trainer.step()
    within_budget(gpu, name)
    trainer.step()
    trainer.step()  # adjusts the strength of the augmentation
    assert gpu.n_waits <= 1 and not gpu.faults, gpu.report()
    trainer.load_state(trainer.state())
    assert not gpu.faults, gpu.report()


def test_projected_generator_training(gpu: PretendedGPU) -> None:
    config = make_config(
        'small',
        64,
        1,
        batch=2,
        batch_gpu=2,
        style_dim=16,
        channels={4: 8, 8: 8, 16: 8, 32: 8, 64: 4},
        discriminator='projected',
    )
    trainer = Trainer(
        Labelled(64),
        config,
        device='cuda',
        augment='fixed',
        augment_p=0.6,
        augment_names=PIPES['diff'],
    )
    trainer.step()
    gpu.clear()
    trainer.step()
    within_budget(gpu, 'projected')


@pytest.mark.parametrize('amp', ['no', 'bf16', 'fp16'])
def test_encoder_training(gpu: PretendedGPU, amp: str) -> None:
    coach = Coach(
        make_psp(),
        Pictures(photographs(4)),
        Pictures(photographs(3)),
        CoachConfig(batch_size=2, test_batch_size=2, n_iters=3, amp=amp, optim_name='adam'),
        device='cuda',
        losses={'l2': (L2Term(), 1.0)},
    )
    x = torch.rand(2, 3, 32, 32, device='cuda')
    coach.step(x)
    gpu.clear()
    coach.step(x)
    within_budget(gpu, 'encoder' if amp == 'no' else f'encoder {amp}')
    coach.validate()
    coach.load_state(coach.state())
    coach.export()
    assert not gpu.faults, gpu.report()


def test_e4e_training(gpu: PretendedGPU) -> None:
    coach = E4ECoach(
        make_e4e_psp(),
        Pictures(photographs(4)),
        Pictures(photographs(3)),
        CoachConfig(batch_size=2, n_iters=2, optim_name='adam', synthetic=0.5),
        device='cuda',
        losses={'l2': (L2Term(), 1.0)},
        e4e=E4E,
    )
    x = torch.rand(2, 3, 32, 32, device='cuda')
    coach.step(x)
    gpu.clear()
    coach.step(x)
    within_budget(gpu, 'e4e')


@pytest.mark.parametrize('amp', ['no', 'bf16'])
def test_content_training(gpu: PretendedGPU, amp: str) -> None:
    config = MocoConfig(
        arch='resnet18', small_stem=True, input_size=32, batch_size=2, queue_size=4, amp=amp
    )
    trainer = MocoTrainer(Views(4), config, device='cuda')
    x = torch.rand(2, 3, 32, 32, device='cuda')
    trainer.step(x)
    gpu.clear()
    trainer.step(x)
    within_budget(gpu, 'content' if amp == 'no' else f'content {amp}')
    trainer.load_state(trainer.state())
    trainer.export()
    assert not gpu.faults, gpu.report()


@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_grader_training(gpu: PretendedGPU, precision: str) -> None:
    images, grades = photographs(6).numpy(), np.array([0, 1, 2, 3, 4, 0])
    found = []
    for steps in (3, 6):
        settings = Settings(
            target='5-class',
            arch='resnet18',
            small_stem=True,
            image_size=32,
            epochs=1,
            batch_size=2,
            precision=precision,
            min_steps_per_epoch=steps,
        )
        gpu.clear()
        result = train_grader(images, grades, settings=settings, device='cuda')
        found.append((gpu.n_waits, gpu.n_operations))
        assert not gpu.faults, gpu.report()
    more_within_budget(gpu, found, 'grader' if precision == 'fp32' else f'grader {precision}', 3)
    result.evaluate(images, grades)
    assert not gpu.faults, gpu.report()


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_pair_attack(gpu: PretendedGPU, precision: str) -> None:
    photos, groups = photographs(12).numpy(), np.repeat(np.arange(4), 3)
    mean, std = standardisation(photos)
    attack = PairAttack(
        PairConfig(k=2, mult_batch=2, epochs=2, image_size=32, precision=precision),
        mean=mean,
        std=std,
        device='cuda',
    )
    gpu.clear()
    attack.train_epoch(photos, photos[:4], groups)
    within_budget(gpu, 'pairs' if precision == 'fp32' else f'pairs {precision}', steps=3)
    attack.scores(photos, photos[:4], batch_size=8)
    attack.load_state(attack.state())
    assert not gpu.faults, gpu.report()


def content_network() -> ContentNetwork:
    return content_network_from_state(
        {
            'format': 'k-salsa-content-encoder',
            'arch': 'resnet18',
            'small_stem': True,
            'input_size': 32,
            'state_dict': build_resnet('resnet18', small_stem=True).state_dict(),
        },
        source='test',
    )


def larger_psp() -> PSP:
    """Of 64 px, the least that pretrained feature networks take."""
    decoder = Generator(64, style_dim=16, n_mlp=2, channels={4: 8, 8: 8, 16: 8, 32: 8, 64: 4})
    encoder = build_encoder('LightEncoder', n_styles=10, input_size=64, style_dim=16, width=8)
    return PSP(encoder, decoder, torch.zeros(10, 16), 64)


@pytest.mark.parametrize(
    'name, precision',
    [('groups', 'fp32'), ('groups bf16', 'bf16'), ('groups by group means', 'fp32')],
)
def test_group_optimisation(gpu: PretendedGPU, name: str, precision: str) -> None:
    features = load_feature_network('lite0') if 'means' in name else None
    side, psp = (64, larger_psp()) if features else (32, make_psp())
    config = OptimizeConfig(
        n_steps=2, n_crop=2, **({'style_weight': 'auto', 'lr': 'auto'} if features else {})
    )
    engine = GroupOptimizer(
        psp,
        features or content_network(),
        features or FilterBank(),
        config=config,
        device='cuda',
        precision=precision,
    )
    width = features.n_features if features else 512
    draw = torch.Generator().manual_seed(0)
    groups = [
        Group(
            torch.randn(k, psp.decoder.n_latent, 16, generator=draw),
            photographs(k, side),
            torch.nn.functional.normalize(torch.randn(k, width, generator=draw), dim=1),
        )
        for k in (3, 2)
    ]
    found = []
    for n_steps in (2, 3):
        engine.config = OptimizeConfig(**{**vars(config), 'n_steps': n_steps})
        gpu.clear()
        result = engine.run(groups)
        found.append((gpu.n_waits, gpu.n_operations))
        assert not gpu.faults, gpu.report()
        assert not any(gpu.tag(t) == 'cuda' for t in result)
    more_within_budget(gpu, found, name)


def small_job(gpu: PretendedGPU) -> tuple[GroupOptimizer, list[Group]]:
    config = OptimizeConfig(n_steps=20, n_crop=2)
    engine = GroupOptimizer(
        make_psp(), content_network(), FilterBank(), config=config, device='cuda'
    )
    draw = torch.Generator().manual_seed(0)
    ws = torch.randn(2, engine.psp.decoder.n_latent, 16, generator=draw)
    features = torch.nn.functional.normalize(torch.randn(2, 512, generator=draw), dim=1)
    return engine, [Group(ws, photographs(2), features)]


def test_few_groups_replay_a_graph(gpu: PretendedGPU, caplog: pytest.LogCaptureFixture) -> None:
    engine, groups = small_job(gpu)
    gpu.clear()
    result = engine.run(groups)
    assert gpu.operations['graph'] == 20 + 2 and not gpu.faults and not caplog.text, gpu.report()
    found = [gpu.n_operations]
    engine.config = OptimizeConfig(n_steps=30, n_crop=2)
    gpu.clear()
    engine.run(groups)
    assert gpu.n_operations - found[0] <= 10 * 10, gpu.report()  # a step is a launch and Adam
    engine.config = OptimizeConfig(n_steps=20, n_crop=2)
    with mock.patch('anonymization.optimize._GRAPH_GROUPS', 0):
        eager = engine.run(groups)
    assert all(torch.equal(a, b) for a, b in zip(result, eager))


def test_a_graph_that_differs_or_fails_is_left_out(
    gpu: PretendedGPU, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.ones(1, device='cuda')
    host = {'calls': 0}

    def forgetful() -> tuple[torch.Tensor, ...]:
        host['calls'] += 1  # a number of the host, which the graph keeps as it was
        return (x * host['calls'],)

    def waiting() -> tuple[torch.Tensor, ...]:
        return (x * float(x.sum()),)

    for step, reason in ((forgetful, 'it differs by'), (waiting, 'not permitted')):
        caplog.clear()
        assert captured(step, x) is step and reason in caplog.text
        assert x.item() == 1
    caplog.clear()
    right = captured(lambda: (x * 2,), x)
    x.fill_(3)
    assert right()[0].item() == 6 and not caplog.text


@pytest.mark.parametrize(
    'name, dtype', [('inversion', torch.float32), ('inversion bf16', torch.bfloat16)]
)
def test_inversion(gpu: PretendedGPU, name: str, dtype: torch.dtype) -> None:
    frozen = FrozenPSP(make_psp().to('cuda').eval().requires_grad_(False), dtype)
    x = torch.rand(2, 3, 32, 32, device='cuda')
    gpu.clear()
    found = invert(frozen, x, n_iters=2)
    within_budget(gpu, name)
    if dtype == torch.float32:
        refine(frozen, x, found.ws, n_steps=2)
        within_budget(gpu, 'refinement')


def test_features_grouping_and_pictures(gpu: PretendedGPU) -> None:
    extract_features(content_network(), photographs(5, 64).numpy(), device='cuda', batch_size=4)
    images = np.random.default_rng(0).random((3, 32, 32), dtype=np.float32)
    best_correlations(images, images, device=torch.device('cuda'))
    points = np.random.default_rng(0).standard_normal((24, 6))
    for method in ('default', 'published', 'mdav'):
        assign_groups(points, 4, method=method, device='cuda')
    assign_groups(
        points, 4, patients=[str(i // 2) for i in range(24)], policy='together', device='cuda'
    )
    psp = make_psp().to('cuda').eval()
    ws = seed_styles(psp.decoder, [1, 2], psi=0.7, latent_avg=psp.latent_avg[0])
    for noise in ('const', 'random', 'none'):
        list(render(psp.decoder, ws, noise=noise, batch=2))
    loop_styles(ws, 4)
    sample_grid(psp.decoder, n=2, seed=0, device='cuda')
    assert not gpu.faults, gpu.report()
