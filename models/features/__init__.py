"""Frozen networks that turn pictures into features, and what all of them offer."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class FeatureNet(Protocol):
    """What a loss asks of a frozen network, whatever it is made of.

    name: for records and messages; n_features: C of what `features` gives.
    """

    name: str
    n_features: int

    def features(self, img: Float[Tensor, 'N 3 H W']) -> Float[Tensor, 'N C ...']:
        """Pictures [N, 3, H, W] in [-1, 1] -> maps [N, C, H, W], or unit vectors [N, C]."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module.to."""
