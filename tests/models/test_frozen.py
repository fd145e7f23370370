"""The fast synthesis of a frozen generator: pictures and gradients are the generator's."""

import pytest
import torch
from conftest import relative_error

from models.encoders import build_encoder
from models.psp import PSP, FrozenPSP, invert, refine
from models.stylegan2 import Generator
from models.stylegan2.frozen import FrozenSynthesis


def small_generator(size=64, seed=0):
    """Random weights, with noise, biases and constants that all leave a mark."""
    torch.manual_seed(seed)
    net = Generator(size, style_dim=24, n_mlp=2, channels={4: 16, 8: 12, 16: 16, 32: 8, 64: 8})
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name.endswith(('noise.weight', 'bias')):
                value.add_(0.3 * torch.randn(value.shape))
    return net.eval().requires_grad_(False)


def picture_and_gradient(synthesis, ws, weighting):
    ws = ws.clone().requires_grad_(True)
    image = synthesis(ws)
    (grad,) = torch.autograd.grad((image * weighting).sum(), ws)
    return image.detach(), grad


@pytest.mark.parametrize('drawn', [False, True])
@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.08)]
)
def test_equals_the_generator(dtype, tolerance, drawn):
    net = small_generator()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    frozen = FrozenSynthesis(net.to(wide), dtype=dtype)
    draw = torch.Generator().manual_seed(1)
    ws = torch.randn(3, net.n_latent, 24, generator=draw, dtype=wide)
    weighting = torch.randn(3, 3, 64, 64, generator=draw, dtype=wide)
    tolerance *= 1.5 if drawn else 1  # in bfloat16 the maps are rounded once more
    noise = [m.to(wide) for m in net.noise_maps('random', 3, 'cpu', draw)] if drawn else None
    exact = [m.double() for m in noise] if drawn else 'stored'
    want = picture_and_gradient(
        lambda ws: net.double().synthesis(ws, noise=exact), ws.double(), weighting.double()
    )
    got = picture_and_gradient(lambda ws: frozen(ws, noise), ws, weighting)
    for a, b in zip(got, want):
        assert a.dtype == wide and a.shape == b.shape
        # In bfloat16 single values move when an activation changes its sign; the whole does not.
        assert float((a - b).norm() / b.norm()) < tolerance
        if dtype != torch.bfloat16:
            assert relative_error(a, b) < tolerance
    # Every latent of every image gets its own gradient.
    for a, b in zip(got[1].flatten(0, 1), want[1].flatten(0, 1)):
        assert float((a - b).norm() / b.norm()) < 4 * tolerance


def test_images_do_not_depend_on_their_batch():
    net = small_generator()
    frozen = FrozenSynthesis(net)
    ws = torch.randn(3, net.n_latent, 24, generator=torch.Generator().manual_seed(2))
    weighting = torch.ones(1, 3, 64, 64)
    together = picture_and_gradient(frozen, ws, weighting)
    for i in range(3):
        alone = picture_and_gradient(frozen, ws[i : i + 1], weighting)
        for a, b in zip(together, alone):
            assert relative_error(a[i], b[0]) < 1e-5


def test_same_picture_without_gradients_and_after_the_generator_changed():
    net = small_generator()
    frozen = FrozenSynthesis(net)
    ws = torch.randn(2, net.n_latent, 24, generator=torch.Generator().manual_seed(3))
    want, _ = picture_and_gradient(frozen, ws, torch.ones(1))
    net.conv1.conv.weight.zero_()
    with torch.no_grad():
        assert torch.equal(frozen(ws), want)


def test_refuses_latents_of_another_generator():
    frozen = FrozenSynthesis(small_generator())
    with pytest.raises(ValueError, match=r'want \[N, 10, 24\]'):
        frozen(torch.zeros(1, 12, 24))


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_frozen_inversion_equals_inversion(dtype, tolerance):
    torch.manual_seed(0)
    decoder = Generator(32, style_dim=16, n_mlp=2, channels={4: 8, 8: 8, 16: 8, 32: 8})
    encoder = build_encoder('LightEncoder', n_styles=8, input_size=32, style_dim=16, width=8)
    psp = PSP(encoder, decoder, 0.1 * torch.randn(16), 32).eval().requires_grad_(False)
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    want = invert(psp, x, n_iters=3, keep_iterations=True)
    got = invert(FrozenPSP(psp, dtype), x, n_iters=3, keep_iterations=True)
    for a, b in zip(got, want):
        assert a.dtype == torch.float32
        assert (a - b).norm() / b.norm() < tolerance
    assert next(psp.parameters()).dtype == torch.float32
    refined, error = refine(FrozenPSP(psp), x, want.ws, n_steps=2)
    expected = refine(psp, x, want.ws, n_steps=2)
    assert relative_error(refined, expected[0]) < 1e-3
    assert relative_error(error, expected[1]) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-3), (torch.bfloat16, 0.08)])
def test_equals_the_generator_on_a_gpu(dtype, tolerance):
    net = small_generator()
    ws = torch.randn(2, net.n_latent, 24, generator=torch.Generator().manual_seed(4))
    weighting = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    want = picture_and_gradient(net.synthesis, ws, weighting)
    frozen = FrozenSynthesis(net.cuda(), dtype=dtype)
    got = picture_and_gradient(frozen, ws.cuda(), weighting.cuda())
    # The 2-norm: single pixels are off by up to a quarter in bfloat16, on CPUs too.
    for a, b in zip(got, want):
        assert (a.cpu() - b).norm() / b.norm() < tolerance


@pytest.mark.gpu
def test_inverts_on_a_gpu_as_on_a_cpu():
    net = small_generator()
    encoder = build_encoder(
        'LightEncoder', n_styles=net.n_latent, input_size=64, style_dim=24, width=8
    )
    psp = PSP(encoder, net, torch.zeros(24), 64).eval().requires_grad_(False)
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(6)) * 2 - 1
    want = invert(FrozenPSP(psp), x, n_iters=3)
    got = invert(FrozenPSP(psp.cuda()), x.cuda(), n_iters=3)
    assert relative_error(got.ws.cpu(), want.ws) < 1e-3
    assert relative_error(got.recon.cpu(), want.recon) < 1e-3
