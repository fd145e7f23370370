"""Batch normalisation over the batches of all processes, on the CPU as on GPUs."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from utils import distributed


class _Sum(torch.autograd.Function):
    """Sum over processes; the gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class CrossProcessBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics cover every process's batch (of equal sizes).

    Unlike torch.nn.SyncBatchNorm it works between CPU processes.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Float[Tensor, 'N C H W']) -> Float[Tensor, 'N C H W']:
        if not self.training or distributed.world_size() == 1:
            return super().forward(x)
        world = distributed.world_size()
        full = x.float()
        mean = _Sum.apply(full.mean((0, 2, 3))) / world  # [C]
        centred = full - mean[:, None, None]
        var = _Sum.apply(centred.square().mean((0, 2, 3))) / world
        with torch.no_grad():
            count = x.numel() / x.shape[1] * world
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / max(count - 1, 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def share_batch_statistics(module: nn.Module, device: torch.device) -> nn.Module:
    """Replaces every BatchNorm2d below `module` in place, keeping parameters and buffers.

    device: where the module will compute. On GPUs torch.nn.SyncBatchNorm takes the place, whose
    statistics are fused; it works nowhere else.
    """
    kind = nn.SyncBatchNorm if device.type == 'cuda' else CrossProcessBatchNorm2d
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            shared = kind(child.num_features, eps=child.eps, momentum=child.momentum)
            shared.load_state_dict(child.state_dict())
            setattr(module, name, shared.to(child.weight.device))
        else:
            share_batch_statistics(child, device)
    return module
