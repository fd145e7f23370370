"""Projected discriminator: small heads on mixed features of a frozen network.

Source: Sauer et al. 2021, 'Projected GANs Converge Faster', section 3: random cross-channel
mixing (1x1 convolutions), random cross-scale mixing (3x3 convolutions and enlargement, from
coarse to fine), one head per scale, hinge loss. The mixing weights are drawn once and never
learnt. Heads here have spectral norm and no batch statistics, so that a pass of 4 images and four
passes of 1 give the same.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models.features.pretrained import FeatureNetwork

STRIDES = (4, 8, 16, 32)
_SLOPE = 0.2


class ScaleHead(nn.Module):
    """Maps [N, C, h, h] -> logits [N, (h / 2^n_down)^2], by convolutions of stride 2."""

    def __init__(self, channels: int, n_down: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            spectral_norm(nn.Conv2d(channels, channels, 4, stride=2, padding=1))
            for _ in range(n_down)
        )
        self.mix = spectral_norm(nn.Conv2d(channels, channels, 3, padding=1))
        self.logits = spectral_norm(nn.Conv2d(channels, 1, 1))

    def forward(self, x: Float[Tensor, 'N C h h']) -> Float[Tensor, 'N K']:
        for conv in [*self.down, self.mix]:
            x = F.leaky_relu(convolve(conv, x), _SLOPE)
        return convolve(self.logits, x).float().flatten(1)


def convolve(conv: nn.Conv2d, x: Float[Tensor, 'N C h w']) -> Float[Tensor, 'N K H W']:
    """The convolution in the dtype of `x`; weights and their norm stay float32."""
    return F.conv2d(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype), conv.stride, conv.padding)


def refresh_spectral_norms(net: nn.Module) -> None:
    """One power iteration for every layer of `net` with a spectral norm; leaves it in eval mode."""
    for module in net.modules():
        if hasattr(module, 'parametrizations'):
            module.train()
            _ = module.weight  # computing it in training mode moves the iteration
            module.eval()


class ProjectedDiscriminator(nn.Module):
    """Frozen features, random mixing, a head per scale.

    features: a FeatureNetwork with the strides 4 to 32, on the device of this module; its weights
    are not part of the state dict. channels: of the mixed maps and the heads. Stays in eval mode:
    spectral norms move in `refresh_norms` alone, so that passes of one step see the same weights.
    """

    def __init__(self, features: FeatureNetwork, *, channels: int = 64) -> None:
        super().__init__()
        self._features = (features,)  # in a tuple, hidden from state_dict and parameters
        self.across_channels = nn.ModuleDict()
        self.across_scales = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        for stride in STRIDES:
            self.across_channels[str(stride)] = nn.Conv2d(
                features.channels[stride], channels, 1, bias=False
            )
            self.across_scales[str(stride)] = nn.Conv2d(
                channels, channels, 3, padding=1, bias=False
            )
            n_down = (STRIDES[-1] // stride).bit_length() - 1
            self.heads[str(stride)] = ScaleHead(channels, n_down)
        for conv in self._mixing():
            nn.init.kaiming_normal_(conv.weight, nonlinearity='linear')
            conv.weight.requires_grad_(False)
        self.eval()
        self._even_out()

    def _mixing(self) -> Iterator[nn.Conv2d]:
        yield from self.across_channels.values()
        yield from self.across_scales.values()

    @torch.no_grad()
    def _even_out(self) -> None:
        """Scales the mixing so that the maps of all scales have about unit deviation.

        Measured on soft spots with grain, the same for all processes; without it the fine scales,
        to which all coarser ones are added, drown the others.
        """
        draw = torch.Generator().manual_seed(0)
        spots = torch.rand(4, 3, 8, 8, generator=draw) * 2 - 1
        x = F.interpolate(spots, size=128, mode='bilinear', align_corners=False)
        x = x + 0.1 * torch.randn(x.shape, generator=draw)
        device = self._features[0].mean.device
        maps = self._features[0].maps(x.to(device), STRIDES)
        above = None
        for stride in reversed(STRIDES):
            conv = self.across_channels[str(stride)].to(device)
            conv.weight /= _mix(conv, maps[stride]).std()
            y = self._join(stride, maps[stride], above)
            conv = self.across_scales[str(stride)].to(device)
            conv.weight /= _mix(conv, y).std()
            above = _mix(conv, y)

    def learnt(self) -> list[nn.Parameter]:
        """The parameters that are trained: those of the heads."""
        return list(self.heads.parameters())

    def train(self, mode: bool = True) -> 'ProjectedDiscriminator':
        """Stays in eval mode, see the class."""
        return super().train(False)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Computes features, mixing and heads in `dtype`: float32, or bfloat16."""
        self._features[0].to(dtype)

    @torch.no_grad()
    def refresh_norms(self) -> None:
        """One power iteration for the spectral norm of every layer of the heads."""
        refresh_spectral_norms(self.heads)

    def mixed(
        self, maps: dict[int, Float[Tensor, 'N _ _ _']]
    ) -> dict[int, Float[Tensor, 'N _ _ _']]:
        """Maps of the features by stride -> {stride: [N, channels, R / stride, R / stride]}."""
        found: dict[int, Tensor] = {}
        above = None
        for stride in reversed(STRIDES):
            y = self._join(stride, maps[stride], above)
            above = found[stride] = _mix(self.across_scales[str(stride)], y)
        return found

    def _join(
        self, stride: int, x: Float[Tensor, 'N K h w'], above: Float[Tensor, 'N C s t'] | None
    ) -> Float[Tensor, 'N C h w']:
        """The features x of a scale, mixed, plus the mixed map of the next coarser one."""
        y = _mix(self.across_channels[str(stride)], x)
        if above is not None:
            y = y + F.interpolate(above, size=y.shape[2:], mode='bilinear', align_corners=False)
        return y

    def forward(self, x: Float[Tensor, 'N 3 R R'], *, parts: int = 1) -> Float[Tensor, 'N K']:
        """Pictures [N, 3, R, R] in [-1, 1] -> logits [N, K], all heads side by side.

        parts: as of Discriminator; pictures are judged one by one here. UserError when they are
        too small for the feature network.
        """
        return self.judge(self._features[0].maps(x, STRIDES))

    def judge(self, maps: dict[int, Float[Tensor, 'N _ _ _']]) -> Float[Tensor, 'N K']:
        """As `forward`, from the feature network's maps of the STRIDES (others are passed over)."""
        mixed = self.mixed(maps)
        return torch.cat([self.heads[str(s)](mixed[s]) for s in STRIDES], 1)


def _mix(conv: nn.Conv2d, x: Float[Tensor, 'N C h w']) -> Float[Tensor, 'N K h w']:
    return F.conv2d(x, conv.weight.to(x.dtype), padding=conv.padding)
