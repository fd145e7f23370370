"""Image-to-latent encoders: those of pSp and e4e as published, and small ones."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.encoders.fpn_encoders import GradualStyleEncoder, ResNetGradualStyleEncoder
from models.encoders.light_encoder import LightEncoder
from models.encoders.lite_encoder import NUMBERS_PER_CELL, LiteEncoder, init_from_lite0
from models.encoders.pooled_encoder import LightPooledEncoder
from models.encoders.restyle_e4e_encoders import (
    LightProgressiveEncoder,
    LiteProgressiveEncoder,
    ProgressiveBackboneEncoder,
    ResNetProgressiveBackboneEncoder,
)
from models.encoders.restyle_psp_encoders import BackboneEncoder, ResNetBackboneEncoder
from models.loading import fill, load_state, mismatch, named_tensors
from utils.errors import UserError

_MAX_SIZE = 4096  # pixels
ENCODERS = {
    cls.__name__: cls
    for cls in (
        BackboneEncoder,
        GradualStyleEncoder,
        ResNetBackboneEncoder,
        ResNetGradualStyleEncoder,
        LightEncoder,
        LiteEncoder,
    )
}
# Those of e4e, and the class whose names and shapes their weights share.
PROGRESSIVE_ENCODERS = {
    cls.__name__: cls
    for cls in (
        ProgressiveBackboneEncoder,
        ResNetProgressiveBackboneEncoder,
        LightPooledEncoder,
        LightProgressiveEncoder,
        LiteProgressiveEncoder,
    )
}
_TWINS = {
    'BackboneEncoder': 'ProgressiveBackboneEncoder',
    'LightEncoder': 'LightProgressiveEncoder',
    'LiteEncoder': 'LiteProgressiveEncoder',
    'ResNetBackboneEncoder': 'ResNetProgressiveBackboneEncoder',
}
_CLASSES = ENCODERS | PROGRESSIVE_ENCODERS

__all__ = [
    'ENCODERS',
    'PROGRESSIVE_ENCODERS',
    'BackboneEncoder',
    'GradualStyleEncoder',
    'LightEncoder',
    'LightPooledEncoder',
    'LiteEncoder',
    'ResNetBackboneEncoder',
    'ResNetGradualStyleEncoder',
    'build_encoder',
    'encoder_from_state',
    'init_from_lite0',
    'init_from_resnet34',
    'load_resnet34',
]


def build_encoder(
    name: str,
    *,
    n_styles: int,
    input_nc: int = 6,
    input_size: int = 256,
    style_dim: int = 512,
    **options: Any,
) -> nn.Module:
    """An untrained encoder of class `name` for [N, input_nc, input_size, input_size] inputs.

    options: further arguments of the class (`width` of LightEncoder). Raises UserError for an
    unknown name, ValueError for a size the class cannot take.
    """
    if name not in _CLASSES:
        raise UserError(f'unknown encoder {name!r}; choose one of {", ".join(_CLASSES)}')
    return _CLASSES[name](
        n_styles=n_styles, input_nc=input_nc, input_size=input_size, style_dim=style_dim, **options
    )


def encoder_from_state(
    state: object,
    *,
    n_styles: int,
    style_dim: int,
    input_size: int | None = None,
    encoder_type: object = None,
    source: str | Path = 'encoder weights',
) -> tuple[nn.Module, int]:
    """(encoder, input_size): class, channels and input side are read from names and shapes.

    n_styles, style_dim: what the generator takes; UserError naming `source` when the weights
    are not an encoder's or predict something else. input_size: the side in pixels if recorded
    (several odd sizes share the same shapes). encoder_type: the class if recorded; it tells e4e's
    encoders from those of pSp with the same weights.
    """
    state = named_tensors(state, source=source)
    if input_size is not None and not (isinstance(input_size, int) and 0 < input_size <= _MAX_SIZE):
        raise UserError(f'{source}: encoder_size is no side in pixels up to {_MAX_SIZE}')
    try:
        name, input_nc, size, options = _describe(state)
        if encoder_type == _TWINS.get(name, name):
            name = encoder_type
        if size > _MAX_SIZE:
            raise ValueError(f'an input side above {_MAX_SIZE} px')
        encoder = fill(
            lambda: build_encoder(
                name,
                n_styles=n_styles,
                input_nc=input_nc,
                input_size=input_size or size,
                style_dim=style_dim,
                **options,
            ),
            state,
        )
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(
            f'{source}: the encoder does not fit a generator with {n_styles} styles '
            f'of {style_dim} numbers: {mismatch(error)}'
        ) from error
    return encoder, input_size or size


def _describe(state: Mapping[str, Tensor]) -> tuple[str, int, int, dict[str, int]]:
    """Class name, input channels, input side and further options of an encoder's state dict.

    Classes with a `describe` of their own are asked first; the others share names of weights.
    """
    for name, kind in _CLASSES.items():
        own = getattr(kind, 'describe', None)
        if own is not None and (found := own(state)) is not None:
            return name, *found
    if 'body.conv_stem.weight' in state:
        cells = state['hidden.weight'].shape[1] // NUMBERS_PER_CELL
        return 'LiteEncoder', 6, 32 * math.isqrt(cells), {}
    if 'stem.weight' in state:
        width, channels = state['stem.weight'].shape[:2]  # channels = 6 * (input side / 32)^2
        name = 'LightPooledEncoder' if 'reading.weight' in state else 'LightEncoder'
        return name, 6, 32 * math.isqrt(channels // 6), {'width': width}
    n_convs = sum(bool(re.fullmatch(r'styles\.0\.convs\.\d+\.weight', k)) for k in state)
    pyramid = 'latlayer1.weight' in state
    stem = 'input_layer.0.weight' if 'input_layer.0.weight' in state else 'conv1.weight'
    name = {
        ('conv1.weight', False): 'ResNetBackboneEncoder',
        ('conv1.weight', True): 'ResNetGradualStyleEncoder',
        ('input_layer.0.weight', False): 'BackboneEncoder',
        ('input_layer.0.weight', True): 'GradualStyleEncoder',
    }[stem, pyramid]
    return name, state[stem].shape[1], 16 * 2 ** min(n_convs, 30), {}


def load_resnet34(path: str | Path) -> dict[str, torch.Tensor]:
    """A torchvision ResNet-34 state dict from a file; UserError when it is not one."""
    hint = "It is torchvision's resnet34 ImageNet file (resnet34-333f7ec4.pth or -b627a593.pth)."
    state = load_state(path, what='ResNet-34 weight file', hint=hint)
    if 'conv1.weight' not in state or 'layer4.2.bn2.running_var' not in state:
        raise UserError(f'{path}: not a ResNet-34. {hint}')
    return state


@torch.no_grad()
def init_from_resnet34(
    encoder: nn.Module,
    state: dict[str, torch.Tensor],
    *,
    generator: torch.Generator | None = None,
    source: str | Path = 'the weight file',
) -> None:
    """Copies ImageNet weights into the stem and body of a ResNet-34 encoder.

    The stem's channels after the first three see the current reconstruction. They start as
    noise of the pretrained filters' own standard deviation, so that neither picture drowns the
    other. generator: for that noise. source: where `state` came from, for messages. UserError
    when the encoder has another body or a tensor does not fit.
    """
    if not isinstance(encoder, (ResNetBackboneEncoder, ResNetGradualStyleEncoder)):
        raise UserError(
            f'ResNet-34 weights do not fit {type(encoder).__name__}; use an encoder '
            'with a ResNet body, or leave `resnet34_weights` out'
        )
    flat = {}
    for key, value in state.items():
        if match := re.fullmatch(r'layer([1-4])\.(\d+)\.(.+)', key):
            first = (0, 3, 7, 13)[int(match[1]) - 1]
            flat[f'{first + int(match[2])}.{match[3]}'] = value
    try:
        encoder.body.load_state_dict(flat)
        encoder.bn1.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith('bn1.')})
        stem = state['conv1.weight']
        weight = encoder.conv1.weight
        if stem.shape != weight[:, :3].shape:
            raise RuntimeError(f'conv1.weight has the shape {tuple(stem.shape)}')
        weight[:, :3] = stem
        extra = torch.randn(weight[:, 3:].shape, generator=generator) * stem.std().cpu()
        weight[:, 3:] = extra.to(weight.device)
    except RuntimeError as error:
        raise UserError(f'{source}: the ResNet-34 weights do not fit: {mismatch(error)}') from error
