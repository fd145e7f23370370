"""How much of a picture lies on dark ridges: vessels, in a form that gradients pass through.

The principal curvatures of Frangi et al. 1998 and Sato et al. 1998 at two scales, as
evaluation.vessel_amount measures them with scikit-image, with a soft threshold.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_SCALES = (1 / 160, 1 / 80)  # of the side
_THRESHOLD, _SOFTNESS = 0.045, 0.01  # of the strength; between those of evaluation.vessel_amount
_DARK = -0.9  # outside the field of view no channel is brighter
_CELLS = 8  # of local brightness, on a side


def _derivatives(sigma: float, x: Tensor) -> list[Tensor]:
    """Second derivatives (yy, xy, xx) of x [N, 1, S, S] smoothed by a Gaussian, times sigma^2."""
    reach = math.ceil(4 * sigma)
    t = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    gauss = torch.exp(-t.square() / (2 * sigma**2))
    gauss = gauss / gauss.sum()
    first, second = -t / sigma * gauss, (t.square() / sigma**2 - 1) * gauss
    padded = F.pad(x, [reach] * 4, mode='replicate')

    def apply(down: Tensor, across: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(padded, down[None, None, :, None]), across[None, None, None])

    return [apply(second, gauss), apply(first, first), apply(gauss, second)]


def ridge_share(x: Float[Tensor, 'N 3 S S']) -> Float[Tensor, ' N']:
    """The share of the field of view, without its rim, that lies on dark ridges, softly counted.

    x in [-1, 1], black outside the field of view; S a multiple of 16.
    """
    side = x.shape[-1]
    with torch.no_grad():
        inside = (x.amax(1, keepdim=True) > _DARK).to(x.dtype)
        rim = 2 * (side // 16) + 1
        field = -F.max_pool2d(-inside, rim, 1, rim // 2)
    green = (x[:, 1:2].clamp(-1, 1) + 1) / 2 * inside
    level, weight = (F.avg_pool2d(v, side // _CELLS) for v in (green, inside))
    level = F.interpolate(level / (weight + 1e-3), side, mode='bilinear', align_corners=False)
    flat = torch.where(inside > 0, green / (level + 1e-3), torch.ones_like(green))
    strengths = []
    for scale in _SCALES:
        yy, xy, xx = _derivatives(max(scale * side, 0.6), flat)
        spread = (((yy - xx) / 2).square() + xy.square() + 1e-12).sqrt()
        strengths.append((yy + xx) / 2 + spread)  # the larger curvature, of a dark ridge
    strength = torch.stack(strengths).amax(0)
    found = torch.sigmoid((strength - _THRESHOLD) / _SOFTNESS) * field
    return found.sum((1, 2, 3)) / field.sum((1, 2, 3)).clamp_min(1)
