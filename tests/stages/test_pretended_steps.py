"""The steps to a release on a pretended GPU: nothing mixed, few waits (support/budgets.py)."""

import importlib
from unittest import mock

import numpy as np
import pytest
import torch
from budgets import more_within_budget, within_budget
from pretended_device import PretendedGPU
from restyle_nets import make_psp, photographs

from anonymization.grouping import assign_groups
from anonymization.optimize import Group, GroupOptimizer, OptimizeConfig
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
from training.stylegan2_networks import sample_grid
from utils.cuda_graphs import captured


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
