"""One latent per group: the optimisation of the paper, for many groups at once.

Minimises content_weight * L_c + style_weight * L_s over W+ latents, starting from the centroid of
the members' latents (paper, section 3; learning-rate schedule of the StyleGAN2 projector). Groups
share every pass through the frozen networks but nothing else: Adam works element by element, so a
group's result depends on the groups beside it by rounding only.

Shapes: G groups, K members (the largest group of the batch), L styles, D style dimension, S side
of the encoder, R side of the generator, F content features, P patches, C style channels.
"""

import contextlib
import dataclasses
import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from criteria.content import content_loss
from criteria.gram_style import MODES as STYLE_MODES
from criteria.gram_style import STRIDES, StyleTargets, StyleTerm
from models.features import FeatureNet
from models.features.content import ContentNetwork
from models.features.guide import Guide
from models.features.pretrained import FeatureNetwork
from models.psp import PSP
from models.stylegan2.frozen import FrozenSynthesis
from models.stylegan2.sampling import Leading, latent_spread, leading_directions
from utils.cuda_graphs import Step, captured
from utils.errors import UserError
from utils.images import from_uint8
from utils.kinds import (
    auto_or,
    choice,
    list_of,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_int,
)
from utils.options import option
from utils.precision import tf32

log = logging.getLogger(__name__)

ACTIVATIONS = {'fp32': torch.float32, 'tf32': torch.float32, 'bf16': torch.bfloat16}
PRECISIONS = tuple(ACTIVATIONS)
# Below so many groups a GPU waits for the host, and the steps are replayed as a CUDA graph.
_GRAPH_GROUPS, _GRAPH_STEPS = 6, 20
_FEATURE_BATCH = 8  # member photographs per pass through the style network
AUTO = 'auto'
# The peak rate of lr='auto', in standard deviations of the generator's latents.
_AUTO_RATE = 0.025
# What the published weights give with VGG19's layers at 256 px (docs/making.md).
STYLE_RATIO = 0.05
GUIDE_WEIGHT = 0.1  # docs/making.md
_HEADING = 'optimisation'  # of the flags


@dataclasses.dataclass(frozen=True)
class OptimizeConfig:
    """Settings of the optimisation; defaults are the paper's.

    style_weight: 'auto' makes the style loss relative (criteria.gram_style) and sets its weight
    so that the gradients of a group's first step, style against content, have the length ratio
    style_ratio. lr: 'auto' takes 1/40 of the
    spread of the generator's latents. style_mode: of criteria.gram_style; None takes 'best_match'
    (published) for the published kinds of style network, and 'whole' for pretrained feature
    networks. style_strides: of the latter's maps. guide_weight: of the guide's distance beside
    1 - cosine in the content loss, where there is a guide. latent_rank: groups start from their
    centroid in this many leading directions of the generator's own latents (docs/making.md); 0
    for all of it.
    """

    n_steps: int = option(
        100,
        nonnegative_int,
        'optimisation steps per group; 0 gives the centroid',
        group=_HEADING,
        metavar='STEPS',
        flag='num_steps',
    )
    n_crop: int = option(
        4, positive_int, 'patch grid is N x N', group=_HEADING, metavar='N', flag='num_crop'
    )
    content_weight: float = option(
        1e2, nonnegative_float, 'weight of the content loss', group=_HEADING, metavar='FLOAT'
    )
    style_weight: float | str = option(
        1e-6,
        auto_or(nonnegative_float),
        'weight of the style loss; 0 needs no style network; auto: as --style_ratio says',
        group=_HEADING,
        metavar='FLOAT|auto',
    )
    lr: float | str = option(
        0.1,
        auto_or(positive_float),
        'peak learning rate of the latents; auto: 1/40 of the standard deviation of the '
        "generator's latents",
        group=_HEADING,
        metavar='FLOAT|auto',
    )
    style_mode: str | None = option(
        None,
        choice(*STYLE_MODES),
        'best_match: every patch of a member draws the patch most like it (published); '
        "same_place: patches are drawn to the mean of the members' patches; whole: the picture "
        'is one patch (default: best_match for VGG19 and filters, whole for other networks)',
        group=_HEADING,
    )
    style_strides: tuple[int, ...] = option(
        STRIDES,
        list_of(positive_int, 'different whole numbers above 0'),
        'maps of these strides carry the style; VGG19 and filters have one map only',
        group=_HEADING,
        metavar='N',
    )
    style_ratio: float = option(
        STYLE_RATIO,
        positive_float,
        'with --style_weight=auto: length of the style gradient over that of the content '
        'gradient, in the first step',
        group=_HEADING,
        metavar='FLOAT',
    )
    guide_weight: float = option(
        GUIDE_WEIGHT,
        nonnegative_float,
        'weight of the guide within the content loss',
        group=_HEADING,
        metavar='FLOAT',
    )
    latent_rank: int = option(
        0,
        nonnegative_int,
        'groups start from the part of their centroid in so many leading directions of the '
        "generator's own latents; 0: in all",
        group=_HEADING,
        metavar='N',
    )

    def check_rank(self, style_dim: int) -> None:
        """UserError for more directions than a generator's latents have."""
        if self.latent_rank > style_dim:
            raise UserError(
                f'`latent_rank` {self.latent_rank}: the generator has latents of {style_dim} '
                f'numbers; use at most {style_dim}'
            )


class Group(NamedTuple):
    """One group's members: ws [k, L, D], photographs u8 [k, 3, S, S], content features [k, F].

    shares: [k], how much each member counts, with sum 1; None: all the same. offset: [L, D], what
    the optimisation starts away from the mean of ws; None: nothing. start: [L, D], where it starts
    whatever that mean is, for all groups of a batch or none; None: at the mean, or its part in
    `latent_rank`.
    """

    ws: torch.Tensor
    photos: torch.Tensor
    content: torch.Tensor
    shares: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    start: torch.Tensor | None = None

    def mean(self, values: Float[Tensor, ' k *s']) -> Float[Tensor, '*s']:
        """Mean over the members of values [k, ...]."""
        if self.shares is None:
            return values.mean(0)
        return torch.tensordot(self.shares.to(values), values, dims=1)


class Targets(NamedTuple):
    """What the groups of a batch are drawn towards; constant over the steps."""

    content: torch.Tensor  # [G, F] mean over the members' content features
    style: StyleTargets | None


class Result(NamedTuple):
    """ws [G, L, D]; image [G, 3, R, R]; losses [steps, G, 2] (L_c, L_s, unweighted).

    centroid: [G, 3, R, R], the picture of the centroid, without an offset.
    """

    ws: torch.Tensor
    image: torch.Tensor
    losses: torch.Tensor
    centroid: torch.Tensor


def equal_shares(people: Sequence[Hashable]) -> Float[Tensor, ' k'] | None:
    """Shares [k] of a group's images by which people count the same; None when all have one.

    people: who is on each image.
    """
    images = Counter(people)
    if len(images) == len(people):
        return None
    return torch.tensor([1 / (images[p] * len(images)) for p in people], dtype=torch.float64)


def learning_rate(step: int, n_steps: int, lr: float = 0.1) -> float:
    """Ramp up over the first 5 % and cosine down over the last 25 % (0 at step 0)."""
    t = step / n_steps
    down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / 0.25))
    return lr * down * min(1.0, t / 0.05)


def matmul_precision(precision: str) -> contextlib.AbstractContextManager[None]:
    """TF32 on for 'tf32' and 'bf16', off for 'fp32', and back as it was afterwards."""
    return tf32(precision != 'fp32')


def style_term(net: FeatureNet, config: OptimizeConfig) -> StyleTerm:
    """The style loss of a network under the settings of `config`."""
    mode = config.style_mode or ('whole' if isinstance(net, FeatureNetwork) else 'best_match')
    return StyleTerm(
        net,
        mode=mode,
        n_crop=config.n_crop,
        strides=config.style_strides,
        relative=config.style_weight == AUTO,
    )


class GroupOptimizer:
    """Holds the frozen networks and optimises batches of groups.

    psp: models.psp.PSP; content_net: ContentNetwork or FeatureNetwork of models.features;
    style_net: a network of models.features.style, or a FeatureNetwork; None for no style loss
    (L_s is 0). The same FeatureNetwork given as both is passed once a step. guide: for the
    features of content_net; its distance is a part of L_c. precision: 'fp32',
    'tf32', or 'bf16' (generator and feature networks in bfloat16; latents, styles, Adam, Gram
    matrices and losses stay float32). The networks are moved to `device`, the feature networks
    are converted in place, and the generator's weights are copied: later changes to it have no
    effect.
    """

    def __init__(
        self,
        psp: PSP,
        content_net: ContentNetwork | FeatureNetwork,
        style_net: FeatureNet | None,
        *,
        config: OptimizeConfig,
        device: torch.device | str,
        precision: str = 'fp32',
        guide: Guide | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f'precision={precision!r}, want one of {PRECISIONS}')
        config.check_rank(psp.decoder.style_dim)
        self.config, self.device, self.precision = config, torch.device(device), precision
        self.psp = psp.to(self.device).eval().requires_grad_(False)
        dtype = ACTIVATIONS[precision]
        self.synthesis = FrozenSynthesis(self.psp.decoder, dtype=dtype)
        layout: dict[str, Any] = {
            'device': self.device,
            'dtype': dtype,
            'memory_format': torch.channels_last,
        }
        self.content_net = content_net.to(**layout)
        self.style = None if style_net is None else style_term(style_net.to(**layout), config)
        self.guide = None if guide is None else guide.to(self.device)
        self._leading: Leading | None = None
        self._shared: FeatureNetwork | None = None  # the network of both losses, passed once
        if content_net is style_net and isinstance(content_net, FeatureNetwork):
            self._shared = content_net

    @torch.no_grad()
    def targets(self, groups: Sequence[Group]) -> Targets:
        """Targets of a list of Group."""
        content = torch.stack([g.mean(g.content.to(self.device)) for g in groups])
        if self.style is None:
            return Targets(content, None)
        grams, weights = [], []
        for group in groups:
            parts = [
                self.style.grams(self.style.maps(from_uint8(part)))
                for part in group.photos.to(self.device).split(_FEATURE_BATCH)
            ]
            grams.append([torch.cat(stride) for stride in zip(*parts)])
            k = len(group.ws)
            shares = torch.full((k,), 1 / k) if group.shares is None else group.shares
            weights.append(shares.float().to(self.device))
        return Targets(content, self.style.targets(grams, weights))

    def losses(
        self, ws: Float[Tensor, 'G L D'], targets: Targets
    ) -> tuple[Float[Tensor, ' G'], Float[Tensor, ' G'], Float[Tensor, 'G 3 R R']]:
        """(L_c [G], L_s [G], pictures [G, 3, R, R]) of latents ws [G, L, D]."""
        image = self.synthesis(ws)
        y = self.psp.pool(image)
        if self.style is None or targets.style is None:
            content = self._content(self.content_net.features(y), targets)
            return content, torch.zeros_like(content), image
        if self._shared is not None:
            maps = self.style.maps(y, self._shared.pooled_strides)
            features = self._shared.pool(maps)
        else:
            maps, features = self.style.maps(y), self.content_net.features(y)
        return self._content(features, targets), self.style.loss(maps, targets.style), image

    def _content(self, features: Float[Tensor, 'G F'], targets: Targets) -> Float[Tensor, ' G']:
        """L_c [G] of features [G, F]."""
        loss = content_loss(features, targets.content)
        if self.guide is None:
            return loss
        return loss + self.config.guide_weight * self.guide.distance(features, targets.content)

    def centroids(self, groups: Sequence[Group]) -> Float[Tensor, 'G L D']:
        """The means of the groups' latents, [G, L, D]."""
        return torch.stack([g.mean(g.ws.to(self.device)) for g in groups])

    def _starts(
        self, groups: Sequence[Group], means: Float[Tensor, 'G L D']
    ) -> Float[Tensor, 'G L D']:
        """Where the groups of these means start, [G, L, D]: as they say, or in `latent_rank`."""
        given = [g.start for g in groups if g.start is not None]
        if given:
            return torch.stack(given).to(means)
        if self.config.latent_rank:
            if self._leading is None:
                self._leading = leading_directions(self.psp.decoder, self.config.latent_rank)
            middle, directions, *_ = self._leading
            away = (means - middle).double()
            means = middle + (away @ directions.T @ directions).float()
        return torch.stack(
            [m if g.offset is None else m + g.offset.to(m) for m, g in zip(means, groups)]
        )

    @functools.cached_property
    def _spread(self) -> float:
        return latent_spread(self.psp.decoder)

    def peak_rate(self) -> float:
        """The peak learning rate of the latents, 'auto' resolved."""
        if self.config.lr == AUTO:
            return _AUTO_RATE * self._spread
        return float(self.config.lr)

    def style_weights(self, start: Float[Tensor, 'G L D'], targets: Targets) -> Float[Tensor, ' G']:
        """The weight of each group's style loss, [G], for latents `start` [G, L, D].

        'auto': the style gradient of the latents is style_ratio of the content gradient there.
        """
        cfg = self.config
        if cfg.style_weight != AUTO or self.style is None or not cfg.content_weight:
            weight = 1.0 if cfg.style_weight == AUTO else float(cfg.style_weight)
            return torch.full((len(start),), weight, device=self.device)
        norms = []
        for part in (0, 1):
            ws = start.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.losses(ws, targets)[part].sum(), ws)
            norms.append(gradient.flatten(1).norm(dim=1))
        return cfg.content_weight * cfg.style_ratio * norms[0] / norms[1].clamp_min(1e-12)

    def _step(self, ws: torch.Tensor, targets: Targets, style_weights: torch.Tensor) -> Step:
        """What a step computes: (L_c [G], L_s [G], pictures, the gradient of the latents)."""

        def compute() -> tuple[torch.Tensor, ...]:
            content, style, image = self.losses(ws, targets)
            total = self.config.content_weight * content + style_weights * style
            (gradient,) = torch.autograd.grad(total.sum(), ws)
            return content.detach(), style.detach(), image.detach(), gradient

        return compute

    def run(
        self, groups: Sequence[Group], *, on_step: Callable[[int], None] | None = None
    ) -> Result:
        """Optimises a list of Group together; returns a Result on the CPU.

        on_step: called with the number of groups after each step. UserError when a loss is not
        finite.
        """
        cfg = self.config
        with matmul_precision(self.precision):
            targets = self.targets(groups)
            means = self.centroids(groups)
            start = self._starts(groups, means)
            moved = cfg.latent_rank > 0 or any(
                g.start is not None or g.offset is not None for g in groups
            )
            ws = start.clone().requires_grad_(True)
            rate, style_weights = self.peak_rate(), self.style_weights(start, targets)
            on_gpu = self.device.type == 'cuda'
            adam = torch.optim.Adam([ws], lr=rate, betas=(0.9, 0.999), eps=1e-8, fused=on_gpu)
            compute = self._step(ws, targets, style_weights)
            if on_gpu and len(groups) < _GRAPH_GROUPS and cfg.n_steps >= _GRAPH_STEPS:
                compute = captured(compute, ws)
            history = torch.empty(cfg.n_steps, len(groups), 2, device=self.device)
            centroid = None
            for step in range(cfg.n_steps):
                adam.param_groups[0]['lr'] = learning_rate(step, cfg.n_steps, rate)
                content, style, image, ws.grad = compute()
                adam.step()
                history[step, :, 0], history[step, :, 1] = content, style
                if step == 0 and not moved:
                    centroid = image.clone()
                if on_step is not None:
                    on_step(len(groups))
            with torch.no_grad():
                image = self.synthesis(ws.detach())
                if centroid is None:
                    still = not moved and not cfg.n_steps
                    centroid = image if still else self.synthesis(means)
        history = history.cpu()
        if not (torch.isfinite(history).all() and torch.isfinite(image).all()):
            raise UserError(
                'the optimisation diverged: a loss is not a number; lower '
                '`style_weight` or `content_weight`, or use `precision` fp32'
            )
        return Result(ws.detach().cpu(), image.float().cpu(), history, centroid.float().cpu())


def group_memory(psp: PSP, style: StyleTerm | None, precision: str) -> int:
    """Rough bytes one group needs during a step: maps kept for the gradient and working copies."""
    item = 2 if precision == 'bf16' else 4
    maps = [channels * side**2 for side, channels in psp.decoder.channels.items()]
    features = 4 * style.n_numbers(psp.input_size) if style is not None else 0
    return (2 * sum(maps) + 6 * max(maps) + features) * item


def batch_that_fits(
    psp: PSP, style: StyleTerm | None, precision: str, free_bytes: int, *, most: int
) -> int:
    """How many groups to optimise together within `free_bytes`, at least 1, at most `most`."""
    return int(max(1, min(most, 0.7 * free_bytes // group_memory(psp, style, precision))))
