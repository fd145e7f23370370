"""Generator, discriminator and their ops against the reference implementation's numbers."""

import json

import numpy as np
import pytest
import scipy.signal
import torch
from conftest import GOLDEN, relative_error
from golden_fill import fill_image, fill_state_dict, fill_tensor
from typed_calls import unchecked

from models.stylegan2 import (
    Discriminator,
    Generator,
    discriminator_from_state,
    generator_from_state,
    load_generator,
    truncate,
)
from models.stylegan2.model import FP16_CLAMP, ModulatedConv2d, set_low_precision
from models.stylegan2.op import fused_leaky_relu, upfirdn2d
from utils.errors import UserError
from utils.io import save_torch

SMALL = {4: 16, 8: 16, 16: 8, 32: 8}


@pytest.fixture(scope='module')
def generator():
    net = Generator(64)
    net.load_state_dict(fill_state_dict(net.state_dict(), equalized=True))
    return net.eval()


def test_upfirdn2d_golden(golden):
    data = golden('upfirdn2d')
    kernels = {'1331': data['kernel_1331'], 'asym': data['kernel_asym']}
    for i, (up, down, pad0, pad1) in enumerate(data['cases'].tolist()):
        for name, kernel in kernels.items():
            x = fill_tensor(f'upfirdn/{i}', (2, 3, 13, 10)).requires_grad_()
            y = upfirdn2d(x, kernel, up=int(up), down=int(down), pad=(pad0, pad1))
            want = data[f'{i}_{name}_y']
            assert y.shape == want.shape
            assert relative_error(y, want) < 1e-5
            y.backward(fill_tensor(f'upfirdn_grad/{i}/{name}', y.shape))
            assert relative_error(x.grad, data[f'{i}_{name}_gx']) < 1e-5


@pytest.mark.parametrize('up,down', [(1, 1), (2, 1), (1, 2), (3, 2), (2, 3)])
def test_upfirdn2d_agrees_with_scipy(up, down):
    rng = np.random.default_rng(up * 10 + down)
    x, taps = rng.standard_normal(11), rng.standard_normal(4)
    want = scipy.signal.upfirdn(taps, x, up, down)
    # scipy pads so that every output of the full convolution exists.
    image = torch.from_numpy(x)[None, None, None, :]
    pad = (3, 3 - (up - 1), 0, 0)
    got = upfirdn2d(
        image, torch.from_numpy(taps)[None], up=up, down=down, pad=(pad[0], pad[1], 0, -(up - 1))
    )[0, 0, 0]
    assert torch.allclose(got, torch.from_numpy(want), atol=1e-12)


@pytest.mark.parametrize(
    'up,down,pad',
    [(1, 1, (0, 0)), (2, 1, (2, 1)), (1, 2, (1, 1)), (2, 1, (-1, 2)), (1, 1, (2, 1, -1, 3))],
)
def test_upfirdn2d_derivatives(up, down, pad):
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(3, 4, dtype=torch.float64)

    def run(x):
        return upfirdn2d(x, kernel, up=up, down=down, pad=pad)

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize(
    'up,down,pad', [(1, 1, (2, 1)), (2, 1, (2, 1)), (1, 2, (1, 1)), (2, 1, (-1, 2)), (3, 2, (2, 3))]
)
@pytest.mark.parametrize('last', [False, True])
def test_upfirdn2d_in_half_precision(up, down, pad, last):
    x = torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    if last:
        x = x.to(memory_format=torch.channels_last)
    kernel = torch.tensor([[1.0, 3, 2, 1], [2, 1, 4, 3], [1, 1, 2, 5]]) / 8
    results = []
    for image in (x, x.double()):
        image = image.detach().requires_grad_()
        y = upfirdn2d(
            image,
            kernel.to(torch.float64 if image.dtype == torch.float64 else torch.float32),
            up=up,
            down=down,
            pad=pad,
        )
        assert y.dtype == image.dtype
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
        results.append((y.double(), image.grad.double()))
    for half, full in zip(*results):
        assert half.shape == full.shape
        assert (half - full).abs().max() < 2e-2 * full.abs().max()  # bfloat16 has 8 bits


def test_upfirdn2d_rejects_bad_arguments():
    x, kernel = torch.randn(1, 1, 3, 3), torch.ones(4, 4)
    with pytest.raises(ValueError, match='smaller than'):
        upfirdn2d(x, kernel)
    with pytest.raises(ValueError, match='1 or more'):
        upfirdn2d(x, kernel, up=0)
    with pytest.raises(ValueError, match='2 or 4'):
        upfirdn2d(x, kernel, pad=(1, 2, 3))
    with pytest.raises(ValueError, match='impl'):
        upfirdn2d(torch.randn(1, 1, 4, 4), kernel, impl='fast')


def test_fused_leaky_relu():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y = fused_leaky_relu(x, bias, clamp=0.5)
    shifted = x + bias[:, None, None]
    want = (torch.where(shifted > 0, shifted, 0.2 * shifted) * 2**0.5).clamp(-0.5, 0.5)
    assert torch.allclose(y, want)
    assert torch.autograd.gradcheck(lambda a, b: fused_leaky_relu(a, b), (x, bias))
    with unchecked(), pytest.raises(ValueError, match='does not fit'):
        fused_leaky_relu(x, bias[:2])


@pytest.mark.parametrize('size', [64, 256, 512])
def test_key_lists(size):
    want = json.loads((GOLDEN / f'rosinality_keys_{size}.json').read_text())
    with torch.device('meta'):
        nets = {'g_ema': Generator(size), 'd': Discriminator(size)}
    for part, net in nets.items():
        listed = {k: list(v) for k, v in want[part].items()}
        assert {k: list(v.shape) for k, v in net.state_dict().items()} == listed


def test_generator_golden(golden, generator):
    data = golden('generator64')
    w = fill_tensor('gen/w', (2, 10, 512), 0.5).requires_grad_()
    z, z2 = fill_tensor('gen/z', (2, 512)), fill_tensor('gen/z2', (2, 512))
    image = generator.synthesis(w)
    assert relative_error(image, data['image_w']) < 1e-4
    image.backward(fill_tensor('gen/grad', image.shape))
    # The reference is itself 3e-4 away from the float64 gradient: rounding flips a few kinks of
    # the leaky ReLU.
    assert relative_error(w.grad, data['grad_w']) < 1e-3
    with torch.no_grad():
        mean = fill_tensor('gen/mean', (1, 512), 0.1)[0]
        latent = generator.broadcast(generator.mapping(z))
        assert relative_error(latent, data['latent_z']) < 1e-4
        assert relative_error(truncate(latent, mean, 0.7), data['latent_trunc']) < 1e-4
        assert relative_error(generator(z), data['image_z']) < 1e-4
        got = generator(z, truncation=0.7, truncation_latent=mean)
        assert relative_error(got, data['image_trunc']) < 1e-4
        assert relative_error(generator(z, z2=z2, mix_at=4), data['image_mix']) < 1e-4


def test_discriminator_golden(golden):
    data = golden('discriminator64')
    net = Discriminator(64)
    net.load_state_dict(fill_state_dict(net.state_dict(), equalized=True))
    x = fill_image('disc/x', (8, 3, 64, 64)).requires_grad_()
    logits = net(x)
    assert relative_error(logits, data['logits']) < 1e-4
    logits.sum().backward()
    # One kink of a leaky ReLU falls the other way in the reference (float64 agrees with us), which
    # changes the gradient in one receptive field of one image by up to 0.9 % of its maximum.
    error = (x.grad - data['grad_x']).abs() / data['grad_x'].abs().max()
    assert (error < 1e-4).float().mean() > 0.99 and error.max() < 1e-2


def test_discriminator_takes_any_batch():
    net = Discriminator(32, channels=SMALL)
    for n in (1, 5, 6, 7):
        assert net(torch.randn(n, 3, 32, 32)).shape == (n, 1)


def test_architecture_is_read_from_the_weights(tmp_path):
    g = Generator(32, style_dim=24, n_mlp=3, channels=SMALL)
    d = Discriminator(32, channels=SMALL)
    save_torch(
        tmp_path / 'g.pt',
        {'g_ema': g.state_dict(), 'd': d.state_dict(), 'latent_avg': torch.zeros(24)},
    )
    loaded, latent_avg = load_generator(tmp_path / 'g.pt')
    assert (loaded.size, loaded.style_dim, loaded.n_mlp) == (32, 24, 3)
    assert loaded.channels == SMALL and latent_avg.shape == (24,)
    assert not any(p.requires_grad for p in loaded.parameters())
    z = torch.randn(2, 24)
    assert torch.equal(loaded(z), g(z))
    assert discriminator_from_state(d.state_dict()).channels == SMALL


def test_bad_weight_files_are_user_errors(tmp_path):
    (tmp_path / 'text.pt').write_text('not a checkpoint')
    save_torch(tmp_path / 'other.pt', {'weights': torch.zeros(3)})
    for name, message in (
        ('text.pt', 'not a generator file'),
        ('other.pt', '"g_ema"'),
        ('absent.pt', 'not found'),
    ):
        with pytest.raises(UserError, match=message):
            load_generator(tmp_path / name)
    with pytest.raises(UserError, match='no StyleGAN2 generator'):
        generator_from_state({'input.input': torch.zeros(1, 8, 4, 4)})


def test_shapes_are_checked():
    with pytest.raises(ValueError, match='power of two'):
        Generator(48)
    with pytest.raises(ValueError, match='channel table'):
        Generator(64, channels=SMALL)
    g = Generator(32, style_dim=16, channels=SMALL)
    with pytest.raises(ValueError, match='want \\[N, 8, 16\\]'):
        g.synthesis(torch.zeros(1, 10, 16))


@pytest.mark.parametrize('dtype,limit', [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_low_precision_stays_close(dtype, limit):
    torch.manual_seed(0)
    g, d = Generator(32, style_dim=16, channels=SMALL), Discriminator(32, channels=SMALL)
    z = torch.randn(4, 16)
    with torch.no_grad():
        image = g(z)
        logits = d(image)
        low = set_low_precision(g, dtype)(z)
        assert low.dtype == torch.float32
        assert relative_error(low, image) < limit
        assert (set_low_precision(d, dtype)(image) - logits).abs().max() < 10 * limit


def test_noise_modes():
    g = Generator(32, style_dim=16, channels=SMALL)
    for layer in (g.conv1, *g.convs):
        layer.noise.weight.data.fill_(0.5)
    w = torch.randn(3, 16)
    ws = g.broadcast(w)
    with torch.no_grad():
        assert torch.equal(g.synthesis(ws), g.synthesis(ws))
        draws = [
            g.synthesis(ws, noise='random', generator=torch.Generator().manual_seed(s))
            for s in (1, 1, 2)
        ]
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
        assert not torch.equal(g.synthesis(ws, noise='none'), g.synthesis(ws))


@pytest.mark.parametrize('upsample', [False, True])
def test_modulated_convolution_keeps_the_range_of_float16(upsample: bool) -> None:
    """Weights with a common part, and inputs at the clamp: the largest sums there can be."""
    conv = ModulatedConv2d(512, 16, 3, 8, upsample=upsample)
    torch.nn.init.ones_(conv.weight)
    torch.nn.init.zeros_(conv.modulation.weight)  # all styles are 1
    x = torch.full((2, 512, 6, 6), FP16_CLAMP, dtype=torch.float16, requires_grad=True)
    y = conv(x, torch.zeros(2, 8), bias=torch.zeros(16, dtype=torch.float16))
    # In the middle, all 4608 products count: 256 * sqrt(4608).
    assert y[0, 0, 3, 3].item() == pytest.approx(FP16_CLAMP * 4608**0.5, rel=0.01)
    y.float().clamp(-FP16_CLAMP, FP16_CLAMP).square().mean().backward()
    assert y.isfinite().all()
    assert all(v.grad.isfinite().all() for v in (x, *conv.parameters()))


def test_batches_are_judged_apart_in_one_pass():
    torch.manual_seed(0)
    net, x = Discriminator(32, channels=SMALL, mbstd_group=2), torch.randn(8, 3, 32, 32)
    apart = torch.cat([net(part) for part in x.chunk(2)])
    assert torch.allclose(net(x, parts=2), apart, atol=1e-5)
    assert not torch.allclose(net(x), apart, atol=1e-3)


def test_the_range_of_float16_changes_no_derivative():
    torch.manual_seed(0)
    conv = ModulatedConv2d(8, 8, 3, 16)
    x, w, weights = torch.randn(2, 8, 6, 6), torch.randn(2, 16), torch.randn(2, 8, 6, 6)
    found = []
    for dtype in (torch.float32, torch.float16):
        y = conv(x.to(dtype), w).float()
        found.append(
            torch.autograd.grad((y * weights).sum(), [conv.weight, conv.modulation.weight])
        )
    for full, half in zip(*found):
        assert (half - full).norm() < 0.01 * full.norm()
