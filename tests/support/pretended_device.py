"""A pretended GPU with real numbers: what a GPU would refuse or wait for, found without one.

Tensors stay on the CPU; their storages are tagged 'cuda' or 'cpu', and the tags followed through
every operation, backward passes included. The fused kernels are stood in for by their PyTorch
twins and count as one operation each.

    with pretended_gpu() as gpu:
        trainer = Trainer(..., device='cuda')
        gpu.clear()
        trainer.step()
    assert not gpu.faults and gpu.n_waits <= 2 and gpu.n_operations < 4000

As a program it runs a script, with small matrices for its measure of speed, and fails on faults:

    PYTHONPATH=. python tests/support/pretended_device.py SCRIPT ARGUMENTS

Not seen: speed, memory, races, pinned memory changed too early, cuDNN's own refusals.
"""

import collections
import contextlib
import functools
import importlib
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from models.stylegan2.op import build

ROOT = Path(__file__).resolve().parents[2]
CUDA, CPU = torch.device('cuda', 0), torch.device('cpu')
_real_device = torch._C.TensorBase.device.__get__
# These take a 0-d tensor of the CPU beside tensors of the GPU, as a number.
_TAKE_NUMBERS = {
    name + suffix
    for suffix in ('', '_')
    for name in (
        'add',
        'sub',
        'mul',
        'div',
        'where',
        'lt',
        'le',
        'gt',
        'ge',
        'eq',
        'ne',
        'pow',
        'rsub',
        'maximum',
        'minimum',
        'lerp',
        'addcmul',
        'addcdiv',
        'fill',
        'masked_fill',
        'atan2',
        'clamp',
        'clamp_min',
        'clamp_max',
        'remainder',
        'copysign',
        '_foreach_mul',
        '_foreach_div',
        'logical_and',
        'bitwise_and',
    )
}
_WAIT = {
    'nonzero',
    'masked_select',
    '_local_scalar_dense',
    '_unique2',
    'unique_dim',
    'equal',
    'unique_consecutive',
    'is_nonzero',
    'bincount',
}
_ONE_DTYPE = {'convolution', 'convolution_backward', 'mm', 'bmm', 'addmm', 'baddbmm'}
_FACTORIES = {
    'empty',
    'zeros',
    'ones',
    'full',
    'rand',
    'randn',
    'randint',
    'randperm',
    'arange',
    'linspace',
    'logspace',
    'eye',
    'tensor',
    'as_tensor',
    'empty_strided',
    'frombuffer',
    'scalar_tensor',
    'hann_window',
    'tril_indices',
    'triu_indices',
}
_DRAWS = {
    'randn',
    'rand',
    'randint',
    'randperm',
    'normal_',
    'uniform_',
    'bernoulli',
    'random_',
    'multinomial',
    'randn_like',
    'rand_like',
}


class PretendedGPU:
    """What has happened since `clear`: Counters of descriptions and of operations.

    faults: what a GPU would refuse. waits: where the host waits for the device. operations: by
    name; views and empty tensors are none. places: operations by the project's line.
    """

    def __init__(self) -> None:
        self.faults, self.waits = collections.Counter(), collections.Counter()
        self.operations, self.places = collections.Counter(), collections.Counter()
        self._tags: dict[int, str | None] = {}
        self._pinned: set[int] = set()
        self.counting = True
        self.recorded: list | None = None  # operations since the capture of a graph began
        self.inside = 0  # PyTorch's own Python code below is to see the real device

    def clear(self) -> None:
        """Forgets what has been counted."""
        for counter in (self.faults, self.waits, self.operations, self.places):
            counter.clear()

    @property
    def n_waits(self) -> int:
        return self.waits.total()

    @property
    def n_operations(self) -> int:
        return self.operations.total()

    def tag(self, tensor: torch.Tensor) -> str | None:
        """'cuda', 'cpu', or None where it is not known."""
        try:
            return self._tags.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):
            return None

    def set_tag(self, tensor: torch.Tensor, value: str | None, *, pinned: bool = False) -> None:
        with contextlib.suppress(NotImplementedError, RuntimeError):
            key = tensor.untyped_storage()._cdata
            self._tags[key] = value
            (self._pinned.add if pinned else self._pinned.discard)(key)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def fault(self, what: str) -> None:
        if self.counting:
            self.faults[f'{what} at {_where()}'] += 1

    def wait(self, what: str) -> None:
        if self.counting:
            self.waits[f'{what} at {_where()}'] += 1

    def count(self, name: str) -> None:
        if self.counting:
            self.operations[name] += 1
            self.places[_where(1)] += 1

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Nothing is counted; tags are still followed."""
        before, self.counting = self.counting, False
        try:
            yield
        finally:
            self.counting = before

    def move(self, tensor: torch.Tensor, target: str, non_blocking: bool) -> torch.Tensor:
        """`tensor` on the 'cuda' or 'cpu' device, itself when it is there."""
        if (self.tag(tensor) or 'cpu') == target:
            return tensor
        if target == 'cpu' or not (non_blocking and self.is_pinned(tensor)):
            self.wait(f'copy {"from" if target == "cpu" else "to"} the GPU {tuple(tensor.shape)}')
        self.count('copy between devices')
        with self.silent():
            out = tensor.clone()
        self.set_tag(out, target)
        return out

    def report(self, title: str = '') -> str:
        """Everything as text, the most frequent first."""
        lines = [
            f'{title}: {len(self.faults)} faults, {self.n_waits} waits, '
            f'{self.n_operations} operations'
        ]
        for name in ('faults', 'waits', 'operations', 'places'):
            lines += [
                f'  {name[:-1]} {n:5d} x {what}' for what, n in getattr(self, name).most_common(25)
            ]
        return '\n'.join(lines)


def _where(depth: int = 3) -> str:
    """The innermost lines of the project that led here."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < depth:
        path = frame.f_code.co_filename
        if path.startswith(str(ROOT)) and path != __file__:
            found.append(f'{path[len(str(ROOT)) + 1 :]}:{frame.f_lineno}')
        frame = frame.f_back
    return ' < '.join(found)


def _swap(value: object) -> tuple[object, str | None]:
    """(argument for the CPU, the device type that was asked for or None)."""
    if isinstance(value, torch.device) and value.type in ('cuda', 'cpu'):
        return CPU, value.type
    if isinstance(value, str) and value.split(':')[0] in ('cuda', 'cpu'):
        return CPU, value.split(':')[0]
    return value, None


def _indices(index: object) -> object:
    if isinstance(index, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(index))
    return tuple(map(_indices, index)) if isinstance(index, tuple) else index


class _Functions(TorchFunctionMode):
    """Devices in arguments, copies between devices and generators of random numbers."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types_, args=(), kwargs=None):
        kwargs, gpu, name = dict(kwargs or {}), self.gpu, getattr(func, '__name__', str(func))
        if func is torch.Tensor.cuda:
            return gpu.move(args[0], 'cuda', kwargs.get('non_blocking', False))
        if func is torch.Tensor.cpu:
            return gpu.move(args[0], 'cpu', False)
        if func is torch.Tensor.pin_memory:
            if gpu.tag(args[0]) == 'cuda':
                gpu.fault('pin_memory of a GPU tensor')
            with gpu.silent():
                out = args[0].clone()
            gpu.set_tag(out, 'cpu', pinned=True)
            return out
        if (func is torch.Tensor.numpy or name == '__array__') and gpu.tag(args[0]) == 'cuda':
            gpu.fault('a GPU tensor as an array')
        if func is torch.Tensor.tolist and gpu.tag(args[0]) == 'cuda':
            gpu.wait('tolist')
        if func is torch.Tensor.to:
            return self._to(args, kwargs)
        if name in ('__getitem__', '__setitem__'):
            args = (args[0], _indices(args[1]), *args[2:])
        wanted = None
        if 'device' in kwargs and name != '_parse_to':
            kwargs['device'], wanted = _swap(kwargs['device'])
        if name == 'as_tensor' and isinstance(args[0], torch.Tensor):
            return gpu.move(func(*args, **kwargs), wanted or gpu.tag(args[0]) or 'cpu', False)
        if kwargs.get('generator') is not None and name in _DRAWS:
            first = args[0] if args and isinstance(args[0], torch.Tensor) else None
            target = wanted or (gpu.tag(first) if first is not None else None) or 'cpu'
            if kwargs['generator'].pretended != target:
                gpu.fault(f'{name} on {target} with a generator of {kwargs["generator"].pretended}')
        gpu.inside += 1
        try:
            out = func(*args, **kwargs)
        finally:
            gpu.inside -= 1
        if isinstance(out, torch.Tensor):
            self._made(name, out, wanted, args)
        return out

    def _to(self, args: tuple, kwargs: dict) -> torch.Tensor:
        gpu, tensor = self.gpu, args[0]
        rest, wanted = [], None
        for value in args[1:]:
            if isinstance(value, torch.Tensor):
                wanted = gpu.tag(value) or 'cpu'
            else:
                value, asked = _swap(value)
                wanted = asked or wanted
            rest.append(value)
        if 'device' in kwargs:
            kwargs['device'], asked = _swap(kwargs['device'])
            wanted = asked or wanted
        if wanted:
            blocking = not (kwargs.get('non_blocking') or True in [v is True for v in rest])
            tensor = gpu.move(tensor, wanted, not blocking)
        gpu.inside += 1
        try:
            return tensor.to(*rest, **kwargs)
        finally:
            gpu.inside -= 1

    def _made(self, name: str, out: torch.Tensor, wanted: str | None, args: tuple) -> None:
        """Tags tensors that were made from numbers."""
        gpu = self.gpu
        if name == 'new_tensor' or (name in ('tensor', 'scalar_tensor') and wanted == 'cuda'):
            target = wanted or gpu.tag(args[0])
            if target == 'cuda':
                gpu.wait(f'numbers to the GPU {tuple(out.shape)}')
                gpu.count('copy between devices')
            gpu.set_tag(out, target)
        elif name in _FACTORIES or (wanted and (name.startswith('new_') or name.endswith('_like'))):
            gpu.set_tag(out, wanted or 'cpu')
            if wanted == 'cuda' and not name.startswith('empty'):
                gpu.count(name)


@functools.cache
def _is_view(func: torch._ops.OpOverload) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


class _Dispatch(TorchDispatchMode):
    """Mixed devices and dtypes, waits, and operations, below autograd."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types_, args=(), kwargs=None):
        gpu, kwargs = self.gpu, kwargs or {}
        given = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)]
        on_gpu = [a for a in given if gpu.tag(a) == 'cuda']
        on_cpu = [a for a in given if gpu.tag(a) == 'cpu']
        if gpu.counting and on_gpu:
            self._look(func, args, on_gpu, on_cpu, given)
        out = func(*args, **kwargs)
        if gpu.recorded is not None:
            gpu.recorded.append((func, args, kwargs, out))
        result = 'cuda' if on_gpu else 'cpu' if on_cpu else None
        storages = {_storage(a) for a in given}
        for made in tree_flatten(out)[0]:
            if isinstance(made, torch.Tensor) and _storage(made) not in storages:
                gpu.set_tag(made, result)
        return out

    def _look(self, func, args: tuple, on_gpu: list, on_cpu: list, given: list) -> None:
        gpu, name = self.gpu, func.overloadpacket.__name__
        if name == 'copy_' and on_cpu:
            source = args[1]
            if (
                not (len(args) > 2 and args[2] and gpu.is_pinned(source))
                or gpu.tag(source) == 'cuda'
            ):
                gpu.wait(f'copy between devices {tuple(source.shape)}')
        elif name in ('index', 'index_put', 'index_put_', '_index_put_impl_'):
            if any(a.dtype in (torch.bool, torch.uint8) for a in given[1:]):
                gpu.wait(f'{name} by a mask')
            if any(a.dtype == torch.long for a in on_cpu):
                gpu.wait(f'{name} with indices of the CPU')
        elif on_cpu and not (name in _TAKE_NUMBERS and all(a.dim() == 0 for a in on_cpu)):
            gpu.fault(
                f'{name} of tensors of both devices, {[tuple(a.shape) for a in on_cpu][:3]} '
                'on the CPU'
            )
        if name in _WAIT or str(func) == 'aten.repeat_interleave.Tensor':
            gpu.wait(name)
        floats = {a.dtype for a in given if a.is_floating_point()}
        if name in _ONE_DTYPE and len(floats) > 1:
            gpu.fault(f'{name} of {sorted(map(str, floats))}')
        if not (_is_view(func) or name.startswith(('empty', 'new_empty', '_unsafe_view', 'sym_'))):
            gpu.count(name)


def _storage(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


class _Graph:
    """A CUDA graph: the recorded operations again, on the same tensors."""

    def replay(self) -> None:
        gpu = self.gpu
        gpu.count('graph')
        with gpu.silent(), torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in self.operations:
                if _is_view(func) or func.overloadpacket.__name__.startswith('empty'):
                    continue
                for kept, made in zip(tree_flatten(out)[0], tree_flatten(func(*args, **kwargs))[0]):
                    if isinstance(kept, torch.Tensor) and kept is not made:
                        kept.copy_(made)


def _capturing(gpu: PretendedGPU) -> Callable:
    @contextlib.contextmanager
    def capture(graph: _Graph) -> Iterator[None]:
        waits, gpu.recorded = gpu.n_waits, []
        try:
            yield
        finally:
            graph.gpu, graph.operations, gpu.recorded = gpu, gpu.recorded, None
        if gpu.n_waits > waits:
            raise RuntimeError('operation not permitted when stream is capturing')

    return capture


class _Stream:
    cuda_stream = None

    def wait_stream(self, other: '_Stream') -> None:
        pass


class _Generator(torch.Generator):
    def __new__(cls, device: torch.device | str = 'cpu') -> '_Generator':
        device, wanted = _swap(device)
        self = super().__new__(cls, device)
        self.pretended = wanted or 'cpu'
        return self


def _activation(x, bias, saved, slope, gain, clamp):
    """What the fused activation's launcher computes, in PyTorch."""
    from models.stylegan2.op import fused_leaky_relu

    if saved is None:
        return fused_leaky_relu(x, bias, slope=slope, gain=gain, clamp=clamp, impl='ref')
    y = x * torch.where(saved < 0, slope * gain, gain).to(x.dtype)
    return y if clamp is None else torch.where(saved.abs() < clamp, y, 0)


def _stand_in(gpu: PretendedGPU, name: str, twin: Callable) -> Callable:
    def launch(x, *arguments):
        gpu.count(name)
        with gpu.silent():
            y = twin(x, *arguments)
        gpu.set_tag(y, gpu.tag(x))
        return y

    return launch


def _tagging(gpu: PretendedGPU, make: Callable) -> Callable:
    """`make`, whose new tensors live on the CPU, or where its first argument does."""

    def made(*args, **kwargs):
        out = make(*args, **kwargs)
        source = gpu.tag(args[0]) if isinstance(args[0], torch.Tensor) else 'cpu'
        for value in tree_flatten(out)[0]:
            if isinstance(value, torch.Tensor):
                gpu.set_tag(value, source)
        return out

    return made


def _loaded(gpu: PretendedGPU, real: Callable) -> Callable:
    """Batches of a loader with pin_memory are pinned, as where there is a GPU."""

    def following(self):
        batch = real(self)
        for value in tree_flatten(batch)[0]:
            if isinstance(value, torch.Tensor):
                gpu.set_tag(value, 'cpu', pinned=self._pretended_pin)
        return batch

    return following


def _loader(real: Callable) -> Callable:
    def begun(self, loader):
        pin, loader.pin_memory = loader.pin_memory, False  # it would warn of the missing GPU
        real(self, loader)
        loader.pin_memory = self._pretended_pin = pin

    return begun


def _patches(gpu: PretendedGPU, kernels: object) -> list[tuple[object, str, object]]:
    resample = importlib.import_module('models.stylegan2.op.upfirdn2d')
    activate = importlib.import_module('models.stylegan2.op.fused_act')
    iterator = torch.utils.data.dataloader._BaseDataLoaderIter
    autocast, scaler = torch.autocast, torch.amp.GradScaler

    def device(self):
        return CUDA if not gpu.inside and gpu.tag(self) == 'cuda' else _real_device(self)

    def cast(device_type, dtype=None, **options):
        return autocast('cpu', dtype=dtype or torch.bfloat16, **options)

    twins = (resample._upfirdn2d_ref, _activation)
    if kernels:
        twins = (resample._launch, activate._launch)

    def host(*_, **__):
        return torch.zeros(16, dtype=torch.uint8)

    return [
        (torch.Tensor, 'device', property(device)),
        (torch.Tensor, 'is_cuda', property(lambda self: gpu.tag(self) == 'cuda')),
        (torch.Tensor, '__deepcopy__', _tagging(gpu, torch.Tensor.__deepcopy__)),
        (torch.nn.Parameter, '__deepcopy__', _tagging(gpu, torch.nn.Parameter.__deepcopy__)),
        (torch, 'from_numpy', _tagging(gpu, torch.from_numpy)),
        (torch, 'load', _tagging(gpu, torch.load)),
        (torch, 'Generator', _Generator),
        (torch, 'autocast', cast),
        (torch.amp, 'GradScaler', lambda device, **options: scaler('cpu', **options)),
        (torch.cuda, 'device', lambda device: contextlib.nullcontext()),
        (torch.cuda, 'current_stream', lambda *_: _Stream()),
        (torch.cuda, 'Stream', _Stream),
        (torch.cuda, 'stream', contextlib.nullcontext),
        (torch.cuda, 'CUDAGraph', _Graph),
        (torch.cuda, 'graph', _capturing(gpu)),
        (torch.cuda, 'max_memory_allocated', lambda *_: 0),
        (torch.cuda, 'reset_peak_memory_stats', lambda *_: None),
        (torch.cuda, 'mem_get_info', lambda *_: (8 << 30, 8 << 30)),
        (torch.cuda, 'get_rng_state', host),
        (torch.cuda, 'set_rng_state', lambda *_: None),
        (torch.cuda, 'synchronize', lambda *_: gpu.wait('synchronize')),
        (iterator, '__init__', _loader(iterator.__init__)),
        (iterator, '__next__', _loaded(gpu, iterator.__next__)),
        (build, 'library', lambda index: kernels or gpu),
        (build, 'load_kernels', lambda index: kernels or gpu),
        (build, 'trusted', lambda op, index: True),
        (resample, '_launch', _stand_in(gpu, 'upfirdn2d', twins[0])),
        (activate, '_launch', _stand_in(gpu, 'activation', twins[1])),
    ]


@contextlib.contextmanager
def pretended_gpu(kernels: object = None) -> Iterator[PretendedGPU]:
    """Inside, device='cuda' is a pretended GPU; yields what is noted about it.

    kernels: a library with the emulated kernels (cuda_emulation.py), in place of the stand-ins.
    """
    gpu = PretendedGPU()
    with contextlib.ExitStack() as stack:
        for owner, name, value in _patches(gpu, kernels):
            if hasattr(owner, name):  # benchmarks/launches.py counts older versions too
                stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_Functions(gpu))
        stack.enter_context(_Dispatch(gpu))
        yield gpu


class _Event:
    """Of a GPU's clock, which stands still."""

    def __init__(self, **_: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def elapsed_time(self, _: '_Event') -> float:
        return 1.0


def run_script(path: str, arguments: list[str]) -> PretendedGPU:
    """Runs a script as a program on a machine with a pretended GPU."""
    from benchmarks.machine import matrix_rate
    from utils import cli

    def resolved(name: str) -> torch.device:
        cli.full_precision()
        return torch.device('cuda' if name == 'auto' else name)

    # PyTorch itself is not told: its optimisers would look for the driver.
    answers = {'device_count': 1, 'current_device': 0, 'get_device_name': 'pretended GPU'}
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(
                mock.patch.object(torch.cuda, name, lambda *_, answer=answer: answer)
            )
        stack.enter_context(mock.patch.object(cli, 'resolve_device', resolved))
        stack.enter_context(mock.patch.object(torch.cuda, 'Event', _Event))
        stack.enter_context(mock.patch.object(matrix_rate, '__defaults__', (64,)))
        stack.enter_context(mock.patch.object(sys, 'argv', [path, *arguments]))
        gpu = stack.enter_context(pretended_gpu())
        try:
            runpy.run_path(path, run_name='__main__')
        except SystemExit as end:
            if end.code:
                raise
    return gpu


if __name__ == '__main__':
    found = run_script(sys.argv[1], sys.argv[2:]).faults
    sys.exit('\n'.join(f'{n} x {what}' for what, n in found.items()) or 0)
