"""Follows tensors through PyTorch: above autograd, where devices are named, and below it."""

import functools

import numpy as np
import torch
from pretended.names import DRAWS, FACTORIES, ONE_DTYPE, TAKE_NUMBERS, WAIT
from pretended.record import PretendedGPU
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

CPU = torch.device('cpu')


def swap(value: object) -> tuple[object, str | None]:
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


class Functions(TorchFunctionMode):
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
            kwargs['device'], wanted = swap(kwargs['device'])
        if name == 'as_tensor' and isinstance(args[0], torch.Tensor):
            return gpu.move(func(*args, **kwargs), wanted or gpu.tag(args[0]) or 'cpu', False)
        if kwargs.get('generator') is not None and name in DRAWS:
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
                value, asked = swap(value)
                wanted = asked or wanted
            rest.append(value)
        if 'device' in kwargs:
            kwargs['device'], asked = swap(kwargs['device'])
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
        elif name in FACTORIES or (wanted and (name.startswith('new_') or name.endswith('_like'))):
            gpu.set_tag(out, wanted or 'cpu')
            if wanted == 'cuda' and not name.startswith('empty'):
                gpu.count(name)


@functools.cache
def is_view(func: torch._ops.OpOverload) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


class Dispatch(TorchDispatchMode):
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
        elif on_cpu and not (name in TAKE_NUMBERS and all(a.dim() == 0 for a in on_cpu)):
            gpu.fault(
                f'{name} of tensors of both devices, {[tuple(a.shape) for a in on_cpu][:3]} '
                'on the CPU'
            )
        if name in WAIT or str(func) == 'aten.repeat_interleave.Tensor':
            gpu.wait(name)
        floats = {a.dtype for a in given if a.is_floating_point()}
        if name in ONE_DTYPE and len(floats) > 1:
            gpu.fault(f'{name} of {sorted(map(str, floats))}')
        if not (is_view(func) or name.startswith(('empty', 'new_empty', '_unsafe_view', 'sym_'))):
            gpu.count(name)


def _storage(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None
