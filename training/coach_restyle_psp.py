"""Training of the ReStyle-pSp encoder.

Each optimiser step refines the latents of one batch `n_iters` times, every refinement on the
detached result of the one before, and adds up their gradients (Alaluf et al. 2021, section 3.2).
Random numbers (order, mirroring, noise) are a function of (seed, step), and belong to the whole
batch, so neither a resume nor the number of processes or passes changes what is drawn.

Shapes: N images, L styles, D style dimension, S side the encoder sees, R side of the generator.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.psp import PSP, psp_checkpoint
from models.stylegan2.frozen import FrozenSynthesis
from models.stylegan2.model import set_low_precision
from training.batches import Batches, StepSampler
from training.checkpoints import Checkpoints
from training.coach_config import AMP_DTYPES, CoachConfig, build_optimizer
from training.curves import Panel
from training.kept_casts import KeptCasts, add_gradients
from training.known_latents import KnownLatents
from training.reconstruction import Term
from training.run import Training, TrainingRun
from training.sync_batchnorm import share_batch_statistics
from utils import distributed
from utils.errors import UserError
from utils.images import from_uint8, grid, save_png
from utils.io import save_torch
from utils.seeds import torch_generator
from utils.signals import leave_signals_to_parent

log = logging.getLogger(__name__)

STATE_FORMAT = 1
_SHEET_IMAGES = 8


class Coach(Training):
    """Trains `psp` on one dataset and validates on another.

    losses: {name: (term, weight)} as built by training.reconstruction; latent_penalty: (function
    ws [N, L, D] -> [N], weight) or None. meta: plain options kept in exported checkpoints.

    Raises UserError when there are fewer training images than a batch, or the batch cannot be
    divided among processes and passes.
    """

    means = False
    remedy = 'lower `learning_rate` or use `amp` no'

    def __init__(
        self,
        psp: PSP,
        train_set: Dataset,
        test_set: Dataset,
        config: CoachConfig,
        *,
        losses: dict[str, tuple[Term, float]],
        device: torch.device | str,
        latent_penalty: tuple[Callable[[Tensor], Tensor], float] | None = None,
        meta: dict | None = None,
        workers: int = 0,
        test_workers: int = 0,
    ) -> None:
        self.config, self.device, self.meta = config, torch.device(device), meta or {}
        self.losses, self.latent_penalty = losses, latent_penalty
        self.train_set, self.test_set = train_set, test_set
        self.n_train: int = len(train_set)  # type: ignore[arg-type]
        self.n_test: int = len(test_set)  # type: ignore[arg-type]
        self.workers, self.test_workers = workers, test_workers
        self.step_count, self.best, self.images = 0, math.inf, config.batch_size
        self._pictures: list[Tensor] = []
        self._check()

        if distributed.world_size() > 1:
            share_batch_statistics(psp.encoder, self.device)
        self.psp = psp.to(self.device)
        psp.encoder.to(memory_format=torch.channels_last)
        self.psp.requires_grad_(False)
        self.psp.encoder.requires_grad_(True)
        if config.train_decoder:
            self.psp.decoder.requires_grad_(True)
        self.parameters = [p for p in self.psp.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(config.optim_name, self.parameters, config.learning_rate)
        self.amp_dtype = AMP_DTYPES[config.amp]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == 'fp16')
        self._average: Tensor | None = None
        self._synthesis: FrozenSynthesis | None = None
        self._casts: KeptCasts | None = None
        count = round(config.synthetic * config.batch_size)
        self.known = KnownLatents(self.psp, count=count, seed=config.seed) if count else None

    def _check(self) -> None:
        cfg, world = self.config, distributed.world_size()
        if self.n_train < cfg.batch_size:
            raise UserError(
                f'{self.n_train} training images are fewer than one batch of '
                f'{cfg.batch_size}; lower `batch_size` or add images'
            )
        if cfg.batch_size % (world * cfg.accumulate):
            raise UserError(
                f'`batch_size` {cfg.batch_size} cannot be divided among {world} '
                f'process(es) x `accumulate` {cfg.accumulate}'
            )
        if cfg.amp == 'fp16' and self.device.type != 'cuda':
            raise UserError('`amp` fp16 needs a GPU; use `amp` bf16 on a CPU')

    # -- one step ---------------------------------------------------------------------------

    def _autocast(self, enabled: bool = True) -> torch.autocast:
        """Low precision for the encoder and the feature networks; the generator has its own.

        The weights that were cast are kept to the end of the outermost context.
        """
        return torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=enabled and self.amp_dtype is not None
        )

    def average_image(self) -> Float[Tensor, '3 S S']:
        """The starting picture [3, S, S]; constant unless the decoder is trained."""
        if self._average is None or self.config.train_decoder:
            self._average = self.psp.average_image()
        return self._average

    def _noise(self, t: int | str, part: slice) -> list:
        """Noise maps of the samples `part` of this step's batch at refinement t.

        t = 'sample' for the pictures that the generator draws.
        """
        draw = torch_generator(self.config.seed, 'noise', self.step_count, t, device=self.device)
        maps: Any = self.psp.decoder.noise_maps('random', self.config.batch_size, self.device, draw)
        return [m[part] for m in maps]

    def _terms(
        self, y: Tensor, targets: dict[str, Any], ws: Tensor, part: slice
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Mean of every loss over [N, 3, S, S] reconstructions, and their weighted sum.

        part: positions of the reconstructions in the batch of all processes.
        """
        values = {
            name: term.distance(y, targets[name]).mean() for name, (term, _) in self.losses.items()
        }
        total: Any = sum(weight * values[name] for name, (_, weight) in self.losses.items())
        if self.latent_penalty is not None:
            penalty, weight = self.latent_penalty
            values['w_norm'] = penalty(ws).mean()
            total = total + weight * values['w_norm']
        if self.known is not None:
            values['latent'] = self.known.distance(ws, self.step_count, part)
            total = total + self.config.latent_lambda * values['latent']
        return values, total

    def _targets(self, x: Tensor) -> dict[str, Any]:
        with torch.no_grad():
            return {name: term.targets(x) for name, (term, _) in self.losses.items()}

    def step(
        self, batch: Float[Tensor, 'n 3 S S']
    ) -> tuple[dict[str, Tensor], list[Float[Tensor, '_ 3 S S']]]:
        """One optimiser step on this process's share of a batch, [n, 3, S, S] in [-1, 1].

        Returns ({loss: 0-d tensor} of the last refinement, list of [n, 3, S, S] pictures of the
        last pass: the photographs, then each refinement).
        """
        cfg = self.config
        self.psp.encoder.train()
        start = self.average_image()
        set_low_precision(self.psp.decoder, self.amp_dtype, n_resolutions=16)
        self._prepare()
        first = distributed.rank() * len(batch)
        sums: dict[str, Tensor] = {}
        for x in batch.chunk(cfg.accumulate):
            x = x.contiguous(memory_format=torch.channels_last)
            values, pictures = self._refine(x, start, slice(first, first + len(x)))
            first += len(x)
            for name, value in values.items():
                share = value / cfg.accumulate
                sums[name] = sums[name] + share if name in sums else share
        # Averaged while still scaled: an overflow in one process then reaches all of them, and
        # all skip the step and lower the scale together.
        distributed.average_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        set_low_precision(self.psp.decoder, None)
        self.step_count += 1
        return sums, pictures

    def _prepare(self) -> None:
        """What a step computes with: a frozen generator, and weights in the low type."""
        frozen = not self.config.train_decoder and self.amp_dtype != torch.float16
        if frozen and self._synthesis is None:  # float16 needs the generator's own care of ranges
            dtype = self.amp_dtype or self.psp.decoder.input.input.dtype
            self._synthesis = FrozenSynthesis(self.psp.decoder, dtype=dtype)
        if self.amp_dtype is None:
            return
        if self._casts is None:
            networks = [getattr(term, 'network', None) for term, _ in self.losses.values()]
            nets = [self.psp.encoder, *(net for net in networks if net is not None)]
            self._casts = KeptCasts(nets, self.amp_dtype)
        self._casts.refresh()

    def _decode(self, ws: Tensor, noise: list[Tensor]) -> Tensor:
        """Pictures [N, 3, S, S] of latents, as the encoder sees them."""
        draw = self._synthesis or self.psp.decode
        return self.psp.pool(draw(ws, noise=noise))

    def _refine(
        self, x: Tensor, start: Tensor, part: slice
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Forward and backward of all refinements of one pass; see `step`."""
        if self.known is not None:
            x = self.known.replace(x, self.step_count, part, self._noise('sample', part))
        ws = self.psp.latent_avg.expand(len(x), -1, -1)
        y = start.expand_as(x)
        pictures = [x]
        with contextlib.ExitStack() as stack:
            if self._casts is not None:
                stack.enter_context(self._casts.in_use())
            stack.enter_context(self._autocast())
            targets = self._targets(x)
            for t in range(self.config.n_iters):
                ws = self.psp.step(x, y, ws)
                with self._autocast(enabled=False):
                    y = self._decode(ws, self._noise(t, part))
                values, total = self._terms(y, targets, ws, part)
                with self._autocast(enabled=False):
                    self._add_gradients(self.scaler.scale(total / self.config.accumulate))
                ws, y = ws.detach(), y.detach()
                pictures.append(y)
        return {**{k: v.detach() for k, v in values.items()}, 'loss': total.detach()}, pictures

    def _add_gradients(self, total: torch.Tensor) -> None:
        """What total.backward() does, with one operation for the sums of all parameters."""
        used: list[Tensor] = [*self.parameters]
        if self._casts is not None:
            used = self._casts.stand_ins(used)
        add_gradients(self.parameters, torch.autograd.grad(total, used, allow_unused=True))

    # -- validation -------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> tuple[dict[str, float], Tensor | None]:
        """Mean losses over the test images at every refinement, and the pictures of a sheet.

        Eval mode, stored noise, full precision. Returns ({'<loss>_<t>': float}, pictures
        [n_iters + 1, n, 3, S, S] of the first images on the CPU). t = 0 is the average image,
        before any refinement. The numbers depend neither on batch size nor on processes.
        """
        psp, cfg = self.psp.eval(), self.config
        rank, world = distributed.rank(), distributed.world_size()
        mine = range(rank, self.n_test, world)
        loader = DataLoader(
            torch.utils.data.Subset(self.test_set, mine),
            batch_size=cfg.test_batch_size,
            num_workers=self.test_workers,
            worker_init_fn=leave_signals_to_parent,
        )
        rows: list[Tensor] = []
        pictures: list[Tensor] = []
        for u8 in loader:
            x = from_uint8(u8.to(self.device))
            targets = self._targets(x)
            ws = psp.latent_avg.expand(len(x), -1, -1)
            y = self.average_image().expand_as(x)
            shown, kept = [x], []
            for t in range(cfg.n_iters + 1):
                if t:
                    ws = psp.step(x, y, ws)
                    y = psp.pool(psp.decode(ws))
                    shown.append(y)
                kept.append(torch.stack(self._per_image(y, targets, ws), 1))  # [N, losses]
            rows.append(torch.stack(kept, 1).double().cpu())
            if rank == 0 and sum(p.shape[1] for p in pictures) < _SHEET_IMAGES:
                pictures.append(torch.stack(shown).cpu())
        table: Any = torch.cat(rows).sum(0) if rows else 0  # [n_iters + 1, losses]
        table = sum(distributed.all_gather_object(table)) / self.n_test
        names = [*self.losses, *(['w_norm'] if self.latent_penalty else []), 'loss']
        values = {
            f'{name}_{t}': float(table[t, i])
            for i, name in enumerate(names)
            for t in range(cfg.n_iters + 1)
        }
        return values, torch.cat(pictures, 1)[:, :_SHEET_IMAGES] if pictures else None

    def _per_image(self, y: Tensor, targets: dict[str, Any], ws: Tensor) -> list[Tensor]:
        """Losses of each image, then their weighted sum: a list of [N]."""
        found = [term.distance(y, targets[name]) for name, (term, _) in self.losses.items()]
        weights = [weight for _, weight in self.losses.values()]
        if self.latent_penalty is not None:
            found.append(self.latent_penalty[0](ws))
            weights.append(self.latent_penalty[1])
        total: Any = sum(w * v for w, v in zip(weights, found))
        return [*found, total]

    # -- checkpoints ------------------------------------------------------------------------

    def export(self) -> dict:
        """Inference checkpoint {state_dict, opts, latent_avg}, without optimiser state."""
        return psp_checkpoint(self.psp, self.meta, half_encoder=self.config.half_export)

    def state(self) -> dict:
        """Everything a resumed run needs besides data, options and the frozen generator."""
        trained = self.psp if self.config.train_decoder else self.psp.encoder
        return {
            'format': STATE_FORMAT,
            'step': self.step_count,
            'best': self.best,
            'weights': trained.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(),
            'seed': self.config.seed,
        }

    def load_state(self, state: dict, *, source: str | Path = 'state') -> None:
        """Continues from `state()`; UserError naming `source` when it belongs to another run."""
        if not isinstance(state, dict) or state.get('format') != STATE_FORMAT:
            raise UserError(
                f'{source} is not a training state of this tool; to start from the '
                'weights of a checkpoint use `checkpoint_path`'
            )
        trained = self.psp if self.config.train_decoder else self.psp.encoder
        try:
            trained.load_state_dict(state['weights'])
            self.optimizer.load_state_dict(state['optimizer'])
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f'{source} does not fit the options of this run: {str(error).splitlines()[0]}'
            ) from error
        self.scaler.load_state_dict(state['scaler'])
        self.step_count, self.best = state['step'], state['best']
        self._average = self._batches = None

    # -- the run ----------------------------------------------------------------------------

    @property
    def progress(self) -> int:
        """Optimiser steps done."""
        return self.step_count

    def advance(self) -> dict[str, Tensor]:
        """One step on the next batch; the losses of the last refinement."""
        if self._batches is None:
            sampler = StepSampler(
                self.n_train,
                batch_size=self.config.batch_size,
                seed=self.config.seed,
                start=self.step_count,
                mirror=self.config.mirror,
            )
            self._batches = Batches(
                self.train_set, sampler, device=self.device, workers=self.workers
            )
        values, self._pictures = self.step(next(self._batches))
        return {f'train/{name}': value for name, value in values.items()}

    def begin(self, run: TrainingRun) -> None:
        """The average image; of a run that begins, a validation."""
        if distributed.is_main():
            save_png(self.average_image().clamp(-1, 1), run.folder / 'avg_image.png')
        if self.step_count == 0:
            self._validate_and_record(run)

    def after_step(self, run: TrainingRun, *, last: bool) -> None:
        """Sheets of training samples, validation, and the checkpoints for the other scripts."""
        cfg, main = self.config, distributed.is_main()
        if main and run.due(cfg.image_interval):
            self._sheet(run, torch.stack(self._pictures)[:, :_SHEET_IMAGES], 'train')
        self._pictures = []
        if last or run.due(cfg.val_interval):
            self._validate_and_record(run)
        if main and (last or run.due(cfg.save_interval)):
            Checkpoints(run.checkpoints.folder, 'iteration_').save(self.step_count, self.export())

    def describe(self, values: Mapping[str, float]) -> str:
        """The losses of the last refinement."""
        return super().describe({k.removeprefix('train/'): v for k, v in values.items()})

    def panels(self, names: set[str]) -> list[Panel]:
        """Training beside validation per refinement."""
        groups = [sorted(n for n in names if n.startswith(p)) for p in ('train/', 'test/loss_')]
        return [
            Panel(groups[0], 'training, last refinement', 'train/', True),
            Panel(groups[1], 'validation loss after each refinement', 'test/loss_', True),
        ]

    def _validate_and_record(self, run: TrainingRun) -> None:
        values, pictures = self.validate()
        if not distributed.is_main():
            return
        run.log({f'test/{k}': v for k, v in values.items()})
        if pictures is not None:
            self._sheet(run, pictures, 'test')
        score = values[f'loss_{self.config.n_iters}']
        refinements = range(self.config.n_iters + 1)
        courses = [
            f'{name} ' + '>'.join(f'{values[f"{name}_{t}"]:.4f}' for t in refinements)
            for name in [*self.losses, 'loss']
        ]
        log.info('validation at step %d: %s', self.step_count, '  '.join(courses))
        if self.step_count and score < self.best:
            self.best = score
            save_torch(run.checkpoints.folder / 'best_model.pt', self.export())

    def _sheet(self, run: TrainingRun, pictures: Tensor, folder: str) -> None:
        """Writes [T, n, 3, S, S] as rows of photograph, then refinements 1..T-1."""
        sheet = grid(pictures.float().cpu().transpose(0, 1).flatten(0, 1), len(pictures))
        save_png(sheet, run.folder / 'logs' / 'images' / folder / f'{self.step_count:06d}.png')


def encoder_run(coach: Coach, folder: Path, *, keep_states: int = 2) -> TrainingRun:
    """The run of an encoder training, to `max_steps`.

    Leaves checkpoints/, logs/, stats.jsonl, curves.png and avg_image.png.
    """
    return TrainingRun(
        coach,
        folder,
        Checkpoints(Path(folder) / 'checkpoints', keep=keep_states),
        length=coach.config.max_steps,
        record_every=coach.config.board_interval,
        save_every=coach.config.val_interval,
    )
