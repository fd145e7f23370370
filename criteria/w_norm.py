"""Penalty on latents far from the average (published W-norm loss)."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor


def latent_norm(average: Float[Tensor, 'L D'] | None = None) -> Callable[[Tensor], Tensor]:
    """A function ws [N, L, D] -> Frobenius norm of ws - average, [N]; average [L, D] or None."""

    def penalty(ws: Float[Tensor, 'N L D']) -> Float[Tensor, ' N']:
        return (ws if average is None else ws - average).flatten(1).norm(dim=1)

    return penalty
