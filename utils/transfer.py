"""Copies to a GPU that the host does not wait for."""

import torch
from jaxtyping import Shaped
from torch import Tensor


def send(tensor: Shaped[Tensor, '*s'], device: torch.device | str) -> Shaped[Tensor, '*s']:
    """A CPU tensor on `device`; on its way to a GPU the host goes on.

    A copy from ordinary memory would wait for the GPU to finish what it has been given.
    """
    device = torch.device(device)
    if device.type != 'cuda':
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def send_together(tensors: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Small tensors of the CPU, float32 or bool, on `device` in one copy; the same shapes."""
    if torch.device(device).type == 'cpu' or not tensors:
        return tensors
    flat = send(torch.cat([t.flatten().float() for t in tensors.values()]), device)
    parts = flat.split([t.numel() for t in tensors.values()])
    return {
        name: (part > 0 if t.dtype == torch.bool else part).view(t.shape)
        for (name, t), part in zip(tensors.items(), parts)
    }
