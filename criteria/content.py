"""The content loss (paper, loss L_c)."""

from jaxtyping import Float, Float32
from torch import Tensor


def content_loss(
    features: Float[Tensor, 'G F'], mean_targets: Float[Tensor, 'G F']
) -> Float32[Tensor, ' G']:
    """1 - mean_i <phi(y), phi_i> of each group, [G].

    features: unit vectors of the synthetic images [G, F]; mean_targets: the members' unit
    vectors, averaged [G, F] (the inner product is linear, so the mean suffices). Float32 out.
    """
    # Near 0 the float32 rounding of a cosine near 1 would be a per cent of the loss.
    return (1 - (features.double() * mean_targets).sum(1)).float()
