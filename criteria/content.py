"""The content loss (paper, loss L_c)."""

from torch import Tensor


def content_loss(features: Tensor, mean_targets: Tensor) -> Tensor:
    """1 - mean_i <phi(y), phi_i> of each group, [G].

    features: unit vectors of the synthetic images [G, F]; mean_targets: the members' unit
    vectors, averaged [G, F] (the inner product is linear, so the mean suffices). Float32 out.
    """
    # Near 0 the float32 rounding of a cosine near 1 would be a per cent of the loss.
    return (1 - (features.double() * mean_targets).sum(1)).float()
