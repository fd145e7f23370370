"""One code path for one process and for `torchrun`: every function answers without a group."""

import datetime
import importlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from utils.errors import UserError

S = TypeVar('S')
T = TypeVar('T')

# How long a process waits for the others. One of them may group, measure distances or check files
# for hours alone, which the libraries' 10 (NCCL) or 30 minutes (gloo) would end. A process that
# has died is noticed at once: torchrun ends the others, and gloo sees the closed connection.
TIMEOUT = datetime.timedelta(days=2)
_PEER_GONE = (
    'Connection closed by peer',
    'Connection reset by peer',
    'Broken pipe',
    'NCCL communicator was aborted',
    'remote process exited',
)


def init(device: torch.device | str) -> torch.device:
    """Joins the process group `torchrun` announces (gloo on CPU, NCCL on GPU); returns the device.

    Without torchrun's environment nothing happens and `device` is returned unchanged. With
    it, a CUDA device becomes the process's own card. Collective calls wait up to `TIMEOUT`.
    UserError when there are more processes than GPUs.
    """
    device = torch.device(device)
    world = int(os.environ.get('WORLD_SIZE', '1'))
    if world == 1 or dist.is_initialized():
        return device
    # This module takes the group as the default of its arguments. Imported later (the optimisers
    # do), it would keep the group and its threads alive past `shutdown`, into the interpreter's
    # end, where they abort now and then.
    importlib.import_module('torch.distributed.nn.functional')
    if device.type == 'cuda':
        local = int(os.environ['LOCAL_RANK'])
        if local >= torch.cuda.device_count():
            raise UserError(
                f'torchrun started more processes than the {torch.cuda.device_count()}'
                ' GPU(s) here; lower --nproc_per_node'
            )
        device = torch.device('cuda', local)
        torch.cuda.set_device(device)
        dist.init_process_group('nccl', device_id=device, timeout=TIMEOUT)
    else:
        dist.init_process_group('gloo', timeout=TIMEOUT)
    return device


def lost_peer(error: BaseException) -> bool:
    """Whether a collective call failed with `error` because another process has ended."""
    return (
        dist.is_initialized()
        and isinstance(error, RuntimeError)
        and any(words in str(error) for words in _PEER_GONE)
    )


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and logs."""
    return rank() == 0


def barrier() -> None:
    """Waits for all processes, up to `TIMEOUT`."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_mean(tensor: Shaped[Tensor, '*s']) -> Shaped[Tensor, '*s']:
    """Averages `tensor` over the processes in place and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def all_reduce_sum(tensor: Shaped[Tensor, '*s']) -> Shaped[Tensor, '*s']:
    """Sums `tensor` over the processes in place and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true in any of the processes; the same answer in all."""
    return (
        bool(all_reduce_sum(torch.tensor(float(flag), device=device)))
        if dist.is_initialized()
        else bool(flag)
    )


def all_gather(tensor: Shaped[Tensor, ' N *s']) -> Shaped[Tensor, ' M *s']:
    """The tensors [N, ...] of all processes, of one shape, one after the other in rank order."""
    if not dist.is_initialized():
        return tensor
    parts = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())
    ]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_gather_object(obj: T) -> list[T]:
    """A list with every process's picklable `obj`, in rank order."""
    if not dist.is_initialized():
        return [obj]
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def broadcast_object(obj: T, src: int = 0) -> T:
    """Process `src`'s picklable `obj`, on every process."""
    if not dist.is_initialized():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=src)
    return box[0]


def from_main(function: Callable[[], T]) -> T:
    """What `function`, called by process 0 alone, returns: its picklable result, everywhere.

    When it raises, the other processes meet the end of process 0.
    """
    if not dist.is_initialized():
        return function()
    box = [function() if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def handed_out(items: Sequence[T]) -> Iterator[T]:
    """The items, each in the process that asks for it first: a slow one takes fewer.

    To be called by all processes, with the same items.
    """
    if not dist.is_initialized():
        return iter(items)
    counter = broadcast_object(uuid.uuid4().hex)
    store = dist.distributed_c10d._get_default_store()

    def taken() -> Iterator[T]:
        while (number := store.add(counter, 1) - 1) < len(items):
            yield items[number]

    return taken()


def by_turns(items: Sequence[S], function: Callable[[S], T]) -> Iterator[T]:
    """`function` of every item, in order, in every process; each is computed in one of them.

    To be called by all processes, with the same items; the results have to be picklable.
    """
    for first in range(0, len(items), world_size()):
        mine = first + rank()
        found = all_gather_object(function(items[mine]) if mine < len(items) else None)
        yield from cast(list[T], found[: len(items) - first])


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Averages the gradients of `parameters` over the processes, in one message.

    Explicit instead of DistributedDataParallel: GAN steps use several backward passes with
    double differentiation, which DDP's hooks count wrongly.
    """
    if not dist.is_initialized():
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([g.numel() for g in grads])
    torch._foreach_copy_(grads, [part.view(g.shape) for part, g in zip(parts, grads)])
