"""One latent per group: the optimisation of the paper, for many groups at once.

Minimises content_weight * L_c + style_weight * L_s over W+ latents, starting from the centroid of
the members' latents (paper, section 3; learning-rate schedule of the StyleGAN2 projector). Groups
share every pass through the frozen networks but nothing else: Adam works element by element, so a
group's result does not depend on which groups stand beside it.

Shapes: G groups, K members (the largest group of the batch), L styles, D style dimension, S side
of the encoder, R side of the generator, F content features, P patches, C style channels.
"""
import contextlib
import dataclasses
import logging
import math
from typing import NamedTuple

import torch

from criteria.content import content_loss
from criteria.local_style import local_style_loss, patch_grams
from models.stylegan2.frozen import FrozenSynthesis
from utils.errors import UserError

log = logging.getLogger(__name__)

ACTIVATIONS = {'fp32': torch.float32, 'tf32': torch.float32, 'bf16': torch.bfloat16}
PRECISIONS = tuple(ACTIVATIONS)
_FEATURE_BATCH = 8    # member photographs per pass through the style network


@dataclasses.dataclass(frozen=True)
class OptimizeConfig:
    """Settings of the optimisation; defaults are the paper's."""

    n_steps: int = 100
    n_crop: int = 4
    content_weight: float = 1e2
    style_weight: float = 1e-6
    lr: float = 0.1


class Group(NamedTuple):
    """One group's members: ws [k, L, D], photographs u8 [k, 3, S, S], content features [k, F]."""

    ws: torch.Tensor
    photos: torch.Tensor
    content: torch.Tensor


class Targets(NamedTuple):
    """What the groups of a batch are drawn towards; constant over the steps."""

    content: torch.Tensor    # [G, F] mean of the members' content features
    grams: torch.Tensor      # [G, K, P, C, C]
    weights: torch.Tensor    # [G, K] 1 / group size, 0 for padding


class Result(NamedTuple):
    """ws [G, L, D]; image [G, 3, R, R]; losses [steps, G, 2] (L_c, L_s, unweighted).

    centroid: [G, 3, R, R], the picture of the plain latent mean.
    """

    ws: torch.Tensor
    image: torch.Tensor
    losses: torch.Tensor
    centroid: torch.Tensor


def learning_rate(step, n_steps, lr=0.1):
    """Ramp up over the first 5 % and cosine down over the last 25 % (0 at step 0)."""
    t = step / n_steps
    down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / 0.25))
    return lr * down * min(1.0, t / 0.05)


@contextlib.contextmanager
def matmul_precision(precision):
    """TF32 on for 'tf32' and 'bf16', off for 'fp32', and back as it was afterwards."""
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision != 'fp32'
    torch.backends.cudnn.allow_tf32 = precision != 'fp32'
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv


class GroupOptimizer:
    """Holds the frozen networks and optimises batches of groups.

    psp: models.psp.PSP; content_net: models.features.content.ContentNetwork; style_net with
    `features(img)`. precision: 'fp32', 'tf32', or 'bf16' (generator and feature networks in
    bfloat16; latents, styles, Adam, Gram matrices and losses stay float32). The networks are
    moved to `device`, the feature networks are converted in place, and the generator's weights
    are copied: later changes to it have no effect.
    """

    def __init__(self, psp, content_net, style_net, *, config, device, precision='fp32'):
        if precision not in PRECISIONS:
            raise ValueError(f'precision={precision!r}, want one of {PRECISIONS}')
        self.config, self.device, self.precision = config, torch.device(device), precision
        self.psp = psp.to(self.device).eval().requires_grad_(False)
        dtype = ACTIVATIONS[precision]
        self.synthesis = FrozenSynthesis(self.psp.decoder, dtype=dtype)
        layout = {'device': self.device, 'dtype': dtype, 'memory_format': torch.channels_last}
        self.content_net = content_net.to(**layout)
        self.style_net = style_net.to(**layout)

    @torch.no_grad()
    def targets(self, groups):
        """Targets of a list of Group."""
        sizes = [len(g.ws) for g in groups]
        most = max(sizes)
        grams = None
        for i, group in enumerate(groups):
            photos = group.photos.to(self.device)
            parts = []
            for part in photos.split(_FEATURE_BATCH):
                x = part.float().div(127.5).sub(1)
                parts.append(patch_grams(self.style_net.features(x), self.config.n_crop))
            own = torch.cat(parts)
            if grams is None:
                grams = own.new_zeros(len(groups), most, *own.shape[1:])
            grams[i, :sizes[i]] = own
        weights = torch.tensor([[1 / k if j < k else 0.0 for j in range(most)] for k in sizes],
                               device=self.device)
        content = torch.stack([g.content.to(self.device).mean(0) for g in groups])
        return Targets(content, grams, weights)

    def losses(self, ws, targets):
        """(L_c [G], L_s [G], pictures [G, 3, R, R]) of latents ws [G, L, D]."""
        image = self.synthesis(ws)
        y = self.psp.pool(image)
        content = content_loss(self.content_net.features(y), targets.content)
        grams = patch_grams(self.style_net.features(y), self.config.n_crop)
        return content, local_style_loss(grams, targets.grams, targets.weights), image

    def run(self, groups, *, on_step=None):
        """Optimises a list of Group together; returns a Result on the CPU.

        on_step: called with the number of groups after each step. UserError when a loss is not
        finite.
        """
        cfg = self.config
        with matmul_precision(self.precision):
            targets = self.targets(groups)
            start = torch.stack([g.ws.to(self.device).mean(0) for g in groups])
            ws = start.clone().requires_grad_(True)
            adam = torch.optim.Adam([ws], lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8)
            history = torch.empty(cfg.n_steps, len(groups), 2, device=self.device)
            centroid = None
            for step in range(cfg.n_steps):
                adam.param_groups[0]['lr'] = learning_rate(step, cfg.n_steps, cfg.lr)
                content, style, image = self.losses(ws, targets)
                total = cfg.content_weight * content + cfg.style_weight * style
                ws.grad, = torch.autograd.grad(total.sum(), ws)
                adam.step()
                history[step, :, 0], history[step, :, 1] = content.detach(), style.detach()
                if centroid is None:
                    centroid = image.detach()
                if on_step is not None:
                    on_step(len(groups))
            with torch.no_grad():
                if centroid is None:
                    centroid = self.synthesis(start)
                image = self.synthesis(ws.detach())
        history = history.cpu()
        if not (torch.isfinite(history).all() and torch.isfinite(image).all()):
            raise UserError('the optimisation diverged: a loss is not a number; lower '
                            '--style_weight or --content_weight, or use --precision fp32')
        return Result(ws.detach().cpu(), image.float().cpu(), history, centroid.float().cpu())


def group_memory(psp, style_channels, precision):
    """Rough bytes one group needs during a step: maps kept for the gradient and working copies."""
    item = 2 if precision == 'bf16' else 4
    maps = [channels * side ** 2 for side, channels in psp.decoder.channels.items()]
    features = psp.input_size ** 2 * style_channels * 4
    return (2 * sum(maps) + 6 * max(maps) + features) * item


def batch_that_fits(psp, style_channels, precision, free_bytes, *, most):
    """How many groups to optimise together within `free_bytes`, at least 1, at most `most`."""
    return int(max(1, min(most, 0.7 * free_bytes // group_memory(psp, style_channels,
                                                                 precision))))
