"""Views of fundus photographs for a contrastive training, drawn and applied in batches.

Colour and small lesions survive them: no grey-scaling, large crops, little blur.

Shapes: n or N pictures, S side.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.kinds import Kind, fraction, nonnegative_float
from utils.options import option
from utils.transfer import send_together

_LUMA = (0.299, 0.587, 0.114)


def _how(default: float, kind: Kind, help: str) -> float:
    return option(default, kind, help, group='views', metavar='NUMBER')


@dataclasses.dataclass(frozen=True)
class ViewConfig:
    """How far a view may differ from its photograph.

    min_area: smallest crop, as a share of the picture's area. rotation: largest angle, degrees.
    mirror, upend: probability of a flip left-right, up-down. brightness, contrast, saturation:
    factors are drawn from [1 - v, 1 + v]. hue: largest rotation of the hue, in turns. blur:
    largest sigma of a Gaussian, as a share of the side; half of the views are blurred.
    """

    min_area: float = _how(0.6, fraction, 'smallest crop, share of the picture')
    rotation: float = _how(20.0, nonnegative_float, 'largest rotation, degrees')
    mirror: float = _how(0.5, fraction, 'probability of a left-right flip')
    upend: float = _how(0.0, fraction, 'probability of an up-down flip')
    brightness: float = _how(0.15, fraction, 'largest relative change')
    contrast: float = _how(0.15, fraction, 'largest relative change')
    saturation: float = _how(0.1, fraction, 'largest relative change')
    hue: float = _how(0.01, fraction, 'largest turn of the hue, in full turns')
    blur: float = _how(0.012, fraction, 'largest blur (sigma), share of the side')


def draw_views(n: int, config: ViewConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Random transformations of n pictures, for `apply_views`.

    {'grid': sampling positions [n, 2, 3], 'color': matrices [n, 3, 3], 'contrast': factors [n],
    'blur': sigmas [n] as shares of the side}.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    def flips(probability: float) -> Tensor:
        return 1 - 2 * (torch.rand(n, generator=generator) < probability).float()

    area, aspect = uniform(config.min_area, 1.0), uniform(math.log(4 / 5), math.log(5 / 4)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x, y = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    angle = uniform(-config.rotation, config.rotation) * (math.pi / 180)
    sx, sy = width * flips(config.mirror), height * flips(config.upend)
    c, s = angle.cos(), angle.sin()
    grids = torch.stack(
        [torch.stack([c * sx, -s * sy, x], 1), torch.stack([s * sx, c * sy, y], 1)], 1
    )
    color = _color_matrices(
        uniform(1 - config.brightness, 1 + config.brightness),
        uniform(1 - config.saturation, 1 + config.saturation),
        uniform(-config.hue, config.hue) * (2 * math.pi),
    )
    blur = uniform(0, config.blur) * (torch.rand(n, generator=generator) < 0.5)
    return {
        'grid': grids,
        'color': color,
        'blur': blur,
        'contrast': uniform(1 - config.contrast, 1 + config.contrast),
    }


def _color_matrices(brightness: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """[n, 3, 3]: rotation by `hue` about the grey axis, saturation, then brightness."""
    n = len(hue)
    eye, ones = torch.eye(3).expand(n, 3, 3), torch.full((3, 3), 1 / 3)
    axis = torch.full((3,), 3**-0.5)
    cross = torch.tensor([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    c, s = hue.cos()[:, None, None], hue.sin()[:, None, None]
    rotation = c * eye + s * cross + (1 - c) * ones  # Rodrigues
    grey = torch.tensor(_LUMA).expand(3, 3)
    v = saturation[:, None, None]
    return brightness[:, None, None] * ((v * eye + (1 - v) * grey) @ rotation)


def apply_views(img: Tensor, views: dict[str, Tensor]) -> Tensor:
    """img [N, 3, S, S] in [-1, 1] -> views of the same shape and range.

    What a rotation brings in from outside is black, as around the field of view.
    """
    n, _, size, _ = img.shape
    views = send_together(views, img.device)
    x = img.add(1).mul(0.5)
    where = F.affine_grid(views['grid'], list(img.shape), align_corners=False)
    x = F.grid_sample(x, where, mode='bilinear', padding_mode='zeros', align_corners=False)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * views['contrast'][:, None, None, None]
    x = (views['color'] @ x.flatten(2)).view_as(x)
    blur = _blur_matrices(views['blur'] * size, size)[:, None]
    x = blur @ x @ blur.transpose(2, 3)
    return x.clamp(0, 1).mul(2).sub(1)


def _blur_matrices(sigma: Tensor, size: int) -> Tensor:
    """sigma [n] in pixels -> [n, size, size] whose rows are Gaussians that sum to 1."""
    at = torch.arange(size, device=sigma.device, dtype=torch.float32)
    distance = (at[:, None] - at).square()
    weight = torch.exp(-distance / (2 * sigma.clamp(min=1e-2).square())[:, None, None])
    return weight / weight.sum(2, keepdim=True)
