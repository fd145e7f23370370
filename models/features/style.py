"""Networks of the published local style loss: VGG19's first block, and a fixed filter bank."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.features.pretrained import WHEELS, FeatureNetwork, load_feature_network
from models.loading import load_state, mismatch
from utils.errors import UserError

FILTERS = 'filters'
_WHERE = (
    'It is vgg19-dcbb9e9d.pth of download.pytorch.org/models. Give its path with '
    '`style_weights` or as "vgg19" in configs/paths_config.py, or choose `style_weights`='
    'lite0, or the built-in filter bank with `style_weights`=filters.'
)


class VGGStyle(nn.Module):
    """relu1_2 of VGG19: the two convolutions the loss uses, and none of the other fourteen."""

    name = 'vgg19-relu1_2'
    n_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.features_0 = nn.Conv2d(3, 64, 3, padding=1)
        self.features_2 = nn.Conv2d(64, 64, 3, padding=1)
        self.eval().requires_grad_(False)

    def features(self, img: Float[Tensor, 'N 3 H W']) -> Float[Tensor, 'N 64 H W']:
        """[N, 3, H, W] in [-1, 1], not normalised (published) -> [N, 64, H, W], >= 0."""
        img = img.to(dtype=self.features_0.weight.dtype, memory_format=torch.channels_last)
        return F.relu(self.features_2(F.relu(self.features_0(img))))


class FilterBank(nn.Module):
    """A fixed feature network that needs no file: rectified Gaussian derivatives.

    Of each colour channel: the smoothed value, and the positive and negative parts of first
    derivatives (edges) and second derivatives (lines: vessels, dots) in four directions, all at
    sigma = 1 and 2 pixels; 3 x 2 x (1 + 4 x 2 x 2) = 102 channels. Every filter has unit
    absolute sum, so responses are in [0, 1] where colours are in [-1, 1].
    """

    name = FILTERS
    _SIGMAS = (1.0, 2.0)
    _DIRECTIONS = 4
    kernels: Tensor

    def __init__(self) -> None:
        super().__init__()
        radius = math.ceil(3 * max(self._SIGMAS))
        y, x = torch.meshgrid(*[torch.arange(-radius, radius + 1.0)] * 2, indexing='ij')
        smooth, derivatives = [], []
        for sigma in self._SIGMAS:
            bell = torch.exp(-(x**2 + y**2) / (2 * sigma**2))
            smooth.append(bell / bell.sum())
            for i in range(self._DIRECTIONS):
                angle = math.pi * i / self._DIRECTIONS
                u = (x * math.cos(angle) + y * math.sin(angle)) / sigma
                for kernel in (u * bell, (u**2 - 1) * bell):
                    kernel = kernel - kernel.mean()
                    derivatives.append(kernel / kernel.abs().sum())
        kernels = torch.stack(smooth + derivatives)[:, None].repeat(3, 1, 1, 1)
        self.n_smooth, self.n_kernels, self.radius = len(smooth), len(kernels) // 3, radius
        self.n_features = 3 * (2 * self.n_kernels - self.n_smooth)
        self.register_buffer('kernels', kernels, persistent=False)

    def features(self, img: Float[Tensor, 'N 3 H W']) -> Float[Tensor, 'N 102 H W']:
        """[N, 3, H, W] in [-1, 1] -> [N, 102, H, W], >= 0."""
        img = img.to(self.kernels.dtype)
        padded = F.pad((img + 1) / 2, [self.radius] * 4, mode='replicate')
        y = F.conv2d(padded, self.kernels, groups=3).unflatten(1, (3, self.n_kernels))
        edges = y[:, :, self.n_smooth :]
        return torch.cat([y[:, :, : self.n_smooth], F.relu(edges), F.relu(-edges)], 2).flatten(1, 2)


def load_style_network(
    path: str | Path, *, arch: str | None = None
) -> VGGStyle | FilterBank | FeatureNetwork:
    """The network of the style loss, frozen: a torchvision VGG19 file, 'filters', or 'lite0'.

    Also 'lite1', 'lite2', and a file of the timm architecture `arch`. UserError when the file is
    missing or is not of that network.
    """
    if arch is not None or str(path) in WHEELS:
        return load_feature_network(path, arch=arch)
    if str(path) == FILTERS:
        return FilterBank()
    state = load_state(path, what='VGG19 weight file', hint=_WHERE)
    net = VGGStyle()
    try:
        net.load_state_dict(
            {
                f'features_{i}.{part}': state[f'features.{i}.{part}']
                for i in (0, 2)
                for part in ('weight', 'bias')
            }
        )
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f'{path} is not a VGG19 weight file of torchvision: {mismatch(error)}. {_WHERE}'
        ) from error
    return net
