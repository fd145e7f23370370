"""Local style alignment (paper, loss L_s): patches keep the Gram matrices of members' patches.

Shapes: G groups, K members, P patches, C feature channels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor


def patch_grams(features: Float[Tensor, 'N C H W'], n_crop: int) -> Float32[Tensor, 'N P C C']:
    """Gram matrices of the n_crop x n_crop grid of patches, row by row.

    features [N, C, H, W] -> [N, P, C, C] float32, F F^T over the positions of a patch, not
    normalised (published). Pixels that do not fill a patch are dropped.
    ValueError when a patch would be empty.
    """
    n, c, h, w = features.shape
    ph, pw = h // n_crop, w // n_crop
    if min(ph, pw) < 1:
        raise ValueError(f'n_crop={n_crop} is more than the {h}x{w} pixels of the features')
    x = features[:, :, : ph * n_crop, : pw * n_crop].float()
    x = x.reshape(n, c, n_crop, ph, n_crop, pw).permute(0, 2, 4, 1, 3, 5)
    x = x.reshape(n, n_crop**2, c, ph * pw)
    return x @ x.mT


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
