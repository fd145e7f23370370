"""Local style alignment (paper, loss L_s): patches keep the Gram matrices of members' patches.

Shapes: G groups, K members, P patches, C feature channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor


def patch_grams(features: Float[Tensor, 'N C H W'], n_crop: int) -> Float32[Tensor, 'N P C C']:
    """Gram matrices of the n_crop x n_crop grid of patches, row by row.

    features [N, C, H, W] -> [N, P, C, C] float32, F F^T over the positions of a patch, not
    normalised (published). Pixels that do not fill a patch are dropped. Has first derivatives only.
    ValueError when a patch would be empty.
    """
    h, w = features.shape[2:]
    if min(h, w) < n_crop:
        raise ValueError(f'n_crop={n_crop} is more than the {h}x{w} pixels of the features')
    return _PatchGrams.apply(features, n_crop)


def _grid(x: Float[Tensor, 'N C H W'], n: int) -> Float[Tensor, 'N n n C h w']:
    """The n x n patches of x, a view."""
    h, w = x.shape[2] // n, x.shape[3] // n
    x = x[:, :, : h * n, : w * n].unflatten(2, (n, h)).unflatten(4, (n, w))
    return x.permute(0, 2, 4, 1, 3, 5)


class _PatchGrams(torch.autograd.Function):
    """As patch_grams, with first derivatives only.

    Written out, the gradient takes one product and one pass over the features, in their layout;
    autograd's takes two products and several passes, some of them slow.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, n: int) -> Tensor:
        x = _grid(features, n).to(torch.float32, memory_format=torch.contiguous_format)
        x = x.flatten(4).flatten(1, 2)  # [N, P, C, hw]
        ctx.save_for_backward(x, features)
        ctx.n = n
        return x @ x.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, features = ctx.saved_tensors
        found = torch.zeros_like(features)  # keeps its layout
        patches = _grid(found, ctx.n)
        patches.copy_(((grad + grad.mT) @ x).view(patches.shape))
        return found, None


def local_style_loss(
    grams: Float[Tensor, 'G P C C'],
    member_grams: Float[Tensor, 'G K P C C'],
    weights: Float[Tensor, 'G K'],
) -> Float[Tensor, ' G']:
    """Mean over members and their patches of ||Gram_y[q] - Gram_member||_F^2, per group, [G].

    grams [G, P, C, C] of the synthetic images; member_grams [G, K, P, C, C]; weights [G, K],
    1 / group size, and 0 for padding. q is the synthetic patch whose Gram matrix is most similar
    by cosine to the member's (many to one, recomputed each time, no gradient through the choice).
    """
    n_groups, n_members, n_patches = member_grams.shape[:3]
    y = grams.flatten(2)  # [G, P, CC]
    members = member_grams.reshape(n_groups, n_members * n_patches, -1)  # [G, KP, CC]
    with torch.no_grad():
        # The member's own length does not change which patch is the most similar.
        cosine = members @ F.normalize(y, dim=2, eps=1e-8).mT  # [G, KP, P]
        best = cosine.argmax(2)
    chosen = y.gather(1, best[:, :, None].expand(-1, -1, y.shape[2]))
    distance = (chosen - members).square().sum(2).view(n_groups, n_members, n_patches).mean(2)
    return (distance * weights).sum(1)
