"""Shared test helpers: golden files, and a pretended GPU for GPU tests where there is none."""

import ctypes
import importlib
import os
import shutil
import signal
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / 'tests' / 'golden'
os.environ.setdefault('MPLBACKEND', 'Agg')
# Arrays are compared with the shapes and dtypes of the signature at every call of these folders'
# functions, in all tests; commands that tests start as processes of their own run without. It takes
# 5 % more CPU in a test of losses and pictures, and 5 s once for importing everything (2 cores of
# an AMD EPYC). KSALSA_TYPED_CALLS=0 turns it off.
TYPED = (
    'utils',
    'models',
    'criteria',
    'datasets',
    'training',
    'anonymization',
    'evaluation',
    'stages',
    'classification',
    'MIA',
    'scripts',
    'benchmarks',
)
if os.environ.get('KSALSA_TYPED_CALLS') != '0':
    jaxtyping.install_import_hook(TYPED, 'typed_calls.check')
# Background jobs of a shell ignore Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def slow_tests():
    """Beginnings of the ids of slow tests."""
    lines = (ROOT / 'tests' / 'slow.txt').read_text(encoding='utf-8').splitlines()
    return tuple(line for line in lines if not line.startswith('#'))


def pytest_collection_modifyitems(items):
    slow = slow_tests()
    for item in items:
        path = item.path.relative_to(ROOT).as_posix()
        if f'{path}::{item.name}'.startswith(slow):
            item.add_marker('slow')


@pytest.fixture(autouse=True)
def exact_float32(request):
    """GPU tests compare float32, which cuDNN would round to TF32 by default."""
    if not request.node.get_closest_marker('gpu'):
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope='session')
def emulated_kernels(tmp_path_factory):
    """The CUDA kernels as C++ (tests/support/cuda_emulation.py); None where there is no g++."""
    from cuda_emulation import compile_emulation  # after the import hook above

    from models.stylegan2.op import build

    if shutil.which('g++') is None:
        return None
    return build.declare(ctypes.CDLL(str(compile_emulation(tmp_path_factory.mktemp('kernels')))))


@pytest.fixture(autouse=True)
def gpu_or_its_pretence(request):
    """GPU tests without a GPU: 'cuda' is pretended, and the kernels are emulated."""
    if not request.node.get_closest_marker('gpu') or torch.cuda.is_available():
        yield
        return
    from pretended_device import pretended_gpu

    with pretended_gpu(request.getfixturevalue('emulated_kernels')) as gpu:
        yield
    assert not gpu.faults, gpu.report()


@pytest.fixture
def gpu():
    """A pretended GPU (tests/support/pretended_device.py), with stand-ins for the kernels."""
    from pretended_device import pretended_gpu

    with pretended_gpu() as found:
        yield found


@pytest.fixture(scope='session')
def golden():
    """golden('name') -> dict of float32 tensors (and raw arrays) of tests/golden/name.npz."""

    def load(name):
        with np.load(GOLDEN / f'{name}.npz') as data:
            return {k: torch.from_numpy(data[k]) for k in data.files}

    return load


def relative_error(got, want):
    """Largest absolute difference over the largest wanted magnitude."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max())


def load_script(name, folder='scripts'):
    """A script as a module, whatever characters its file name has."""
    return importlib.import_module(f'{folder}.{name}')
