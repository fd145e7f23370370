"""ResNets without a classifier, as feature networks (torchvision's own, so its key names)."""

from collections.abc import Mapping
from typing import cast

import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import ResNet

_DOWNSAMPLE = [nn.Conv2d, nn.BatchNorm2d]  # of a residual block's skip connection
ARCHS = ('resnet18', 'resnet34', 'resnet50')


def build_resnet(arch: str, *, small_stem: bool = False) -> ResNet:
    """An untrained ResNet: images [N, 3, H, W] -> features [N, F] (F = 512, or 2048 of resnet50).

    small_stem: for pictures below about 100 px, the 7x7 convolution and the max-pool become one
    3x3 convolution of stride 2. Raises ValueError for an unknown architecture.
    """
    if arch not in ARCHS:
        raise ValueError(f'arch={arch!r}, want one of {", ".join(ARCHS)}')
    net = getattr(torchvision.models, arch)(weights=None)
    net.feature_dim, net.fc = net.fc.in_features, nn.Identity()
    if small_stem:
        net.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
        net.maxpool = nn.Identity()
    return net


def describe_resnet(state: Mapping[str, Tensor]) -> tuple[str, bool]:
    """(arch, small_stem) of a ResNet state dict; KeyError when it is none of ARCHS."""
    if state['layer1.0.conv2.weight'].shape[0] != 64:
        raise KeyError('layer1 is not 64 channels wide')
    depth = sum(f'layer3.{i}.conv1.weight' in state for i in range(40))
    bottleneck = 'layer1.0.conv3.weight' in state
    arch = {(False, 2): 'resnet18', (False, 6): 'resnet34', (True, 6): 'resnet50'}[
        bottleneck, depth
    ]
    return arch, state['conv1.weight'].shape[2] == 3


def fold_batch_norms(net: nn.Module) -> nn.Module:
    """Puts every batch normalisation of a torchvision ResNet in eval mode into its convolution.

    In place; returns `net`. What is computed stays the same up to rounding.
    """
    for block in net.modules():
        if isinstance(block, nn.Sequential) and [type(m) for m in block] == _DOWNSAMPLE:
            conv, norm = cast(nn.Conv2d, block[0]), cast(nn.BatchNorm2d, block[1])
            block[0], block[1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
        for i in ('1', '2', '3'):
            norm = getattr(block, f'bn{i}', None)
            if isinstance(norm, nn.BatchNorm2d):
                setattr(block, f'conv{i}', fuse_conv_bn_eval(getattr(block, f'conv{i}'), norm))
                setattr(block, f'bn{i}', nn.Identity())
    return net.requires_grad_(False)
