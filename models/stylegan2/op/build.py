"""Compiles and loads the CUDA kernels on first use; says once what to do when it can't.

The kernels have a plain C interface, so they are built with nvcc alone, kept in a cache keyed by
source, PyTorch version and GPU architecture, and called through ctypes. Each op proves itself on
small inputs before it is used (op/proof.py). Nothing here runs at import.
"""

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name('kernels.cu')
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


class BuildError(RuntimeError):
    """The kernels could not be compiled or loaded; the message names the remedy."""


def toolkit_hint() -> str:
    """How to get the compiler that matches PyTorch: a pip command, or which toolkit to install."""
    version = torch.version.cuda or '13'
    if int(version.split('.')[0]) < 13:  # the wheels before CUDA 13 hold no nvcc
        return (
            f'install the CUDA toolkit {version} (of your distribution, or from NVIDIA) and '
            'set CUDA_HOME to its folder'
        )
    return f'pip install "cuda-toolkit[nvcc,cccl,crt]=={version}.*"'


def find_nvcc() -> Path:
    """Path of nvcc: CUDA_HOME, then the PyPI compiler beside PyTorch's CUDA libraries, then PATH.

    Raises BuildError when there is none.
    """
    candidates = []
    for variable in ('CUDA_HOME', 'CUDA_PATH'):
        if os.environ.get(variable):
            candidates.append(Path(os.environ[variable]) / 'bin' / 'nvcc')
    spec = importlib.util.find_spec('nvidia')
    for root in (spec.submodule_search_locations if spec else None) or []:
        candidates += sorted(Path(root).glob('cu*/bin/nvcc'), reverse=True)
    if found := shutil.which('nvcc'):
        candidates.append(Path(found))
    for path in candidates:
        if path.is_file():
            return path
    raise BuildError(f'no CUDA compiler (nvcc) found; {toolkit_hint()}')


def cache_dir(architecture: str) -> Path:
    """Where the built library for (source, PyTorch, architecture) lives.

    OSError without the source; RuntimeError where a user has no home and no variable is set.
    """
    root = os.environ.get('KSALSA_CACHE')
    if not root:
        home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
        root = Path(home) / 'k-salsa'
    key = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    return Path(root) / f'ops-{key}-torch{torch.__version__}-{architecture}'


def compile_kernels(architecture: str, folder: Path | None = None) -> Path:
    """Builds the library for one architecture ('sm_90') with nvcc; returns its path.

    A library that is already in the cache is returned as it is. Raises BuildError with the
    compiler's first complaint and the remedy, OSError when the cache cannot be written to.
    """
    folder = Path(folder) if folder else cache_dir(architecture)
    library = folder / 'kernels.so'
    if library.is_file():
        return library
    nvcc = find_nvcc()
    if not os.environ.get('NVCC_CCBIN') and not shutil.which('g++'):
        raise BuildError(
            'nvcc needs a C++ compiler (g++), and there is none; install it with your '
            "distribution's package manager"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # Processes that race, on machines with a common cache too, build apart and rename.
    with tempfile.TemporaryDirectory(prefix='build-', dir=folder) as work:
        built = Path(work) / 'kernels.so'
        # The runtime is the one PyTorch has loaded, so none is linked in.
        done = subprocess.run(
            [
                str(nvcc),
                '-O3',
                '-std=c++17',
                f'-arch={architecture}',
                '-shared',
                '-Xcompiler',
                '-fPIC',
                '-cudart',
                'none',
                str(SOURCE),
                '-o',
                str(built),
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = [
                line
                for line in (done.stdout + done.stderr).splitlines()
                if re.search(r'\b(error|fatal)\b.*:|not found', line, re.I)
            ]
            reason = lines[0].strip() if lines else f'nvcc ended with code {done.returncode}'
            raise BuildError(f'the CUDA ops did not compile ({reason}); {toolkit_hint()}')
        os.replace(built, library)
    return library


@functools.cache
def library(device_index: int) -> ctypes.CDLL | None:
    """The loaded kernels for one GPU, or None; the reason is logged once per process and GPU."""
    try:
        return load_kernels(device_index)
    except BuildError as error:
        log.warning('using the slower PyTorch path for upfirdn2d and activations: %s', error)
        return None


@functools.cache
def trusted(op: str, device_index: int) -> bool:
    """Whether the loaded kernel of `op` computes what its PyTorch twin does on this GPU.

    op: 'upfirdn2d' or 'activation'. Tried once per process, op and GPU; a difference is logged.
    """
    from models.stylegan2.op import proof  # which imports the ops

    difference = proof.difference(op, torch.device('cuda', device_index))
    if difference is None:
        return True
    log.warning(
        'using the slower PyTorch path for %s: the kernel differs from it on this GPU '
        '(%s); please report this with the GPU and the versions of PyTorch and CUDA',
        op,
        difference,
    )
    return False


def load_kernels(device_index: int) -> ctypes.CDLL:
    """Builds if needed and loads the kernels for one GPU; BuildError when that fails."""
    major, minor = torch.cuda.get_device_capability(device_index)
    try:
        path = compile_kernels(f'sm_{major}{minor}')
    except BuildError:
        raise
    except (OSError, RuntimeError) as error:
        raise BuildError(
            f'the CUDA ops cannot be kept ({error}); set KSALSA_CACHE to a folder '
            'that can be written to'
        ) from error
    try:
        return declare(ctypes.CDLL(str(path)))
    except OSError as error:
        raise BuildError(f'{path} does not load ({error}); delete it and try again') from error


def declare(kernels: ctypes.CDLL) -> ctypes.CDLL:
    """Sets the argument types of the C functions."""
    i32, i64, f32, ptr = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    kernels.ksalsa_upfirdn2d.argtypes = [ptr, ptr, ptr, ctypes.POINTER(i64), *[i32] * 7, ptr]
    kernels.ksalsa_activate.argtypes = [ptr, ptr, ptr, ptr, i64, i64, i64, f32, f32, f32, i32, ptr]
    return kernels


def kernels_of(x: torch.Tensor) -> ctypes.CDLL:
    """The kernels for a tensor on a CUDA device; BuildError when there are none."""
    return library(x.device.index) or load_kernels(x.device.index)


def get(x: torch.Tensor, impl: str, op: str) -> ctypes.CDLL | None:
    """The kernels for tensor `x`, or None when the PyTorch path is to be taken.

    impl: 'auto' takes them on CUDA tensors where they build and `op` ('upfirdn2d' or
    'activation') has proven itself; 'cuda' insists (BuildError); 'ref' never does.
    """
    if impl not in ('auto', 'ref', 'cuda'):
        raise ValueError(f'impl={impl!r}, want auto, ref or cuda')
    if impl == 'cuda':
        if not x.is_cuda:
            raise BuildError("impl='cuda' needs a tensor on a CUDA device")
        return kernels_of(x)
    if impl == 'ref' or not x.is_cuda or x.dtype not in DTYPES or torch.compiler.is_compiling():
        return None
    kernels = library(x.device.index)
    return kernels if kernels is not None and trusted(op, x.device.index) else None


def check(code: int, name: str) -> None:
    """Raises when a launcher reported a CUDA error."""
    if code:
        raise RuntimeError(f'{name} failed with CUDA error {code}')
