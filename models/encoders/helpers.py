"""Building blocks of the published encoders, under the names of their weight files.

Shapes: N images, C channels, s side of a feature map.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import resnet34

from models.stylegan2.model import EqualLinear

BODY_CHANNELS = 512
BODY_STRIDE = 16  # both bodies end at input size / 16, rounded up


def body_side(input_size: int, stride: int = BODY_STRIDE) -> int:
    """Side of a body's feature map; every halving rounds up."""
    return -(-input_size // stride)


class GradualStyleBlock(nn.Module):
    """[N, in_ch, side, side] -> one style vector [N, out_ch].

    Stride-2 convolutions until one position is left, then an equalised linear layer (Richardson
    et al. 2021, 'Encoding in Style', section 3).
    """

    def __init__(self, in_ch: int, out_ch: int, side: int) -> None:
        super().__init__()
        layers = []
        for i in range(max(1, math.ceil(math.log2(side)))):
            layers += [
                nn.Conv2d(out_ch if i else in_ch, out_ch, 3, stride=2, padding=1),
                nn.LeakyReLU(),
            ]
        self.convs = nn.Sequential(*layers)
        self.linear = EqualLinear(out_ch, out_ch)

    def forward(self, x: Float[Tensor, 'N C s s']) -> Float[Tensor, 'N D']:
        return self.linear(self.convs(x).flatten(1))


def styles_together(
    blocks: Sequence[GradualStyleBlock], x: Float[Tensor, 'N C s s']
) -> Float[Tensor, 'N L D']:
    """What each of `blocks`, all of one shape, finds in x, by grouped convolutions.

    For GPUs, which L small convolutions one after the other would leave idle.
    """
    for layers in zip(*(block.convs for block in blocks)):
        if isinstance(layers[0], nn.Conv2d):
            weight = torch.cat([conv.weight for conv in layers])
            bias = torch.cat([conv.bias for conv in layers])
            groups = 1 if layers[0] is blocks[0].convs[0] else len(blocks)
            x = F.conv2d(x, weight, bias, stride=2, padding=1, groups=groups)
        else:
            x = layers[0](x)
    linears = [block.linear for block in blocks]
    weight = torch.stack([linear.weight for linear in linears]) * linears[0].scale
    bias = torch.stack([linear.bias for linear in linears])[:, None] * linears[0].lr_mul
    x = x.reshape(len(x), len(blocks), -1).transpose(0, 1)  # [L, N, D]
    return torch.baddbmm(bias, x, weight.mT).transpose(0, 1)


class SEModule(nn.Module):
    """Squeeze and excitation with a reduction of 16."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1, bias=False)

    def forward(self, x: Float[Tensor, 'N C h w']) -> Float[Tensor, 'N C h w']:
        gate = F.relu(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * self.fc2(gate).sigmoid()


class BottleneckIRSE(nn.Module):
    """Residual unit of the improved-residual, squeeze-and-excite ResNet (ArcFace, section 3.2)."""

    def __init__(self, in_ch: int, out_ch: int, stride: int) -> None:
        super().__init__()
        if in_ch == out_ch:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(in_ch, out_ch, 1, stride, bias=False), nn.BatchNorm2d(out_ch)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_ch),
            nn.Conv2d(in_ch, out_ch, 3, padding=1, bias=False),
            nn.PReLU(out_ch),
            nn.Conv2d(out_ch, out_ch, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_ch),
            SEModule(out_ch),
        )

    def forward(self, x: Float[Tensor, 'N C h w']) -> Float[Tensor, 'N K s t']:
        return self.res_layer(x) + self.shortcut_layer(x)


class Trunk(nn.Module):
    """What pSp's encoders stand on: a stem, blocks, and which blocks end at 1/4, 1/8 and 1/16."""

    taps: tuple[int, int, int]
    body: nn.Sequential

    def __init__(self, input_nc: int) -> None:
        super().__init__()

    def stem(self, x: Float[Tensor, 'N C S S']) -> Float[Tensor, 'N 64 s s']:
        """Pictures -> the first map."""
        raise NotImplementedError


class ResNetTrunk(Trunk):
    """7x7 stem (PReLU, no max-pooling) and the 16 blocks of ResNet-34 in one list, `body`.

    Taps 6, 12 and 15 are the last blocks at 1/4, 1/8 and 1/16 of the input.
    """

    taps = (6, 12, 15)

    def __init__(self, input_nc: int) -> None:
        super().__init__(input_nc)
        self.conv1 = nn.Conv2d(input_nc, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.PReLU(64)
        net = resnet34(weights=None)
        self.body = nn.Sequential(*net.layer1, *net.layer2, *net.layer3, *net.layer4)

    def stem(self, x: Float[Tensor, 'N C S S']) -> Float[Tensor, 'N 64 s s']:
        return self.relu(self.bn1(self.conv1(x)))


class IRSETrunk(Trunk):
    """3x3 stem and the 24 units of IR-SE50, `body`; taps as in ResNetTrunk."""

    taps = (6, 20, 23)
    _units = ((64, 3), (128, 4), (256, 14), (512, 3))  # channels, units; the first has stride 2

    def __init__(self, input_nc: int) -> None:
        super().__init__(input_nc)
        self.input_layer = nn.Sequential(
            nn.Conv2d(input_nc, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        )
        units, in_ch = [], 64
        for out_ch, count in self._units:
            for i in range(count):
                units.append(BottleneckIRSE(in_ch, out_ch, 1 if i else 2))
                in_ch = out_ch
        self.body = nn.Sequential(*units)

    def stem(self, x: Float[Tensor, 'N C S S']) -> Float[Tensor, 'N 64 s s']:
        return self.input_layer(x)
