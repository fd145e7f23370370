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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from criteria.feature_distance import map_distance
from criteria.laplacian import N_BANDS, rest, texture
from criteria.ridges import ridge_share
from models.features.guide import Guide
from models.features.pretrained import FeatureNetwork
from training.coach_restyle_e4e import E4ECoach
from training.picture_game import GameConfig, PictureGame, Shown
from training.stylegan2_networks import silence_noise
from utils.errors import UserError
from utils.kinds import list_of, nonnegative_float, nonnegative_int, path, positive_float
from utils.options import option
from utils.seeds import torch_generator

_GROUP = 'joint training'  # heading of the flags
_STRIDES = (2, 4, 8, 16, 32)
_BETAS = (0.5, 0.99)  # Adam's, as usual beside an adversary
_MOST = 3.0  # deviations of a photograph's scores that opponents are told
_LEAST = 1e-8  # of amounts that are divided by


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
    latent against the mean of the members. mean_colour_lambda: of its coarsest band against that
    of the members' mean. contrast_lambda: of the share that is missed of what differs
    between the photographs of a pass in pooled features. texture_lambda, vessel_lambda: of the
    squared log-ratio of criteria.laplacian.texture, and of criteria.ridges.ridge_share.
    guide_lambda: of the guide's distance, of reconstructions and of pictures of means. reading_lr:
    rate of an encoder's `reading`. spread_lambda: holds the deviation of each number of the latents
    near 1. average: half-life in steps of the averaged weights that are validated and exported.
    most: gradients of encoder and of generator are shortened to this many times their usual norm.
    game: None for no opponents.
    """

    decoder_lr: float = _number(2e-3, "the generator's learning rate")
    mean_of: int = _whole(5, 'photographs behind a mean latent')
    n_means: int = _whole(5, 'means drawn from each pass')
    mean_start: int = _whole(400, 'step at which means come in')
    feature_lambda: float = _number(2.0, 'weight of the distance of lite0 maps, place by place')
    content_lambda: float = _number(10.0, 'weight of the distance of pooled lite0 features')
    mean_content_lambda: float = _number(
        10.0, 'the same, picture of a mean latent against the mean of its members'
    )
    mean_colour_lambda: float = _number(
        0.5, 'weight of the colours of such pictures against the members'
    )
    contrast_lambda: float = _number(
        1.0, 'weight of what differs between photographs in pooled lite0 features'
    )
    texture_lambda: float = _number(1.5, 'weight of the energies of the three finest bands')
    vessel_lambda: float = _number(1.5, 'weight of the share of the field on dark ridges')
    guide_lambda: float = _number(0.1, 'weight of the directions of the guide')
    reading_lr: float = _number(5e-4, "the learning rate of the encoder's reading of features")
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
        [0.03, 0.2, 0.7, 1.0, 1.0],
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
    guide: Path | None = option(
        None,
        path,
        'directions of lite0 features that show disease (classification/main.py makes it); '
        'reconstructions and means are to keep them, and patches are judged with them',
        group=_GROUP,
        metavar='FILE',
    )


def _log_ratio(amounts: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared logarithm of amounts over those that are wanted, 0-d."""
    return ((amounts + _LEAST) / (wanted + _LEAST)).log().square().mean()


def _with_means(rows: Tensor, groups: Tensor) -> Tensor:
    """Rows [n, ...] of photographs, then the means of the groups' rows: [n + G, ...]."""
    return torch.cat([rows, rows[groups].mean(1)]) if len(groups) else rows


class JointCoach(E4ECoach):
    """An E4ECoach that trains the generator too; `losses` are those of pixels.

    joint: its settings; features: a network on the coach's device with maps of the strides 2 to
    32; deviations: of the two finest bands of the photographs; guide: for disease, of these
    features; centre: the mean of the photographs' scores along it, [D]. UserError for settings
    that do not go together.
    """

    def __init__(
        self,
        *arguments: Any,
        joint: JointConfig,
        features: FeatureNetwork,
        deviations: Sequence[float],
        guide: Guide | None = None,
        centre: Tensor | float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        cfg = self.config
        if not cfg.train_decoder or cfg.n_iters != 1 or cfg.synthetic:
            raise UserError(
                'the joint training trains the generator, on one refinement a batch, without '
                'samples: set `train_decoder`, `n_iters_per_batch` 1 and `synthetic` 0'
            )
        self.joint, self.features = joint, features
        self.guide = None if guide is None else guide.to(self.device)
        self.centre = torch.as_tensor(centre, device=self.device)
        self.norms: dict[str, float] = {}  # of the gradients, by network
        if self.amp_dtype == torch.bfloat16:
            features.to(torch.bfloat16)
        silence_noise(self.psp.decoder)
        named = dict(self.psp.encoder.named_parameters())
        reading = [p for name, p in named.items() if name.startswith('reading.')]
        others = [p for name, p in named.items() if not name.startswith('reading.')]
        rates = ((others, cfg.learning_rate), (reading, joint.reading_lr))
        groups = [{'params': params, 'lr': lr} for params, lr in rates if params]
        groups.append({'params': list(self.psp.decoder.parameters()), 'lr': joint.decoder_lr})
        self.optimizer = torch.optim.Adam(groups, betas=_BETAS)
        self.optimizer.register_step_pre_hook(self._shorten)
        self.opponents: PictureGame | None = None
        if joint.game is not None:
            self.opponents = PictureGame(
                features,
                joint.game,
                deviations=deviations,
                n_scores=0 if guide is None else guide.directions.shape[1],
                seed=cfg.seed,
                device=self.device,
            )
        self.mean_psp = copy.deepcopy(self.psp).eval().requires_grad_(False)

    def _noise(self, t: int | str, part: slice) -> list[None]:
        return [None] * self.psp.decoder.n_noise

    def _targets(self, x: Tensor) -> dict:
        targets = super()._targets(x)
        with torch.no_grad():
            maps = self.features.maps(x, _STRIDES)
            pooled = self.features.pool(maps)
            energies, vessels = texture(x), ridge_share(x)
        scores = None
        if self.guide is not None:
            scores = (pooled @ self.guide.directions - self.centre).clamp(-_MOST, _MOST)
        found = {'maps': maps, 'pooled': pooled, 'scores': scores}
        found |= {'texture': energies, 'vessels': vessels}
        return {**targets, 'photographs': x, **found}

    def _terms(
        self, y: Tensor, targets: dict, ws: Tensor, part: slice
    ) -> tuple[dict[str, Tensor], Tensor]:
        values, total = super()._terms(y, targets, ws, part)
        joint, n = self.joint, len(y)
        deviations = ws[:, 0].float().std(0)
        total = total + joint.spread_lambda * (deviations - 1).square().mean()
        values['spread'] = deviations.mean()
        groups = self._groups(n, part)
        pictures = y
        if len(groups):
            with self._autocast(enabled=False):
                means = self.psp.decode(ws[groups].mean(1), noise=self._noise(0, part))
            pictures = torch.cat([y, self.psp.pool(means)])
        maps = self.features.maps(pictures, _STRIDES)
        pooled = self.features.pool(maps)
        for more, term in (
            self._features(maps, pooled[:n], targets),
            self._shared(pictures, pooled, targets, groups),
            self._means(pictures[n:], pooled[n:], targets, groups),
        ):
            values, total = values | more, total + term
        if self.opponents is not None and self.opponents.config.learns(self.step_count):
            scores = targets['scores']
            if scores is not None:
                scores = _with_means(scores, groups)
            shown = Shown(pictures, maps, scores)
            total = self._play(self.opponents, shown, targets, total, values)
        return values, total

    def _features(
        self, maps: dict[int, Tensor], pooled: Tensor, targets: dict
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of the features of reconstructions against those of their photographs."""
        joint, n = self.joint, len(pooled)
        ours = {s: m[:n] for s, m in maps.items()}
        place = map_distance(ours, targets['maps'], _STRIDES[:-1]).mean()
        content = 1 - F.cosine_similarity(pooled, targets['pooled']).mean()
        # What all eyes share is most of their features; this counts what tells them apart.
        apart, wanted = (p - p.mean(0) for p in (pooled, targets['pooled']))
        contrast = (apart - wanted).square().mean() / wanted.square().mean().clamp_min(_LEAST)
        total = joint.feature_lambda * place + joint.content_lambda * content
        total = total + joint.contrast_lambda * contrast
        return {'features': place, 'content': content, 'contrast': contrast}, total

    def _shared(
        self, pictures: Tensor, pooled: Tensor, targets: dict, groups: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses that reconstructions and pictures of means have in common."""
        joint = self.joint
        values = {
            'texture': _log_ratio(texture(pictures), _with_means(targets['texture'], groups)),
            'vessels': _log_ratio(ridge_share(pictures), _with_means(targets['vessels'], groups)),
        }
        total = joint.texture_lambda * values['texture'] + joint.vessel_lambda * values['vessels']
        if self.guide is not None:
            distance = self.guide.distance(pooled, _with_means(targets['pooled'], groups))
            n = len(targets['pooled'])
            values['guide'] = distance[:n].mean()
            total = total + joint.guide_lambda * values['guide']
            if len(groups):
                values['mean_guide'] = distance[n:].mean()
                total = total + joint.guide_lambda * values['mean_guide']
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
        if not len(groups):
            return {}, pictures.new_zeros([])
        content = 1 - F.cosine_similarity(pooled, targets['pooled'][groups].mean(1)).mean()
        colour = (rest(pictures) - rest(targets['photographs'][groups].mean(1))).square().mean()
        total = self.joint.mean_content_lambda * content + self.joint.mean_colour_lambda * colour
        return {'mean_content': content, 'mean_colour': colour}, total

    def _play(
        self, game: PictureGame, shown: Shown, targets: dict, total: Tensor, values: dict
    ) -> Tensor:
        """Lets the opponents see this pass; adds to `values`; the new total."""
        heard, weighted = game.loss(shown, total, self.step_count)
        values |= heard
        photographs = Shown(targets['photographs'], targets['maps'], targets['scores'])
        with self._autocast(enabled=False):
            values |= game.see(shown, photographs, passes=self.config.accumulate)
        return total + weighted

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
