"""LPIPS perceptual distance (Zhang et al. 2018), through the lpips package."""

import warnings
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.loading import load_state, mismatch
from utils.errors import UserError

_WHERE = (
    'It is alexnet-owt-7be5be79.pth of download.pytorch.org/models. Give its path with '
    '`lpips_weights` or as "alexnet" in configs/paths_config.py, or set `lpips_lambda`=0.'
)


class LPIPSLoss(nn.Module):
    """LPIPS v0.1 with the AlexNet backbone from `backbone_path`; frozen.

    The calibrated layer weights come with the package. UserError when the backbone is missing
    or is not torchvision's AlexNet.
    """

    def __init__(self, backbone_path: str | Path) -> None:
        super().__init__()
        state = load_state(backbone_path, what='AlexNet weight file', hint=_WHERE)
        import lpips  # imports torchvision's whole model zoo

        with warnings.catch_warnings():  # the package calls torchvision in an old way
            warnings.simplefilter('ignore', UserWarning)
            # pnet_rand keeps the package from downloading a backbone.
            self.net = lpips.LPIPS(net='alex', pnet_rand=True, verbose=False)
        self.normalise = lpips.normalize_tensor
        try:
            with torch.no_grad():
                for name, value in self.net.net.named_parameters():
                    _, index, part = name.split('.')  # slice1.0.weight -> features.0.weight
                    given = state[f'features.{index}.{part}']
                    if given.shape != value.shape:  # copy_ would spread it
                        raise RuntimeError(f'features.{index}.{part} has another shape')
                    value.copy_(given)
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f'{backbone_path} is not an AlexNet weight file of torchvision: '
                f'{mismatch(error)}. {_WHERE}'
            ) from error
        self.eval().requires_grad_(False)

    def features(self, img: Float[Tensor, 'N 3 H W']) -> list[Float[Tensor, 'N _ _ _']]:
        """Pictures [N, 3, H, W] in [-1, 1] -> five channel-normalised feature maps."""
        return [self.normalise(f) for f in self.net.net(self.net.scaling_layer(img))]

    def distance(
        self, features: list[Float[Tensor, 'N _ _ _']], targets: list[Float[Tensor, 'N _ _ _']]
    ) -> Float[Tensor, ' N']:
        """LPIPS of each pair of pictures, [N], from their `features`."""
        return sum(
            lin((a - b).square()).mean((2, 3))[:, 0]
            for lin, a, b in zip(self.net.lins, features, targets)
        )
