"""The fused CUDA ops: they compile without a GPU, and on one they equal the PyTorch path."""

import ctypes
import itertools
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from models.stylegan2.op import build, fused_leaky_relu, upfirdn2d

# Rounding of one value plus the order of sixteen sums, relative to values of order one.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def test_kernels_compile_without_a_gpu(tmp_path):
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    path = build.compile_kernels('sm_90', tmp_path / 'with space')
    assert build.compile_kernels('sm_90', tmp_path / 'with space') == path
    symbols = path.read_bytes()
    assert b'ksalsa_upfirdn2d' in symbols and b'ksalsa_activate' in symbols
    assert sorted(p.name for p in path.parent.iterdir()) == ['kernels.so']


def test_compiler_errors_name_the_cause_and_the_remedy(tmp_path, monkeypatch):
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    broken = tmp_path / 'kernels.cu'
    broken.write_text('int main() { return undeclared; }')
    monkeypatch.setattr(build, 'SOURCE', broken)
    with pytest.raises(build.BuildError, match='undeclared.*pip install'):
        build.compile_kernels('sm_90', tmp_path / 'out')
    assert not list((tmp_path / 'out').glob('build-*'))


def test_missing_compiler_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(build.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setattr(build.shutil, 'which', lambda name: None)
    for variable in ('CUDA_HOME', 'CUDA_PATH'):
        monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(build.BuildError, match='"cuda-toolkit|CUDA toolkit .*CUDA_HOME'):
        build.find_nvcc()


@pytest.mark.parametrize(
    'version,remedy',
    [('12.8', 'install the CUDA toolkit 12.8'), ('13.0', 'pip install "cuda-toolkit')],
)
def test_the_remedy_fits_the_cuda_version(
    monkeypatch: pytest.MonkeyPatch, version: str, remedy: str
) -> None:
    monkeypatch.setattr(torch.version, 'cuda', version)
    assert build.toolkit_hint().startswith(remedy)


def without_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail() -> Path:
        raise RuntimeError('Could not determine home directory.')

    monkeypatch.setattr(build.Path, 'home', fail)


def without_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    monkeypatch.setenv('KSALSA_CACHE', str(tmp_path / 'file'))
    monkeypatch.setattr(build, 'find_nvcc', lambda: Path('nvcc'))
    monkeypatch.setattr(build.shutil, 'which', lambda name: name)


def without_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, 'SOURCE', tmp_path / 'kernels.cu')


@pytest.mark.parametrize('spoil', [without_home, without_room, without_source])
def test_first_use_falls_back_whatever_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil
) -> None:
    for variable in ('KSALSA_CACHE', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: (9, 0))
    spoil(monkeypatch, tmp_path)
    build.library.cache_clear()
    assert build.library(0) is None
    build.library.cache_clear()
    assert 'KSALSA_CACHE' in caplog.text
    with pytest.raises(build.BuildError):
        build.load_kernels(0)


def test_the_cache_follows_its_variable_without_a_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_home(monkeypatch, tmp_path)
    monkeypatch.delenv('KSALSA_CACHE', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert tmp_path in build.cache_dir('sm_90').parents


NVCC = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
sleep 0.5; echo built > "$2"
"""


def test_processes_of_one_number_build_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two machines with a common cache may have the same process numbers."""
    compiler = tmp_path / 'nvcc'
    compiler.write_text(NVCC)
    compiler.chmod(0o755)
    monkeypatch.setattr(build, 'find_nvcc', lambda: compiler)
    monkeypatch.setenv('NVCC_CCBIN', 'g++')
    monkeypatch.setattr(build.os, 'getpid', lambda: 7)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(build.compile_kernels, 'sm_90', tmp_path / 'cache') for _ in range(2)]
    assert [job.result() for job in jobs] == [tmp_path / 'cache' / 'kernels.so'] * 2
    assert [p.name for p in (tmp_path / 'cache').iterdir()] == ['kernels.so']


def test_cpu_tensors_take_the_pytorch_path():
    x = torch.randn(1, 2, 4, 4)
    assert build.get(x, 'auto', 'upfirdn2d') is None
    with pytest.raises(build.BuildError, match='CUDA device'):
        fused_leaky_relu(x, impl='cuda')


def test_declared_functions_match_the_source():
    class Fake:
        ksalsa_upfirdn2d = type('F', (), {})()
        ksalsa_activate = type('F', (), {})()

    fake = build.declare(Fake())
    source = build.SOURCE.read_text()
    for name in ('ksalsa_upfirdn2d', 'ksalsa_activate'):
        signature = source[source.index(f'int {name}(') :].split(')')[0]
        assert len(getattr(fake, name).argtypes) == signature.count(',') + 1
    assert fake.ksalsa_activate.argtypes[4] is ctypes.c_int64


# Registers a thread may use: 64 warps share 65,536 registers, so 64 registers keep 32 warps in
# flight. Bytes of one store: what makes a warp's row one transaction.
@pytest.mark.parametrize('architecture', ['sm_80', 'sm_90', 'sm_120'])
def test_kernels_stay_in_registers_and_store_wide(tmp_path, architecture):
    try:
        nvcc = build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [
            nvcc,
            '-O3',
            '-std=c++17',
            f'-arch={architecture}',
            '-Xptxas',
            '-v',
            '-keep',
            '-keep-dir',
            tmp_path,
            '-shared',
            '-Xcompiler',
            '-fPIC',
            '-cudart',
            'none',
            build.SOURCE,
            '-o',
            tmp_path / 'kernels.so',
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill "
        r'stores.*?Used (\d+) registers',
        done.stderr,
        re.S,
    )
    half = [f for f in found if 'filter_small' in f[0] and '6__halfLi4' in f[0]]
    assert len(half) == 3 and len(found) >= 36
    assert all(stack == spilled == '0' for _, stack, spilled, _ in found)
    assert max(int(registers) for *_, registers in half) <= 80
    code = next(tmp_path.glob('*.ptx')).read_text()
    for name, *_ in half:
        body = code.split(f'.entry {name}(')[1].split('.entry ')[0]
        assert re.search(r'st\.global\.wb\.v2\.[bu]32', body) and 'st.global.u16' not in body


CASES = list(
    itertools.product(
        [
            (1, 1, (0, 0)),
            (1, 1, (2, 1)),
            (2, 1, (2, 1)),
            (2, 1, (-1, 2)),
            (1, 2, (1, 1)),
            (1, 2, (2, 2, 0, 1)),
            (3, 2, (2, 1)),
            (2, 2, (1, 2)),
        ],
        [(2, 8, 37, 23), (1, 3, 16, 16), (3, 1, 9, 70)],
        [False, True],
    )
)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', list(TOLERANCE))
@pytest.mark.parametrize('factors,shape,last', CASES)
def test_upfirdn2d_pair(factors, shape, last, dtype):
    up, down, pad = factors
    layout = torch.channels_last if last else torch.contiguous_format
    torch.manual_seed(0)
    for kh, kw in ((4, 4), (3, 2), (1, 12), (5, 5)):
        kernel = torch.rand(kh, kw, device='cuda') / (kh * kw)
        x = torch.randn(shape, device='cuda', dtype=dtype).contiguous(memory_format=layout)
        results = {}
        for impl in ('ref', 'cuda'):
            inp = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = upfirdn2d(inp, kernel, up=up, down=down, pad=pad, impl=impl)
            weight = torch.linspace(-1, 1, y.numel(), device='cuda', dtype=dtype).view(y.shape)
            (grad,) = torch.autograd.grad((y * weight * y).sum(), inp, create_graph=True)
            (second,) = torch.autograd.grad(grad.square().sum(), inp)
            results[impl] = y, grad, second
        for got, want in zip(results['cuda'], results['ref']):
            assert got.dtype == dtype and got.shape == want.shape
            scale = want.abs().max().clamp(min=1)
            assert ((got - want).abs().max() / scale) < 4 * TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', list(TOLERANCE))
@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('shape', [(2, 8, 16, 16), (3, 5, 7, 9), (4, 16)])
def test_fused_leaky_relu_pair(shape, last, dtype):
    if last and len(shape) != 4:
        pytest.skip('no channels-last layout for a matrix')
    layout = torch.channels_last if last else torch.contiguous_format
    torch.manual_seed(0)
    # A bias of quarters and values in the middle between them: nothing comes near zero or the
    # clamp, where rounding alone decides on the derivative.
    x = (
        torch.randint(-9, 9, shape)
        .add(0.5)
        .div(4)
        .to('cuda', dtype)
        .contiguous(memory_format=layout)
    )
    bias = torch.randint(-2, 3, shape[1:2]).div(4).to('cuda', dtype)
    for use_bias, clamp in ((True, None), (False, 0.7), (True, 0.7)):
        results = {}
        for impl in ('ref', 'cuda'):
            inp = x.clone(memory_format=torch.preserve_format).requires_grad_()
            b = bias.clone().requires_grad_()
            y = fused_leaky_relu(inp, b if use_bias else None, clamp=clamp, impl=impl)
            wanted = [inp, b] if use_bias else [inp]
            grads = torch.autograd.grad((y * y).sum(), wanted, create_graph=True)
            (second,) = torch.autograd.grad(grads[0].square().sum(), inp)
            results[impl] = y, *grads, second
        for got, want in zip(results['cuda'], results['ref']):
            scale = want.abs().max().clamp(min=1)
            assert ((got - want).abs().max() / scale) < 4 * TOLERANCE[dtype]


@pytest.mark.gpu
def test_cuda_ops_pass_gradcheck():
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, device='cuda', requires_grad=True)
    kernel = torch.rand(4, 4, device='cuda')
    bias = torch.randn(2, dtype=torch.float64, device='cuda', requires_grad=True)

    def act(x, bias):
        return fused_leaky_relu(x, bias, impl='cuda')

    assert torch.autograd.gradcheck(act, (x, bias))
    if torch.cuda.is_available():  # the pretended device does not follow autograd's own zeros
        assert torch.autograd.gradgradcheck(act, (x, bias), fast_mode=True)
    for up, down in ((1, 1), (2, 1), (1, 2)):

        def fir(x, up=up, down=down):
            return upfirdn2d(x, kernel, up=up, down=down, pad=(2, 1), impl='cuda')

        assert torch.autograd.gradcheck(fir, x)
        assert torch.autograd.gradgradcheck(fir, x, fast_mode=True)
