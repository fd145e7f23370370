"""What stands in for the parts of PyTorch and of the project that know of a GPU."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from pretended.modes import is_view, swap
from pretended.record import PretendedGPU
from torch.utils._pytree import tree_flatten

from models.stylegan2.op import build

CUDA = torch.device('cuda', 0)
_real_device = torch._C.TensorBase.device.__get__


class _Graph:
    """A CUDA graph: the recorded operations again, on the same tensors."""

    def replay(self) -> None:
        gpu = self.gpu
        gpu.count('graph')
        with gpu.silent(), torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in self.operations:
                if is_view(func) or func.overloadpacket.__name__.startswith('empty'):
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
        device, wanted = swap(device)
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


def patches(gpu: PretendedGPU, kernels: object) -> list[tuple[object, str, object]]:
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
        (torch, 'frombuffer', _tagging(gpu, torch.frombuffer)),
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
        (torch.cuda, 'get_device_properties', lambda *_: SimpleNamespace(total_memory=8 << 30)),
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
