"""The opponents of encoder and generator: heads on a feature network, and patches of pixels.

The patches see colours and the two finest bands of frequencies, and may know scores of the
photograph (of disease, say) that they are to fit; the picture of a mean latent comes with the mean
of its members' scores. Both opponents tell photographs from pictures with the hinge loss of
projected discriminators (Sauer et al. 2021). How loudly each is heard follows Esser et al. 2021
('Taming Transformers', equation 7): its gradient at the pictures is a fixed part of that of the
other losses.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from criteria.laplacian import fine_bands
from models.features.pretrained import FeatureNetwork
from models.patches import PatchDiscriminator
from models.projected import ProjectedDiscriminator
from training.adversarial import LOSSES
from utils import distributed
from utils.kinds import nonnegative_float, nonnegative_int
from utils.options import option
from utils.seeds import seed_everything

_LOSS = LOSSES['projected']
_GROUP = 'opponents'  # heading of the flags
_MEASURED_EVERY = 50  # steps
_KEPT = 0.8  # of a weight, when it is measured again
_COLOUR = 2.0  # pictures in [-1, 1] have about half of unit deviation
_LARGEST = 6.0  # deviations of the fine bands; the rim of the field of view has more


@dataclasses.dataclass(frozen=True)
class GameConfig:
    """ratio: norm of each opponent's gradient at the pictures over that of the other losses.

    start: step at which the opponents are heard; they learn from a tenth before, and are heard
    in full after as many steps again as `ramp` says. lr: their rate.
    """

    ratio: float = option(
        0.2,
        nonnegative_float,
        'norm of their gradient over that of the other losses; 0: there are none',
        group=_GROUP,
        metavar='X',
        flag='adv_ratio',
        alone=True,
    )
    start: int = option(
        800,
        nonnegative_int,
        'step at which they are heard',
        group=_GROUP,
        metavar='X',
        flag='adv_start',
        alone=True,
    )
    ramp: int = option(
        600,
        nonnegative_int,
        'steps from then until they are heard in full',
        group=_GROUP,
        metavar='X',
        flag='adv_ramp',
        alone=True,
    )
    lr: float = option(
        1e-3,
        nonnegative_float,
        'their learning rate',
        group=_GROUP,
        metavar='X',
        flag='adv_lr',
        alone=True,
    )

    def strength(self, step: int) -> float:
        """The ratio at `step`, from 0 before `start` to `ratio`."""
        return self.ratio * min(max((step - self.start) / max(self.ramp, 1), 0.0), 1.0)

    def learns(self, step: int) -> bool:
        return self.ratio > 0 and step >= 0.9 * self.start


class Shown(NamedTuple):
    """What the opponents see: pictures [N, 3, S, S], their maps, and scores [N, D] or None."""

    pictures: Tensor
    maps: dict[int, Tensor]
    scores: Tensor | None = None


class PictureGame:
    """Two opponents with one optimiser; `loss` is what the generator hears, `see` and `step` train.

    features: on `device`; its maps are computed by the caller, who needs them too. deviations: of
    the two finest bands (criteria.laplacian.fine_deviations). n_scores: of a picture, 0 for none.
    Processes average gradients and weights, so that all keep the same opponents.
    """

    def __init__(
        self,
        features: FeatureNetwork,
        config: GameConfig,
        *,
        deviations: Sequence[float],
        n_scores: int = 0,
        seed: int,
        device: torch.device,
    ) -> None:
        self.config, self.deviations = config, deviations
        seed_everything(seed, 'opponents')
        self.nets: dict[str, Any] = {
            'heads': ProjectedDiscriminator(features).to(device),
            'patches': PatchDiscriminator(9, n_scores=n_scores).to(device),
        }
        self.parameters = [*self.nets['heads'].learnt(), *self.nets['patches'].parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.lr, betas=(0.0, 0.99))
        self.weights: dict[str, float] = {}
        self._ratios: list[Tensor] = []  # of this step's passes, where they are measured
        self._set_trained(False)

    def _set_trained(self, trained: bool) -> None:
        for p in self.parameters:
            p.requires_grad_(trained)

    def _logits(self, shown: Shown) -> dict[str, Tensor]:
        parts = fine_bands(shown.pictures).chunk(2, 1)
        fine = [(b / d).clamp(-_LARGEST, _LARGEST) for b, d in zip(parts, self.deviations)]
        x = torch.cat([_COLOUR * shown.pictures, *fine], 1)
        dtype = next(iter(shown.maps.values())).dtype
        return {
            'heads': self.nets['heads'].judge(shown.maps),
            'patches': self.nets['patches'](x.to(dtype), shown.scores),
        }

    def loss(self, shown: Shown, others: Tensor, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """The losses of the opponents by name, and their weighted sum, for what they are shown.

        others: the sum of all other losses, 0-d.
        """
        strength, due = self.config.strength(step), self._due(step)
        if not strength and not due:
            return {}, others.new_zeros([])
        values = {
            name: _LOSS.generator(logits).mean() for name, logits in self._logits(shown).items()
        }
        if due:
            self._ratios.append(_ratios(values, others, shown.pictures))
        total: Any = sum(self.weights.get(k, 0.0) * v for k, v in values.items())
        return values, strength * total

    def _due(self, step: int) -> bool:
        """Whether the weights are measured in `step`; they change after it."""
        return not self.weights or step % _MEASURED_EVERY == 0

    def see(self, fake: Shown, real: Shown, *, passes: int) -> dict[str, Tensor]:
        """Adds the gradients of one of `passes` passes; returns the opponents' losses, 0-d."""
        self._set_trained(True)
        maps = {k: v.detach() for k, v in fake.maps.items()}
        fakes = self._logits(fake._replace(pictures=fake.pictures.detach(), maps=maps))
        reals = self._logits(real)
        values = {k: _LOSS.fake(fakes[k]).mean() + _LOSS.real(reals[k]).mean() for k in fakes}
        total: Any = sum(values.values())
        (total / passes).backward()
        self._set_trained(False)
        return {f'{k}_lose': v.detach() for k, v in values.items()}

    def step(self) -> None:
        """One optimiser step on what was seen since the last."""
        self._set_trained(True)
        distributed.average_gradients(self.parameters)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for net in self.nets.values():
            net.refresh_norms()
        self._set_trained(False)
        if self._ratios:
            found = distributed.all_reduce_mean(torch.stack(self._ratios).mean(0)).tolist()
            for name, ratio in zip(self.nets, found):
                before = self.weights.get(name, ratio)
                self.weights[name] = _KEPT * before + (1 - _KEPT) * ratio
            self._ratios = []

    def state(self) -> dict:
        """What a resumed run needs."""
        return {
            'opponents': {name: net.state_dict() for name, net in self.nets.items()},
            'opponents_optimizer': self.optimizer.state_dict(),
            'opponents_weights': dict(self.weights),
        }

    def load_state(self, state: dict) -> None:
        """Continues from `state()`; KeyError or RuntimeError when it does not fit."""
        for name, net in self.nets.items():
            net.load_state_dict(state['opponents'][name])
        self.optimizer.load_state_dict(state['opponents_optimizer'])
        self.weights = dict(state['opponents_weights'])


def _ratios(values: dict[str, Tensor], others: Tensor, pictures: Tensor) -> Tensor:
    """Norm of the gradient of `others` at the pictures over that of each of the values, [K]."""

    def slope(loss: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(loss, pictures, retain_graph=True)
        return grad.float().norm()

    wanted = slope(others)
    return torch.stack([wanted / slope(v).clamp_min(1e-8) for v in values.values()])
