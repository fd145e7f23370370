"""Training of encoder and generator together, against opponents, for averages that look like eyes.

The encoder finds one latent a picture (or, as e4e, one and deltas); the generator learns to draw
the photograph from it, band by band of its frequencies, and to draw from the mean latent of
several photographs a picture that has the mean of their features. Reconstructions and pictures of
means both meet the opponents (training.picture_game). The generator adds no noise.

Shapes: N images, L styles, D style dimension, S side the encoder sees.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from criteria.feature_distance import map_distance
from criteria.laplacian import N_BANDS, rest
from models.features.pretrained import FeatureNetwork
from training.coach_restyle_e4e import E4ECoach
from training.picture_game import GameConfig, PictureGame
from training.stylegan2_networks import silence_noise
from utils.errors import UserError
from utils.kinds import list_of, nonnegative_float, nonnegative_int, positive_float
from utils.options import option
from utils.seeds import torch_generator

_GROUP = 'joint training'  # heading of the flags
_STRIDES = (2, 4, 8, 16, 32)
_BETAS = (0.5, 0.99)  # Adam's, as usual beside an adversary


def _number(default: float, help: str) -> float:
    return option(default, nonnegative_float, help, group=_GROUP, metavar='X')


def _whole(default: int, help: str) -> int:
    return option(default, nonnegative_int, help, group=_GROUP, metavar='N')


@dataclasses.dataclass(frozen=True)
class JointConfig:
    """What the joint training adds; weights of losses are `*_lambda`.

    mean_of: photographs behind a mean; n_means: means drawn from each pass, 0 for none; mean_start:
    step at which they come in. feature_lambda, content_lambda: of the distance of feature maps
    place by place, and of pooled features. mean_content_lambda: of the latter, picture of a mean
    latent against the mean of the members. mean_colour_lambda: of its coarsest band
    against that of the members' mean. spread_lambda: holds the deviation of each number of the
    latents near 1. average: half-life in steps of the averaged weights that are validated and
    exported. most: gradients of encoder and of generator are shortened to this many times their
    usual norm. game: None for no opponents.
    """

    decoder_lr: float = _number(2e-3, "the generator's learning rate")
    mean_of: int = _whole(5, 'photographs behind a mean latent')
    n_means: int = _whole(5, 'means drawn from each pass')
    mean_start: int = _whole(400, 'step at which means come in')
    feature_lambda: float = _number(2.0, 'weight of the distance of lite0 maps, place by place')
    content_lambda: float = _number(10.0, 'weight of the distance of pooled lite0 features')
    mean_content_lambda: float = _number(
        20.0, 'the same, picture of a mean latent against the mean of its members'
    )
    mean_colour_lambda: float = _number(
        0.5, 'weight of the colours of such pictures against the members'
    )
    spread_lambda: float = _number(0.5, 'weight that holds the deviation of the latents near 1')
    average: float = _number(
        350.0, 'half-life, in steps, of the averaged weights that are exported'
    )
    most: float = _number(1.5, 'gradients are shortened to this many times their usual norm')
    game: GameConfig | None = GameConfig()


@dataclasses.dataclass(frozen=True)
class JointOptions:
    """The options of a joint training beside those of e4e."""

    joint: JointConfig
    game: GameConfig
    band_lambdas: list[float] = option(
        [0.25, 0.5, 1.0, 1.0, 1.0],
        list_of(nonnegative_float, 'weights', length=N_BANDS + 1, make=list),
        'weights of the bands of frequencies, finest first, and of the rest',
        group=_GROUP,
        metavar='WEIGHT',
    )
    first_spread: float = option(
        20.0,
        positive_float,
        "factor of a new encoder's first latents, which are small otherwise",
        group=_GROUP,
        metavar='X',
    )


class JointCoach(E4ECoach):
    """An E4ECoach that trains the generator too; `losses` are those of pixels.

    joint: its settings; features: a network on the coach's device with maps of the strides 2 to
    32. UserError for settings that do not go together.
    """

    def __init__(
        self, *arguments: Any, joint: JointConfig, features: FeatureNetwork, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        cfg = self.config
        if not cfg.train_decoder or cfg.n_iters != 1 or cfg.synthetic:
            raise UserError(
                'the joint training trains the generator, on one refinement a batch, without '
                'samples: set `train_decoder`, `n_iters_per_batch` 1 and `synthetic` 0'
            )
        self.joint, self.features = joint, features
        self.norms: dict[str, float] = {}  # of the gradients, by network
        if self.amp_dtype == torch.bfloat16:
            features.to(torch.bfloat16)
        silence_noise(self.psp.decoder)
        self.optimizer = torch.optim.Adam(
            [
                {'params': list(self.psp.encoder.parameters()), 'lr': cfg.learning_rate},
                {'params': list(self.psp.decoder.parameters()), 'lr': joint.decoder_lr},
            ],
            betas=_BETAS,
        )
        self.optimizer.register_step_pre_hook(self._shorten)
        self.opponents: PictureGame | None = None
        if joint.game is not None:
            self.opponents = PictureGame(features, joint.game, seed=cfg.seed, device=self.device)
        self.mean_psp = copy.deepcopy(self.psp).eval().requires_grad_(False)

    def _noise(self, t: int | str, part: slice) -> list[None]:
        return [None] * self.psp.decoder.n_noise

    def _targets(self, x: Tensor) -> dict:
        targets = super()._targets(x)
        with torch.no_grad():
            maps = self.features.maps(x, _STRIDES)
        return {**targets, 'photographs': x, 'maps': maps, 'pooled': self.features.pool(maps)}

    def _terms(
        self, y: Tensor, targets: dict, ws: Tensor, part: slice
    ) -> tuple[dict[str, Tensor], Tensor]:
        values, total = super()._terms(y, targets, ws, part)
        joint, n = self.joint, len(y)
        spread = (ws[:, 0].float().std(0) - 1).square().mean()
        total = total + joint.spread_lambda * spread
        values['spread'] = ws[:, 0].float().std(0).mean()
        groups = self._groups(n, part)
        pictures = y
        if len(groups):
            with self._autocast(enabled=False):
                means = self.psp.decode(ws[groups].mean(1), noise=self._noise(0, part))
            pictures = torch.cat([y, self.psp.pool(means)])
        maps = self.features.maps(pictures, _STRIDES)
        pooled = self.features.pool(maps)
        ours = {s: m[:n] for s, m in maps.items()}
        values['features'] = map_distance(ours, targets['maps'], _STRIDES[:-1]).mean()
        values['content'] = 1 - F.cosine_similarity(pooled[:n], targets['pooled']).mean()
        total = total + joint.feature_lambda * values['features']
        total = total + joint.content_lambda * values['content']
        if len(groups):
            more, term = self._means(pictures[n:], pooled[n:], targets, groups)
            values, total = values | more, total + term
        if self.opponents is not None and self.opponents.config.learns(self.step_count):
            total = self._play(self.opponents, pictures, maps, targets, total, values)
        return values, total

    def _shorten(self, *_: object) -> None:
        """Shortens gradients that are far longer than usual, before the optimiser's step."""
        for name in ('encoder', 'decoder'):
            network = getattr(self.psp, name)
            pairs = [(p, p.grad) for p in network.parameters() if p.grad is not None]
            used, gradients = zip(*pairs)
            norm = torch.nn.utils.get_total_norm(gradients)
            usual = self.norms.get(name, float(norm))
            longest = self.joint.most * usual
            torch.nn.utils.clip_grads_with_norm_(used, longest, norm)
            self.norms[name] = 0.98 * usual + 0.02 * min(float(norm), 3 * usual)

    def _groups(self, n: int, part: slice) -> Tensor:
        """Whose latents are averaged: positions in this pass of n images, [n_means, mean_of]."""
        joint = self.joint
        if self.step_count < joint.mean_start or not joint.n_means:
            return torch.empty(0, joint.mean_of, dtype=torch.long)
        if n < joint.mean_of:
            raise UserError(
                f'means of {joint.mean_of} photographs need at least as many in each pass; here '
                f'are {n}: raise `batch_size`, or lower `accumulate`'
            )
        draw = torch_generator(self.config.seed, 'means', self.step_count, part.start)
        return torch.stack(
            [torch.randperm(n, generator=draw)[: joint.mean_of] for _ in range(joint.n_means)]
        )

    def _means(
        self, pictures: Tensor, pooled: Tensor, targets: dict, groups: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of the pictures of mean latents against the means of their members."""
        content = 1 - F.cosine_similarity(pooled, targets['pooled'][groups].mean(1)).mean()
        colour = (rest(pictures) - rest(targets['photographs'][groups].mean(1))).square().mean()
        total = self.joint.mean_content_lambda * content + self.joint.mean_colour_lambda * colour
        return {'mean_content': content, 'mean_colour': colour}, total

    def _play(
        self,
        game: PictureGame,
        pictures: Tensor,
        maps: dict[int, Tensor],
        targets: dict,
        total: Tensor,
        values: dict[str, Tensor],
    ) -> Tensor:
        """Lets the opponents see this pass; adds to `values`; the new total."""
        passes = self.config.accumulate
        heard, weighted = game.loss(pictures, maps, total, self.step_count)
        values |= heard
        total = total + weighted
        with self._autocast(enabled=False):
            values |= game.see(
                pictures, maps, targets['photographs'], targets['maps'], passes=passes
            )
        return total

    def step(self, batch: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """As E4ECoach.step, then one step of the opponents and of the averages."""
        number = self.step_count
        found = super().step(batch)
        if self.opponents is not None and self.opponents.config.learns(number):
            self.opponents.step()
        # A short average at first, which would otherwise remember the untrained networks.
        half_life = min(self.joint.average, 0.07 * self.step_count)
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.mean_psp.parameters()),
                list(self.psp.parameters()),
                1 - 0.5 ** (1 / half_life),
            )
        return found

    @contextlib.contextmanager
    def _averages(self) -> Iterator[None]:
        """The averaged networks in the place of the trained ones."""
        trained, self.psp = self.psp, self.mean_psp
        try:
            yield
        finally:
            self.psp = trained

    def validate(self) -> tuple[dict[str, float], Tensor | None]:
        """As E4ECoach.validate, of the averaged networks."""
        with self._averages():
            return super().validate()

    def export(self) -> dict:
        """As Coach.export, of the averaged networks."""
        with self._averages():
            return super().export()

    def state(self) -> dict:
        """As E4ECoach.state, with averages and opponents."""
        game = {} if self.opponents is None else self.opponents.state()
        return {
            **super().state(),
            'averaged': self.mean_psp.state_dict(),
            'norms': dict(self.norms),
            **game,
        }

    def load_state(self, state: dict, *, source: str | Path = 'state') -> None:
        """As E4ECoach.load_state."""
        super().load_state(state, source=source)
        try:
            self.mean_psp.load_state_dict(state['averaged'])
            self.norms = dict(state['norms'])
            if self.opponents is not None:
                self.opponents.load_state(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f'{source} is not of a joint training with these options') from error
