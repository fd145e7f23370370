"""The CUDA kernels compiled by g++ and run thread after thread on the CPU: tests without a GPU.

Launches are rewritten by one regular expression; CUDA's words are defined away; half and bfloat16
are written out. Fit for kernels without shared memory or communication between threads; races and
the memory model stay unseen. Run as a program it tries random cases against definitions in
float64, for the sanitizers:

    python tests/support/cuda_emulation.py KERNELS.so N_CASES SEED
"""

import contextlib
import ctypes
import random
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from models.stylegan2.op import build, fused_leaky_relu, upfirdn2d

_LAUNCH = re.compile(r'(\w+(?:<[\w\s,]*>)?)<<<(.*?)>>>\(', re.S)
_PRELUDE = r"""
#include <stdint.h>
#include <cstring>
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
struct Index { unsigned x = 0; };
static Index blockIdx, threadIdx, blockDim, gridDim;
extern "C" { int64_t emulated_max_blocks = 1 << 30; int64_t emulated_launches = 0; }
static cudaError_t cudaGetLastError() { return cudaSuccess; }
template <typename K> auto launch(int64_t blocks, int64_t threads, int, cudaStream_t, K kernel) {
    return [=](auto... arguments) {
        ++emulated_launches;
        gridDim.x = blocks < emulated_max_blocks ? blocks : emulated_max_blocks;
        blockDim.x = threads;
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(arguments...);
    };
}
template <typename A, typename B> A bits(B b) { A a; std::memcpy(&a, &b, sizeof a); return a; }
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
template <typename T> void __stwb(T* at, T value) { std::memcpy((void*)at, &value, sizeof value); }
struct __half { uint16_t u; };
static float __half2float(__half h) {
    const uint32_t sign = (h.u & 0x8000u) << 16, e = (h.u >> 10) & 31, m = h.u & 1023;
    if (e == 31) return bits<float>(sign | 0x7f800000u | (m << 13));
    if (e) return bits<float>(sign | ((e + 112) << 23) | (m << 13));
    return bits<float>(bits<uint32_t>(m * 5.9604644775390625e-08f) | sign);
}
static __half __float2half_rn(float f) {
    uint32_t u = bits<uint32_t>(f);
    const uint16_t sign = (u >> 16) & 0x8000;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return {0x7fff};
    if (u >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};
    if (u < 0x38800000u)
        return {uint16_t(sign | (bits<uint32_t>(bits<float>(u) + .5f) - 0x3f000000u))};
    u += 0xfffu + ((u >> 13) & 1);
    return {uint16_t(sign | ((u >> 13) - (112u << 10)))};
}
struct __nv_bfloat16 { uint16_t u; };
static float __bfloat162float(__nv_bfloat16 h) { return bits<float>(uint32_t(h.u) << 16); }
static __nv_bfloat16 __float2bfloat16_rn(float f) {
    const uint32_t u = bits<uint32_t>(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
extern "C" uint16_t emulated_to_half(float f) { return __float2half_rn(f).u; }
extern "C" float emulated_from_half(uint16_t u) { return __half2float({u}); }
"""


def compile_emulation(folder: Path, *, sanitize: str = '') -> Path:
    """Compiles build.SOURCE as C++ into folder/kernels.so (seconds) and returns its path.

    sanitize: argument of -fsanitize ('address,undefined').
    """
    text, n = _LAUNCH.subn(r'launch(\2, \1)(', build.SOURCE.read_text(encoding='utf-8'))
    assert n and '<<<' not in text
    text = re.sub(r'#include <cuda_\w+\.h>\n', '', text)
    source = folder / 'kernels.cpp'
    source.write_text(f'{_PRELUDE}#line 1 "{build.SOURCE}"\n{text}', encoding='utf-8')
    flags = ['-O1', '-g', f'-fsanitize={sanitize}'] if sanitize else ['-O2']
    subprocess.run(
        [
            'g++',
            '-std=c++17',
            '-fno-strict-aliasing',
            '-shared',
            '-fPIC',
            *flags,
            str(source),
            '-o',
            str(folder / 'kernels.so'),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return folder / 'kernels.so'


@contextlib.contextmanager
def emulated(library: Path) -> Iterator[ctypes.CDLL]:
    """CPU tensors take the kernels of `library` for impl 'auto' and 'cuda'; yields the library."""
    kernels = build.declare(ctypes.CDLL(str(library)))
    stream = types.SimpleNamespace(cuda_stream=None)
    with (
        mock.patch.object(build, 'library', lambda index: kernels),
        mock.patch.object(build, 'get', lambda x, impl, op: None if impl == 'ref' else kernels),
        mock.patch.object(torch.cuda, 'device', lambda device: contextlib.nullcontext()),
        mock.patch.object(torch.cuda, 'current_stream', lambda: stream),
    ):
        yield kernels


def counter(library: ctypes.CDLL, name: str) -> ctypes.c_int64:
    """'emulated_launches' or 'emulated_max_blocks' of a loaded library."""
    return ctypes.c_int64.in_dll(library, name)


# -- random cases against definitions in float64 --------------------------------------------

EPSILON = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1.2e-3, torch.bfloat16: 9e-3}
LAYOUTS = (
    'contiguous',
    'last',
    'part of channels',
    'part of rows',
    'odd offset',
    'odd offset, last',
    'transposed',
    'expanded',
    'part of channels, last',
)


def resampled(
    x: torch.Tensor, kernel: torch.Tensor, up: int, down: int, pad: tuple
) -> torch.Tensor:
    """upfirdn2d by its definition: x [n, c, h, w], kernel [kh, kw], in float64."""
    n, c, h, w = x.shape
    left, right, top, bottom = pad
    z = F.pad(x.double().reshape(n, c, h, 1, w, 1), (0, up - 1, 0, 0, 0, up - 1))
    z = z.reshape(n, c, h * up, w * up)
    z = F.pad(z, [max(p, 0) for p in pad])
    z = z[
        :,
        :,
        max(-top, 0) : z.shape[2] - max(-bottom, 0),
        max(-left, 0) : z.shape[3] - max(-right, 0),
    ]
    windows = z.unfold(2, kernel.shape[0], 1).unfold(3, kernel.shape[1], 1)
    y = (windows * kernel.double().flip(0, 1)).sum((4, 5))
    return y[:, :, ::down, ::down]


def laid_out(shape: tuple, dtype: torch.dtype, kind: str, rng: torch.Generator) -> torch.Tensor:
    """Normal values [n, c, h, w] in one of LAYOUTS."""
    n, c, h, w = shape
    size = n * c * h * w

    def normal(*sizes):
        return torch.randn(*sizes, generator=rng).to(dtype)

    if kind == 'last':
        return normal(*shape).contiguous(memory_format=torch.channels_last)
    if kind == 'part of channels':
        return normal(n, c + 3, h, w)[:, 2 : 2 + c]
    if kind == 'part of rows':
        return normal(n, c, h, w + 5)[..., 1 : 1 + w]
    if kind == 'odd offset':
        return normal(size + 3)[1 : 1 + size].view(shape)
    if kind == 'odd offset, last':
        return normal(size + 3)[1 : 1 + size].view(n, h, w, c).permute(0, 3, 1, 2)
    if kind == 'transposed':
        return normal(n, c, w, h).transpose(2, 3)
    if kind == 'expanded':
        return normal(1, c, 1, w).expand(shape)
    if kind == 'part of channels, last':
        wide = normal(n, c + 8, h, w).contiguous(memory_format=torch.channels_last)
        return wide[:, 4 : 4 + c]
    return normal(*shape)


def _excess(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> float:
    """Largest difference in units of the tolerance."""
    if not want.numel():
        return 0.0
    got, want = got.detach().double(), want.detach()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1) / (3 * EPSILON[dtype]))


def resampling_case(rng: random.Random) -> tuple[str, float]:
    """One random upfirdn2d with its first and second derivatives: what it was, and its excess."""
    dtype, kind = rng.choice(list(EPSILON)), rng.choice(LAYOUTS)
    up, down = rng.choice([1, 1, 2, 2, 3, 4]), rng.choice([1, 1, 2, 2, 3])
    kh, kw = rng.choice([(4, 4), (4, 4), (3, 3), (1, 1), (2, 4), (4, 1), (1, 12), (5, 5), (3, 4)])
    shape = (
        rng.choice([0, 1, 2, 3]),
        rng.choice([1, 2, 3, 4, 5, 8, 16]),
        rng.choice([1, 2, 3, 4, 7, 8, 15, 17, 33]),
        rng.choice([1, 2, 3, 4, 5, 8, 16, 33]),
    )
    pad = tuple(rng.choice([-3, -2, -1, 0, 0, 1, 2, 3, 5]) for _ in range(4))
    inner = (
        shape[2] * up + min(pad[2], 0) + min(pad[3], 0),
        shape[3] * up + min(pad[0], 0) + min(pad[1], 0),
    )
    if (
        min(inner) < 1
        or shape[2] * up + pad[2] + pad[3] < kh
        or shape[3] * up + pad[0] + pad[1] < kw
    ):
        return resampling_case(rng)
    values = torch.Generator().manual_seed(rng.randrange(1 << 31))
    x = laid_out(shape, dtype, kind, values).detach().requires_grad_()
    kernel = torch.rand(kh, kw, generator=values) / (kh * kw)
    y = upfirdn2d(x, kernel, up=up, down=down, pad=pad, impl='cuda')
    exact = x.detach().double().requires_grad_()
    want = resampled(exact, kernel, up, down, pad)
    assert y.shape == want.shape and y.dtype == dtype
    weight = torch.randn(y.shape, generator=values).to(dtype).requires_grad_()
    (grad,) = torch.autograd.grad(y, x, weight, create_graph=True)
    (want_grad,) = torch.autograd.grad(want, exact, weight.detach().double())
    other = torch.randn(grad.shape, generator=values).to(dtype)
    (second,) = torch.autograd.grad(grad, weight, other)
    worst = max(
        _excess(y, want, dtype),
        _excess(grad, want_grad, dtype),
        _excess(second, resampled(other, kernel, up, down, pad), dtype),
    )
    return f'{shape} {dtype} {kind} up {up} down {down} {kh}x{kw} pad {pad}', worst


def activation_case(rng: random.Random) -> tuple[str, float]:
    """One random fused_leaky_relu with its derivatives, values kept off the kinks."""
    dtype, kind = rng.choice(list(EPSILON)), rng.choice(LAYOUTS)
    shape = (
        rng.choice([0, 1, 2, 3]),
        rng.choice([1, 2, 3, 4, 8, 24]),
        rng.choice([1, 2, 5, 8, 16]),
        rng.choice([1, 3, 4, 8, 16]),
    )
    clamp, slope = rng.choice([None, 0.7, 1.0, 181.01933598375618]), rng.choice([0.2, 0.01, 1.0])
    gain, with_bias = rng.choice([1.0, 2**0.5, 0.5]), rng.random() < 0.6
    values = torch.Generator().manual_seed(rng.randrange(1 << 31))
    x = laid_out(shape, dtype, kind, values) * (300 if clamp and clamp > 100 else 1)
    x = x.detach().requires_grad_()
    bias = torch.randn(shape[1], generator=values).to(dtype).requires_grad_() if with_bias else None
    y = fused_leaky_relu(x, bias, slope=slope, gain=gain, clamp=clamp, impl='cuda')
    before = x.detach().double()
    if with_bias:
        before = before + bias.detach().double().view(1, -1, 1, 1)
    # The launcher takes its constants in float32.
    slope, gain = (torch.tensor(v, dtype=torch.float32).item() for v in (slope, gain))
    clamp = clamp and torch.tensor(clamp, dtype=torch.float32).item()
    linear = before * torch.ones_like(before).masked_fill(before < 0, slope) * gain
    want = linear if clamp is None else linear.clamp(-clamp, clamp)
    slopes = torch.ones_like(before).masked_fill(before < 0, slope) * gain
    near = before.abs() < EPSILON[dtype] * 4
    if clamp is not None:
        slopes = slopes * (linear.abs() < clamp)
        near |= (linear.abs() - clamp).abs() < 8 * EPSILON[dtype] * clamp
    weight = torch.randn(shape, generator=values).to(dtype).requires_grad_()
    (grad,) = torch.autograd.grad(y, x, weight, create_graph=True)
    other = torch.randn(shape, generator=values).to(dtype)
    (second,) = torch.autograd.grad(grad, weight, other)
    keep = (~near).double()
    worst = max(
        _excess(y / (clamp or 1), want / (clamp or 1), dtype),
        _excess(grad * keep, weight.detach().double() * slopes * keep, dtype),
        _excess(second * keep, other.double() * slopes * keep, dtype),
    )
    return f'{shape} {dtype} {kind} clamp {clamp} slope {slope} gain {gain} {with_bias}', worst


def random_cases(n: int, seed: int) -> list[str]:
    """The failures among `n` random cases of either op; the kernels must be emulated or real."""
    rng, bad = random.Random(seed), []
    for _ in range(n):
        for case in (resampling_case, activation_case):
            what, excess = case(rng)
            if not excess < 1:
                bad.append(f'{case.__name__} {what}: {excess:.3g} tolerances')
    return bad


if __name__ == '__main__':
    with emulated(Path(sys.argv[1])):
        failures = random_cases(int(sys.argv[2]), int(sys.argv[3]))
    sys.exit('\n'.join(failures) or 0)
