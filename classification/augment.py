"""The published training augmentation, for a whole batch of tensors at once.

torchvision's transforms draw one set of parameters per call, so a batch would share it; these
draw one per picture and gather every pixel once. Each step equals the operation of the same name
in torchvision.transforms.v2.functional on float images.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from classification.settings import Settings
from utils.transfer import send_together

_LUMA = (0.2989, 0.587, 0.114)  # of rgb_to_grayscale, which the contrast is taken around


def draw_parameters(
    n: int, size: int, settings: Settings, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random parameters of n pictures of `size` px, drawn on the CPU.

    Returns a dict of tensors [n]: flip_x, flip_y (bool), brightness, contrast (factors),
    contrast_first (bool), angle (degrees, counter-clockwise), and shift [n, 2] (whole px, x, y).
    """

    def uniform(low: float, high: float, *shape: int) -> Float[Tensor, ' n *shape']:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    most = settings.translation * size
    return {
        'flip_x': uniform(0, 1) < settings.horizontal_flip,
        'flip_y': uniform(0, 1) < settings.vertical_flip,
        'brightness': uniform(1 - settings.brightness, 1 + settings.brightness),
        'contrast': uniform(1 - settings.contrast, 1 + settings.contrast),
        'contrast_first': uniform(0, 1) < 0.5,
        'angle': uniform(-settings.rotation, settings.rotation),
        'shift': uniform(-most, most, 2).round(),
    }


def apply_parameters(
    img: Float[Tensor, 'n 3 S S'], parameters: dict[str, Tensor]
) -> Float[Tensor, 'n 3 S S']:
    """Augments [n, 3, S, S] in [0, 1]: mirror, colour, rotate, then shift; empty pixels are 0.

    Nearest neighbour, as published. What the rotation pushes out of the frame stays lost when
    the shift would bring it back.
    """
    p = send_together({**parameters, 'luma': torch.tensor(_LUMA)}, img.device)
    img = _colour(img, p)
    n, _, size, _ = img.shape
    at = torch.arange(size, device=img.device, dtype=torch.float32) - (size - 1) / 2
    x = at.view(1, 1, -1) - p['shift'][:, 0].view(-1, 1, 1)
    y = at.view(1, -1, 1) - p['shift'][:, 1].view(-1, 1, 1)
    inside = (x.abs() <= size / 2) & (y.abs() <= size / 2)
    turn = p['angle'].view(-1, 1, 1) * (math.pi / 180)
    source_x = torch.cos(turn) * x - torch.sin(turn) * y
    source_y = torch.sin(turn) * x + torch.cos(turn) * y
    source_x = torch.where(p['flip_x'].view(-1, 1, 1), -source_x, source_x)
    source_y = torch.where(p['flip_y'].view(-1, 1, 1), -source_y, source_y)
    grid = torch.stack([source_x, source_y], dim=3) * (2 / size)
    moved = F.grid_sample(img, grid, mode='nearest', padding_mode='zeros', align_corners=False)
    return moved * inside.unsqueeze(1)


def augment(
    img: Float[Tensor, 'n 3 S S'], settings: Settings, generator: torch.Generator
) -> Float[Tensor, 'n 3 S S']:
    """Randomly augments [n, 3, S, S] in [0, 1]; `generator` is a CPU torch.Generator."""
    return apply_parameters(img, draw_parameters(len(img), img.shape[-1], settings, generator))


def _colour(img: Float[Tensor, 'n 3 S S'], p: dict[str, Tensor]) -> Float[Tensor, 'n 3 S S']:
    first = p['contrast_first'].view(-1, 1, 1, 1)
    img = torch.where(first, _contrast(img, p), _brightness(img, p))
    return torch.where(first, _brightness(img, p), _contrast(img, p))


def _brightness(img: Float[Tensor, 'n 3 S S'], p: dict[str, Tensor]) -> Float[Tensor, 'n 3 S S']:
    return (img * p['brightness'].view(-1, 1, 1, 1)).clamp(0, 1)


def _contrast(img: Float[Tensor, 'n 3 S S'], p: dict[str, Tensor]) -> Float[Tensor, 'n 3 S S']:
    factor = p['contrast'].view(-1, 1, 1, 1)
    luma = (img * p['luma'].view(1, 3, 1, 1)).sum(1, keepdim=True)
    middle = luma.mean((2, 3), keepdim=True)
    return (img * factor + middle * (1 - factor)).clamp(0, 1)
