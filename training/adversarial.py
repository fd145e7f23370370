"""The two opponents a generator can be trained against, with their losses.

'stylegan2': StyleGAN2's discriminator, logistic loss (Goodfellow et al. 2014). 'projected': heads
on frozen EfficientNet-Lite0 features, hinge loss (Sauer et al. 2021).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.features.pretrained import load_feature_network
from models.projected import ProjectedDiscriminator
from models.stylegan2 import Discriminator
from models.stylegan2.model import set_low_precision
from training.stylegan2_config import TrainConfig
from utils.errors import UserError

Opponent = Discriminator | ProjectedDiscriminator


class AdversarialLoss(NamedTuple):
    """Functions of logits [N, K] whose mean is minimised: of the generator for its pictures, of
    the discriminator for generated pictures and for photographs."""

    generator: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]
    real: Callable[[Tensor], Tensor]


LOSSES = {
    # -log(sigmoid(x)) of what one wishes to be real, and of -x otherwise
    'stylegan2': AdversarialLoss(lambda x: F.softplus(-x), F.softplus, lambda x: F.softplus(-x)),
    'projected': AdversarialLoss(lambda x: -x, lambda x: F.relu(1 + x), lambda x: F.relu(1 - x)),
}


def build_discriminator(config: TrainConfig, device: torch.device) -> Opponent:
    """The untrained discriminator of `config` on `device`.

    UserError when the weights of the feature network are not installed.
    """
    if config.discriminator == 'stylegan2':
        return Discriminator(
            config.size, channels=config.channels, mbstd_group=config.mbstd_group
        ).to(device)
    return ProjectedDiscriminator(load_feature_network('lite0').to(device)).to(device)


def compute_in(net: Opponent, dtype: torch.dtype | None) -> None:
    """Lets a discriminator compute in `dtype` (None: float32) where it can do so safely.

    The feature network of the projected one was not made for the range of float16 and stays in
    float32 then.
    """
    if isinstance(net, ProjectedDiscriminator):
        net.compute_in(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    else:
        set_low_precision(net, dtype)


def before_step(net: Opponent) -> None:
    """What a discriminator does once before it is trained for a step."""
    if isinstance(net, ProjectedDiscriminator):
        net.refresh_norms()


def freeze_discriminator(net: Opponent, n_layers: int) -> list[nn.Parameter]:
    """Freezes the first `n_layers` layers from the image side; returns what stays trainable.

    Layers are counted as from-RGB, then conv1, conv2, skip of each block (FreezeD, Mo et al.
    2020). UserError when there are fewer, or `net` is a projected discriminator, whose features are
    frozen anyway.
    """
    if isinstance(net, ProjectedDiscriminator):
        if n_layers:
            raise UserError(
                '`freezed` goes with the discriminator stylegan2; the features of the '
                'projected one are always frozen'
            )
        return net.learnt()
    first, *blocks = net.convs
    layers: list[Any] = [first]
    for block in blocks:
        layers += [block.conv1, block.conv2, block.skip]
    if n_layers > len(layers):
        raise UserError(
            f'`freezed` {n_layers}: this discriminator has {len(layers)} layers that can be frozen'
        )
    frozen = {id(p) for layer in layers[:n_layers] for p in layer.parameters()}
    return [p for p in net.parameters() if id(p) not in frozen]
