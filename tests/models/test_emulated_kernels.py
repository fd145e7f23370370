"""The CUDA kernels, emulated, do what their definitions say: no GPU needed, only g++."""

import ctypes
import itertools
import shutil
import subprocess
import sys
import types
from unittest import mock

import pytest
import torch
from conftest import ROOT
from cuda_emulation import compile_emulation, counter, emulated, random_cases

from models.stylegan2.op import build, fused_leaky_relu, proof, upfirdn2d

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FACTORS = [(1, 1, (2, 1)), (2, 1, (2, 1)), (2, 1, (-1, 2)), (1, 2, (2, 2, 0, 1)), (3, 2, (2, 1))]
pytestmark = pytest.mark.skipif(shutil.which('g++') is None, reason='no g++ on this machine')


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    return compile_emulation(tmp_path_factory.mktemp('emulation'))


@pytest.fixture(params=[1 << 30, 2], ids=['one pass', 'grid stride'])
def kernels(request, library):
    with emulated(library) as found:
        counter(found, 'emulated_max_blocks').value = request.param
        yield found
        counter(found, 'emulated_max_blocks').value = 1 << 30


def test_emulated_half_precision_is_that_of_pytorch(library):
    with emulated(library) as found:
        found.emulated_from_half.restype = ctypes.c_float
        found.emulated_to_half.argtypes = [ctypes.c_float]
        every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
        values = every[torch.isfinite(every)][::7].float()
        for value in (values * 1.0007).tolist():
            want = torch.tensor(value).half().view(torch.int16).item() & 0xFFFF
            assert found.emulated_to_half(value) & 0xFFFF == want
        codes = (every[::11].view(torch.int16).int() & 0xFFFF).tolist()
        got = torch.tensor([found.emulated_from_half(c) for c in codes])
        assert torch.allclose(got, every[::11].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize('dtype', list(TOLERANCE))
@pytest.mark.parametrize(
    ('factors', 'shape', 'last'),
    list(itertools.product(FACTORS, [(2, 8, 37, 23), (3, 1, 9, 70), (2, 4, 4, 4)], [False, True])),
)
def test_resampling_equals_the_pytorch_path(kernels, factors, shape, last, dtype):
    up, down, pad = factors
    layout = torch.channels_last if last else torch.contiguous_format
    for kh, kw in ((4, 4), (3, 2), (1, 12)):
        if shape[3] * up + sum(pad[:2]) < kw or shape[2] * up + sum(pad[-2:]) < kh:
            continue
        torch.manual_seed(0)
        kernel, x = torch.rand(kh, kw) / (kh * kw), torch.randn(shape).to(dtype)
        results = []
        for impl in ('ref', 'cuda'):
            leaf = x.contiguous(memory_format=layout).requires_grad_()
            before = counter(kernels, 'emulated_launches').value
            y = upfirdn2d(leaf, kernel, up=up, down=down, pad=pad, impl=impl)
            assert (counter(kernels, 'emulated_launches').value > before) == (impl == 'cuda')
            weight = torch.linspace(-1, 1, y.numel()).to(dtype).view(y.shape)
            (grad,) = torch.autograd.grad((y * weight * y).sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad(grad.square().sum(), leaf)
            results.append((y, grad, second))
        for want, got in zip(*results):
            assert got.dtype == dtype and got.shape == want.shape
            assert (got - want).abs().max() < 4 * TOLERANCE[dtype] * want.abs().max().clamp(min=1)


@pytest.mark.parametrize('dtype', list(TOLERANCE))
def test_contiguous_outputs_of_one_pixel(kernels, dtype):
    torch.manual_seed(0)
    for channels in (4, 8):
        x, kernel = torch.randn(2, channels, 4, 4).to(dtype), torch.rand(4, 4) / 16
        want = upfirdn2d(x, kernel, impl='ref')
        got = upfirdn2d(x, kernel, impl='cuda')
        assert got.shape == (2, channels, 1, 1)
        assert (got - want).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize('dtype', list(TOLERANCE))
@pytest.mark.parametrize('clamp', [None, 0.7, 181.01933598375618])
def test_activation_equals_the_pytorch_path(kernels, clamp, dtype):
    for shape in ((2, 8, 16, 16), (3, 5, 7, 9), (4, 16)):
        torch.manual_seed(0)
        # No value near a kink, where rounding alone decides on the derivative.
        size = torch.rand(shape) * 0.8 + 0.1 + torch.randint(0, 2, shape) * 1.0
        sign = torch.randint(0, 2, shape).mul(2).sub(1)
        x = (size * (clamp or 1) * sign / 2**0.5).to(dtype)
        results = []
        for impl in ('ref', 'cuda'):
            leaf = x.clone().requires_grad_()
            y = fused_leaky_relu(leaf, clamp=clamp, slope=1.0 if clamp else 0.2, impl=impl)
            (grad,) = torch.autograd.grad((y * y).sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad(grad.square().sum(), leaf)
            results.append((y, grad, second))
        for want, got in zip(*results):
            scale = want.abs().max().clamp(min=1)
            assert (got - want).abs().max() <= 4 * TOLERANCE[dtype] * scale


def test_random_cases_agree_with_the_definitions(kernels):
    assert random_cases(150, seed=1) == []


def test_no_access_outside_of_memory(tmp_path):
    """Random cases under AddressSanitizer and UndefinedBehaviorSanitizer."""
    runtimes = [
        subprocess.run(
            ['g++', f'-print-file-name={name}'], capture_output=True, text=True
        ).stdout.strip()
        for name in ('libasan.so', 'libubsan.so')
    ]
    if not all('/' in path for path in runtimes):
        pytest.skip('g++ has no sanitizers')
    library = compile_emulation(tmp_path, sanitize='address,undefined')
    done = subprocess.run(
        [sys.executable, 'tests/support/cuda_emulation.py', str(library), '40', '2'],
        cwd=ROOT,
        env={
            'PYTHONPATH': str(ROOT),
            'PATH': '/usr/bin:/bin',
            'LD_PRELOAD': ' '.join(runtimes),
            'ASAN_OPTIONS': 'detect_leaks=0',
            'OMP_NUM_THREADS': '1',
            'UBSAN_OPTIONS': 'halt_on_error=1',
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'runtime error' not in done.stderr, done.stderr[-3000:]


def test_kernels_prove_themselves_and_wrong_ones_do_not(library):
    cpu = torch.device('cpu')
    with emulated(library) as found:
        assert proof.difference('upfirdn2d', cpu) is None
        assert proof.difference('activation', cpu) is None

        def moved(x, taps, y, sizes, up, down, left, *rest):
            return found.ksalsa_upfirdn2d(x, taps, y, sizes, up, down, left + 1, *rest)

        def steeper(*arguments):
            return found.ksalsa_activate(*arguments[:7], arguments[7] + 0.1, *arguments[8:])

        wrong = types.SimpleNamespace(ksalsa_upfirdn2d=moved, ksalsa_activate=steeper)
        with mock.patch.object(build, 'library', lambda index: wrong):
            assert 'blur' in proof.difference('upfirdn2d', cpu)
            assert 'bias' in proof.difference('activation', cpu)
        failing = types.SimpleNamespace(ksalsa_upfirdn2d=lambda *arguments: 98)
        with mock.patch.object(build, 'library', lambda index: failing):
            assert 'CUDA error 98' in proof.difference('upfirdn2d', cpu)
