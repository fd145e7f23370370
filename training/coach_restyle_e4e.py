"""Training of the ReStyle-e4e encoder: pSp's, with deltas brought in one after the other.

Source: Tov et al. 2021, section 4.1: progressive training, delta regularisation, latent
discriminator; Alaluf et al. 2021 for the refinements. Unlike the published code, the
discriminator sees the latents the generator is given, not their offsets from the average, of
every refinement, and a random style in use of each.
Shapes: N images, L styles, D style dimension.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.coach_restyle_psp import Coach
from training.latent_discriminator import LatentGame
from utils import distributed
from utils.errors import UserError
from utils.kinds import (
    boolean,
    list_of,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_int,
)
from utils.options import option
from utils.seeds import torch_generator
from utils.transfer import send

_DISCRIMINATOR, _DELTAS = 'latent discriminator', 'deltas'  # headings of the flags


@dataclasses.dataclass(frozen=True)
class E4EConfig:
    """What e4e adds to a training, under the names of its published flags.

    progressive_steps: at which step each style begins to have its own delta, the first 0; None:
    all from the start, without regularisation. use_w_pool: the discriminator also sees latents
    of earlier steps.
    """

    w_discriminator_lambda: float = option(
        0.0,
        nonnegative_float,
        'weight of its loss; 0: there is none (published: 0.1)',
        group=_DISCRIMINATOR,
        metavar='WEIGHT',
    )
    w_discriminator_lr: float = option(
        2e-5, positive_float, 'its learning rate', group=_DISCRIMINATOR, metavar='RATE'
    )
    r1: float = option(
        10.0,
        nonnegative_float,
        'weight of its gradient penalty',
        group=_DISCRIMINATOR,
        metavar='WEIGHT',
    )
    d_reg_every: int = option(
        16, positive_int, 'steps between two penalties', group=_DISCRIMINATOR, metavar='STEPS'
    )
    use_w_pool: bool = option(
        False, boolean, 'show it latents of earlier steps too', group=_DISCRIMINATOR
    )
    w_pool_size: int = option(
        50, positive_int, 'how many of them are kept', group=_DISCRIMINATOR, metavar='N'
    )
    delta_norm: int = option(
        2, positive_int, 'which norm of the deltas is held small', group=_DELTAS, metavar='P'
    )
    delta_norm_lambda: float = option(
        2e-4, nonnegative_float, 'weight of that norm', group=_DELTAS, metavar='WEIGHT'
    )
    progressive_steps: tuple[int, ...] | None = option(
        None,
        list_of(nonnegative_int, 'rising steps'),
        'in place of the other two, the step of every style, the first 0',
        group=_DELTAS,
        metavar='STEP',
    )


@dataclasses.dataclass(frozen=True)
class E4EOptions:
    """The options of e4e; the last two are a short way to say `progressive_steps`."""

    e4e: E4EConfig
    progressive_start: int | None = option(
        None,
        nonnegative_int,
        'step at which the second style gets its delta (default: all have theirs '
        'from the start, and their norm is free)',
        group=_DELTAS,
        metavar='STEP',
    )
    progressive_step_every: int = option(
        2000, positive_int, 'steps from one delta to the next', group=_DELTAS, metavar='STEPS'
    )


def progressive_steps(
    n_styles: int, *, given: Sequence[int] | None, start: int | None, every: int
) -> tuple[int, ...] | None:
    """When each of `n_styles` styles gets its delta: as `given`, or from step `start` on.

    None when neither is given. UserError when `given` does not fit.
    """
    if start is not None:
        return (0, *(start + i * every for i in range(n_styles - 1)))
    if given is None:
        return None
    if len(given) != n_styles or given[0] != 0 or sorted(given) != list(given):
        raise UserError(
            f'`progressive_steps`: want {n_styles} rising steps, one for each style, '
            f'the first 0; got {" ".join(map(str, given))}'
        )
    return tuple(given)


class E4ECoach(Coach):
    """A Coach for encoders with a `stage` (models.encoders.restyle_e4e_encoders).

    e4e: its settings; the other arguments are Coach's. With a latent discriminator its losses
    join those of `step`.
    """

    def __init__(self, *arguments: Any, e4e: E4EConfig, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.e4e = e4e
        self.game: LatentGame | None = None
        self._latents: list[Tensor] = []
        if e4e.w_discriminator_lambda:
            self.game = LatentGame(
                self.psp.decoder.style_dim,
                lr=e4e.w_discriminator_lr,
                r1=e4e.r1,
                reg_every=e4e.d_reg_every,
                pool_size=e4e.w_pool_size if e4e.use_w_pool else 0,
                seed=self.config.seed,
                device=self.device,
            )

    @property
    def _encoder(self) -> Any:
        """The encoder in use, which has a `stage`."""
        return self.psp.encoder

    @property
    def stage(self) -> int:
        """The last style that has a delta of its own at this step, from 0."""
        steps = self.e4e.progressive_steps
        if steps is None:
            return self.psp.decoder.n_latent - 1
        return sum(s <= self.step_count for s in steps) - 1

    def step(self, batch: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """As Coach.step, then one step of the latent discriminator."""
        self._encoder.stage = self.stage
        number = self.step_count
        values, pictures = super().step(batch)
        if self.game is not None:
            values |= self._train_discriminator(self.game, number)
        return values, pictures

    def validate(self) -> tuple[dict[str, float], Tensor | None]:
        """As Coach.validate, with the deltas that are in use."""
        self._encoder.stage = self.stage
        return super().validate()

    def _terms(
        self, y: Tensor, targets: dict, ws: Tensor, part: slice
    ) -> tuple[dict[str, Tensor], Tensor]:
        values, total = super()._terms(y, targets, ws, part)
        used = ws[:, : self._encoder.stage + 1].float()
        if self.e4e.progressive_steps is not None and used.shape[1] > 1:
            norms = torch.linalg.vector_norm(used[:, 1:] - used[:, :1], self.e4e.delta_norm, dim=2)
            values['delta'] = norms.sum(1).mean()
            total = total + self.e4e.delta_norm_lambda * values['delta']
        if self.game is not None:
            values['w_adversarial'] = self.game.loss(used)
            total = total + self.e4e.w_discriminator_lambda * values['w_adversarial']
            self._latents.append(used.detach())
        return values, total

    def _train_discriminator(self, game: LatentGame, number: int) -> dict[str, Tensor]:
        """One step on a random refinement and style of every latent that step `number` found."""
        n_iters, cfg = self.config.n_iters, self.config
        passes = [
            torch.stack(self._latents[i : i + n_iters], 1)  # [n, n_iters, stage + 1, D]
            for i in range(0, len(self._latents), n_iters)
        ]
        self._latents = []
        ws = distributed.all_gather(torch.cat(passes)).flatten(1, 2)
        draw = torch_generator(cfg.seed, 'latents', number)
        choice = torch.randint(ws.shape[1], (len(ws),), generator=draw)
        z = send(torch.randn(len(ws), self.psp.decoder.style_dim, generator=draw), self.device)
        with torch.no_grad():
            real = self.psp.decoder.mapping(z.to(ws.dtype)).float()
        rows = torch.arange(len(ws), device=self.device)
        return game.step(real, ws[rows, send(choice, self.device)], number)

    def state(self) -> dict:
        """As Coach.state, with the latent discriminator."""
        game = {} if self.game is None else self.game.state()
        return {**super().state(), **game}

    def load_state(self, state: dict, *, source: str | Path = 'state') -> None:
        """As Coach.load_state."""
        super().load_state(state, source=source)
        if self.game is not None:
            try:
                self.game.load_state(state)
            except (KeyError, RuntimeError, ValueError) as error:
                raise UserError(f'{source} holds no latent discriminator of this run') from error
