"""One code path for one process and for `torchrun`: every function answers without a group."""
import importlib
import os

import torch
import torch.distributed as dist

from utils.errors import UserError


def init(device):
    """Joins the process group `torchrun` announces (gloo on CPU, NCCL on GPU); returns the device.

    Without torchrun's environment nothing happens and `device` is returned unchanged. With
    it, a CUDA device becomes the process's own card.
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
            raise UserError(f'torchrun started more processes than the {torch.cuda.device_count()}'
                            ' GPU(s) here; lower --nproc_per_node')
        device = torch.device('cuda', local)
        torch.cuda.set_device(device)
        dist.init_process_group('nccl', device_id=device)
    else:
        dist.init_process_group('gloo')
    return device


def shutdown():
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """This process's number, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """Whether this process writes files and logs."""
    return rank() == 0


def barrier():
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_mean(tensor):
    """Averages `tensor` over the processes in place and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def all_reduce_sum(tensor):
    """Sums `tensor` over the processes in place and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_process(flag, device):
    """Whether `flag` is true in any of the processes; the same answer in all."""
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device))) if dist.is_initialized() \
        else bool(flag)


def all_gather_object(obj):
    """A list with every process's picklable `obj`, in rank order."""
    if not dist.is_initialized():
        return [obj]
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def broadcast_object(obj, src=0):
    """Process `src`'s picklable `obj`, on every process."""
    if not dist.is_initialized():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=src)
    return box[0]


def average_gradients(parameters):
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
    offset = 0
    for g in grads:
        g.copy_(flat[offset:offset + g.numel()].view_as(g))
        offset += g.numel()
