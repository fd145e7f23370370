"""The run of a generator training: grids, measures, curves, and when it has diverged."""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.augment import MAX_STRENGTH
from training.checkpoints import Checkpoints
from training.curves import Panel
from training.run import TrainingRun, memory_gb
from training.stylegan2_loop import Trainer
from training.stylegan2_networks import sample_grid
from utils import distributed
from utils.errors import UserError
from utils.images import from_uint8, grid, save_png

log = logging.getLogger(__name__)

SNAPSHOT_PREFIX = 'network-snapshot-'
_SPOILT_STEPS = 16  # so many steps in a row with values that are not finite end a run

Metric = Callable[..., dict[str, float]]


class GeneratorTraining(Trainer):
    """A Trainer with what its run leaves behind; the other arguments are Trainer's.

    metric: function(generator, device, folder=) -> numbers, called at every snapshot in every
    process; those of the first are kept. n_grid: pictures of a grid.
    """

    def __init__(
        self, *arguments: Any, metric: Metric | None = None, n_grid: int = 64, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.metric, self.n_grid = metric, n_grid

    def begin(self, run: TrainingRun) -> None:
        """Of a run that begins: grids of photographs and of untrained pictures."""
        if self.n_img or not distributed.is_main():
            return
        shown = range(min(self.n_grid, len(self.dataset)))  # type: ignore[arg-type]
        reals = torch.stack([self.dataset[i][0] for i in shown])
        self._save_grid(from_uint8(reals), run.folder / 'reals.png')
        self._save_grid(self._samples(), run.folder / 'fakes_init.png')

    def after_save(self, run: TrainingRun, *, stopping: bool) -> None:
        """A grid of generated pictures."""
        number = run.checkpoints.number(self.n_img)
        self._save_grid(self._samples(), run.folder / f'fakes{number}.png')

    def measure(self, run: TrainingRun) -> None:
        """The metrics of the snapshot."""
        if self.metric is None:
            return
        values = self.metric(self.g_ema, self.device, folder=run.folder)
        if distributed.is_main():
            run.log(values)
            log.info('%s  %s', self.where(), super().describe(values))

    def _samples(self) -> Tensor:
        return sample_grid(self.g_ema, n=self.n_grid, seed=0, device=self.device)

    def _save_grid(self, pictures: Tensor, path: Path) -> None:
        save_png(grid(pictures, max(1, int(math.sqrt(self.n_grid)))), path)

    def facts(self) -> dict[str, float]:
        """Augmentation strength, what it follows, and memory."""
        return {
            'augment_p': self.ada.p,
            'overfitting': self.ada.overfitting,
            'kimg': self.n_img / 1000,
            'memory_gb': memory_gb(self.device),
        }

    def describe(self, values: Mapping[str, float]) -> str:
        """Augmentation strength, mean sign of real scores, losses."""
        cap = ' (at its cap)' if self.ada.p >= MAX_STRENGTH else ''
        g, d = (values.get(name, math.nan) for name in ('loss_g', 'loss_d'))
        return f'p {self.ada.p:.3f}{cap}  r_t {self.ada.overfitting:+.2f}  G {g:.3f}  D {d:.3f}'

    def panels(self, names: set[str]) -> list[Panel]:
        """Losses, scores, then every other number by itself."""
        pairs = {'loss_g': 'loss_d', 'score_real': 'overfitting'}
        others = sorted(names - {*pairs, *pairs.values()})
        return [*map(Panel, pairs.items()), *[Panel((name,)) for name in others]]

    def check(self, spoilt: list[str], *, saving: bool) -> None:
        """UserError when weights are not finite, or losses have not been for many steps.

        Weights are looked at after a step whose losses were not finite, and before `saving`.
        float16 without loss scaling overflows in single steps, whose gradients are cleaned: such
        a step is survived.
        """
        counts = torch.stack([(self.spoilt_steps >= _SPOILT_STEPS), self.spoilt_steps > 0])
        lasting, now = distributed.all_reduce_sum(counts.float()).tolist()
        if lasting or ((now or saving) and not self.weights_finite()):
            raise UserError(
                f'training diverged: losses or weights are not finite at kimg '
                f'{self.n_img / 1000:.1f}; resume from an earlier snapshot, with '
                '`transfer`=1 and a larger `gamma`, or in full precision (`fp32`=1)'
            )


def snapshots(folder: str | Path, *, keep: int | None = None) -> Checkpoints:
    """The files `network-snapshot-<kimg>.pt` of a run folder, with three decimals of kimg."""
    return Checkpoints(
        folder,
        SNAPSHOT_PREFIX,
        number=lambda images: f'{images / 1000:09.3f}',
        keep=keep,
        what='training snapshot',
        hint='Begin anew, with a lower `snap` for snapshots more often.',
    )


def generator_run(
    trainer: GeneratorTraining,
    folder: str | Path,
    *,
    kimg: float,
    snapshot_kimg: float,
    tick_kimg: float = 1.0,
    keep_snapshots: int | None = None,
) -> TrainingRun:
    """The run of `trainer` to `kimg`; tick_kimg: between records. Lengths in 1000 images."""
    return TrainingRun(
        trainer,
        folder,
        snapshots(folder, keep=keep_snapshots),
        length=int(kimg * 1000),
        record_every=tick_kimg * 1000,
        save_every=snapshot_kimg * 1000,
    )
