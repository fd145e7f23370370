"""Training of the ReStyle-pSp encoder.

Each optimiser step refines the latents of one batch `n_iters` times, every refinement on the
detached result of the one before, and adds up their gradients (Alaluf et al. 2021, section 3.2).
Random numbers (order, mirroring, noise) are a function of (seed, step), and belong to the whole
batch, so neither a resume nor the number of processes or passes changes what is drawn.

Shapes: N images, L styles, D style dimension, S side the encoder sees, R side of the generator.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from datasets.images_dataset import StepSampler
from models.psp import psp_checkpoint
from models.stylegan2.frozen import FrozenSynthesis
from models.stylegan2.model import set_low_precision
from training.checkpoints import latest_checkpoint, save_checkpoint
from training.kept_casts import KeptCasts, add_gradients
from training.known_latents import KnownLatents
from training.run import Stopping
from training.sync_batchnorm import share_batch_statistics
from utils import distributed
from utils.errors import UserError
from utils.images import from_uint8, grid, save_png
from utils.io import atomic_path, load_weights, save_torch
from utils.logs import ScalarLog, read_jsonl
from utils.seeds import torch_generator
from utils.signals import leave_signals_to_parent

log = logging.getLogger(__name__)

STATE_FORMAT = 1
STATE_PREFIX = 'state'
AMP_DTYPES = {'no': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}
_SHEET_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class CoachConfig:
    """What shapes an encoder training; intervals in optimiser steps.

    batch_size counts the images of one step over all processes; `accumulate` splits a process's
    share into that many passes. save_interval None: only the last step is exported.
    half_export: the exported encoder's weights as float16, which halves its size.
    """

    batch_size: int = 8
    test_batch_size: int = 8
    learning_rate: float = 1e-4
    optim_name: str = 'ranger'
    train_decoder: bool = False
    n_iters: int = 5
    max_steps: int = 100_000
    image_interval: int = 100
    board_interval: int = 50
    val_interval: int = 1000
    save_interval: int | None = None
    accumulate: int = 1
    amp: str = 'no'
    mirror: bool = True
    half_export: bool = False
    seed: int = 0
    synthetic: float = 0.0  # share of every batch that the generator draws
    latent_lambda: float = 0.1  # weight of the distance from their known latents


def build_optimizer(name, parameters, lr):
    """'adam', or 'ranger': RAdam, Lookahead and gradient centralisation as published.

    Below the rectification threshold (steps 1 to 5) the published Ranger takes plain momentum
    steps, which the library calls degenerating to SGD.
    """
    if name == 'adam':
        return torch.optim.Adam(parameters, lr=lr)
    if name == 'ranger':
        from pytorch_optimizer import Ranger  # slow to import, rarely needed elsewhere

        return Ranger(
            parameters,
            lr=lr,
            betas=(0.95, 0.999),
            eps=1e-5,
            alpha=0.5,
            k=6,
            n_sma_threshold=5,
            degenerated_to_sgd=True,
            use_gc=True,
        )
    raise ValueError(f'optimizer {name!r}, want adam or ranger')


class Coach:
    """Trains `psp` on one dataset and validates on another.

    losses: {name: (term, weight)} as built by training.reconstruction; latent_penalty: (function
    ws [N, L, D] -> [N], weight) or None. meta: plain options kept in exported checkpoints.
    keep_states: how many resumable states to keep.

    Raises UserError when there are fewer training images than a batch, or the batch cannot be
    divided among processes and passes.
    """

    def __init__(
        self,
        psp,
        train_set,
        test_set,
        config,
        *,
        run_dir,
        losses,
        device,
        latent_penalty=None,
        meta=None,
        workers=0,
        test_workers=0,
        keep_states=2,
    ):
        self.config, self.device, self.run_dir = config, torch.device(device), Path(run_dir)
        self.losses, self.latent_penalty = losses, latent_penalty
        self.train_set, self.test_set = train_set, test_set
        self.meta, self.keep_states = meta or {}, keep_states
        self.workers, self.test_workers = workers, test_workers
        self.step_count, self.best = 0, math.inf
        self._check()

        if distributed.world_size() > 1:
            share_batch_statistics(psp.encoder)
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
        self._average = self._synthesis = self._casts = None
        count = round(config.synthetic * config.batch_size)
        self.known = KnownLatents(self.psp, count=count, seed=config.seed) if count else None

    def _check(self):
        cfg, world = self.config, distributed.world_size()
        if len(self.train_set) < cfg.batch_size:
            raise UserError(
                f'{len(self.train_set)} training images are fewer than one batch of '
                f'{cfg.batch_size}; lower --batch_size or add images'
            )
        if cfg.batch_size % (world * cfg.accumulate):
            raise UserError(
                f'--batch_size {cfg.batch_size} cannot be divided among {world} '
                f'process(es) x --accumulate {cfg.accumulate}'
            )
        if cfg.amp == 'fp16' and self.device.type != 'cuda':
            raise UserError('--amp fp16 needs a GPU; use --amp bf16 on a CPU')

    # -- one step ---------------------------------------------------------------------------

    def _autocast(self, enabled: bool = True) -> torch.autocast:
        """Low precision for the encoder and the feature networks; the generator has its own.

        The weights that were cast are kept to the end of the outermost context.
        """
        return torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=enabled and self.amp_dtype is not None
        )

    def average_image(self):
        """The starting picture [3, S, S]; constant unless the decoder is trained."""
        if self._average is None or self.config.train_decoder:
            self._average = self.psp.average_image()
        return self._average

    def _noise(self, t, part):
        """Noise maps of the samples `part` of this step's batch at refinement t.

        t = 'sample' for the pictures that the generator draws.
        """
        draw = torch_generator(self.config.seed, 'noise', self.step_count, t, device=self.device)
        maps = self.psp.decoder.noise_maps('random', self.config.batch_size, self.device, draw)
        return [m[part] for m in maps]

    def _terms(self, y, targets, ws, part):
        """Mean of every loss over [N, 3, S, S] reconstructions, and their weighted sum.

        part: positions of the reconstructions in the batch of all processes.
        """
        values = {
            name: term.distance(y, targets[name]).mean() for name, (term, _) in self.losses.items()
        }
        total = sum(weight * values[name] for name, (_, weight) in self.losses.items())
        if self.latent_penalty is not None:
            penalty, weight = self.latent_penalty
            values['w_norm'] = penalty(ws).mean()
            total = total + weight * values['w_norm']
        if self.known is not None:
            values['latent'] = self.known.distance(ws, self.step_count, part)
            total = total + self.config.latent_lambda * values['latent']
        return values, total

    def _targets(self, x):
        with torch.no_grad():
            return {name: term.targets(x) for name, (term, _) in self.losses.items()}

    def step(self, batch):
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
        sums = {}
        for x in batch.chunk(cfg.accumulate):
            x = x.contiguous(memory_format=torch.channels_last)
            values, pictures = self._refine(x, start, slice(first, first + len(x)))
            first += len(x)
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value / cfg.accumulate
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

    def _decode(self, ws: torch.Tensor, noise: list[torch.Tensor]) -> torch.Tensor:
        """Pictures [N, 3, S, S] of latents, as the encoder sees them."""
        draw = self._synthesis or self.psp.decode
        return self.psp.pool(draw(ws, noise=noise))

    def _refine(self, x, start, part):
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
        used = self.parameters
        if self._casts is not None:
            used = self._casts.stand_ins(used)
        add_gradients(self.parameters, torch.autograd.grad(total, used, allow_unused=True))

    # -- validation -------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self):
        """Mean losses over the test images at every refinement, and the pictures of a sheet.

        Eval mode, stored noise, full precision. Returns ({'<loss>_<t>': float}, pictures
        [n_iters + 1, n, 3, S, S] of the first images on the CPU). t = 0 is the average image,
        before any refinement. The numbers depend neither on batch size nor on processes.
        """
        psp, cfg = self.psp.eval(), self.config
        rank, world = distributed.rank(), distributed.world_size()
        mine = range(rank, len(self.test_set), world)
        loader = DataLoader(
            torch.utils.data.Subset(self.test_set, mine),
            batch_size=cfg.test_batch_size,
            num_workers=self.test_workers,
            worker_init_fn=leave_signals_to_parent,
        )
        rows, pictures = [], []
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
        table = torch.cat(rows).sum(0) if rows else 0  # [n_iters + 1, losses]
        table = sum(distributed.all_gather_object(table)) / len(self.test_set)
        names = [*self.losses, *(['w_norm'] if self.latent_penalty else []), 'loss']
        values = {
            f'{name}_{t}': float(table[t, i])
            for i, name in enumerate(names)
            for t in range(cfg.n_iters + 1)
        }
        return values, torch.cat(pictures, 1)[:, :_SHEET_IMAGES] if pictures else None

    def _per_image(self, y, targets, ws):
        """Losses of each image, then their weighted sum: a list of [N]."""
        found = [term.distance(y, targets[name]) for name, (term, _) in self.losses.items()]
        weights = [weight for _, weight in self.losses.values()]
        if self.latent_penalty is not None:
            found.append(self.latent_penalty[0](ws))
            weights.append(self.latent_penalty[1])
        return [*found, sum(w * v for w, v in zip(weights, found))]

    # -- checkpoints ------------------------------------------------------------------------

    @property
    def _checkpoints(self):
        return self.run_dir / 'checkpoints'

    def export(self):
        """Inference checkpoint {state_dict, opts, latent_avg}, without optimiser state."""
        return psp_checkpoint(self.psp, self.meta, half_encoder=self.config.half_export)

    def state(self):
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

    def load_state(self, state, *, source='state'):
        """Continues from `state()`; UserError naming `source` when it belongs to another run."""
        if not isinstance(state, dict) or state.get('format') != STATE_FORMAT:
            raise UserError(
                f'{source} is not a training state of this tool; to start from the '
                'weights of a checkpoint use --checkpoint_path'
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
        self._average = None

    def resume(self, path=None):
        """Loads `path`, or the newest readable state of the run folder; whether one was found."""
        if path is not None:
            found = load_weights(path), path
        else:
            found = latest_checkpoint(self._checkpoints, STATE_PREFIX)
        if found is None:
            return False
        self.load_state(found[0], source=str(found[1]))
        log.info('resuming from %s at step %d', found[1], self.step_count)
        return True

    # -- the run ----------------------------------------------------------------------------

    def train(
        self, *, max_minutes: float | None = None, should_stop: Callable[[], bool] | None = None
    ) -> bool:
        """Runs to `max_steps`, or stops in good order with a saved state.

        It stops after `max_minutes`, or when `should_stop` says so in any process.
        Leaves checkpoints/, logs/, stats.jsonl, curves.png and avg_image.png in the run folder.
        Returns True when all steps are done. Raises UserError when a loss is not finite.
        """
        cfg, main = self.config, distributed.is_main()
        scalars = ScalarLog(self.run_dir, resume_step=self.step_count or -1) if main else None
        if main:
            save_png(self.average_image().clamp(-1, 1), self.run_dir / 'avg_image.png')
        if self.step_count == 0:
            self._validate_and_record(scalars)
        share = cfg.batch_size // distributed.world_size()
        sampler = StepSampler(
            len(self.train_set),
            batch_size=cfg.batch_size,
            seed=cfg.seed,
            start=self.step_count,
            stop=cfg.max_steps,
            mirror=cfg.mirror,
            part=(distributed.rank() * share, (distributed.rank() + 1) * share),
        )
        loader = DataLoader(
            self.train_set,
            batch_sampler=sampler,
            num_workers=self.workers,
            pin_memory=self.device.type == 'cuda',
            worker_init_fn=leave_signals_to_parent,
        )
        asked = Stopping(self.device, requested=should_stop, max_minutes=max_minutes)
        tick, tick_step = time.monotonic(), self.step_count
        for u8 in loader:
            values, pictures = self.step(from_uint8(u8.to(self.device, non_blocking=True)))
            step, last = self.step_count, self.step_count == cfg.max_steps
            stopping = asked()
            saving = last or stopping or step % cfg.val_interval == 0
            if step % cfg.board_interval == 0 or saving:
                numbers = self._reduced(values)
                rate = (step - tick_step) * cfg.batch_size / (time.monotonic() - tick)
                if main:
                    scalars.log(
                        step,
                        {
                            **{f'train/{k}': v for k, v in numbers.items()},
                            'images_per_second': rate,
                        },
                    )
                    log.info(
                        'step %d/%d  %s  %.1f img/s',
                        step,
                        cfg.max_steps,
                        '  '.join(f'{k} {v:.4f}' for k, v in numbers.items()),
                        rate,
                    )
            if main and step % cfg.image_interval == 0:
                self._sheet(torch.stack(pictures)[:, :_SHEET_IMAGES], 'train')
            if last or step % cfg.val_interval == 0:
                self._validate_and_record(scalars)
            if main and (last or (cfg.save_interval and step % cfg.save_interval == 0)):
                save_checkpoint(self._checkpoints, step, self.export())
            if main and saving:
                save_checkpoint(
                    self._checkpoints,
                    step,
                    self.state(),
                    prefix=STATE_PREFIX,
                    keep=self.keep_states,
                )
            if step % cfg.board_interval == 0 or saving:
                tick, tick_step = time.monotonic(), step
            if stopping:
                break
        if main:
            scalars.close()
        distributed.barrier()
        return self.step_count >= cfg.max_steps

    def _reduced(self, values):
        """Process means as floats; UserError when one is not finite."""
        numbers = {k: float(distributed.all_reduce_mean(v.clone())) for k, v in values.items()}
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise UserError(
                    f'training diverged: {name} is {value} at step '
                    f'{self.step_count}; lower --learning_rate or use --amp no, and '
                    'resume from the last saved state'
                )
        return numbers

    def _validate_and_record(self, scalars):
        values, pictures = self.validate()
        if not distributed.is_main():
            return
        scalars.log(self.step_count, {f'test/{k}': v for k, v in values.items()})
        self._sheet(pictures, 'test')
        plot_curves(self.run_dir)
        score = values[f'loss_{self.config.n_iters}']
        log.info(
            'validation at step %d: %s',
            self.step_count,
            '  '.join(
                f'{name} '
                + '>'.join(f'{values[f"{name}_{t}"]:.4f}' for t in range(self.config.n_iters + 1))
                for name in [*self.losses, 'loss']
            ),
        )
        if self.step_count and score < self.best:
            self.best = score
            save_torch(self._checkpoints / 'best_model.pt', self.export())

    def _sheet(self, pictures, folder):
        """Writes [T, n, 3, S, S] as rows of photograph, then refinements 1..T-1."""
        if pictures is None:
            return
        t, n = pictures.shape[:2]
        sheet = grid(pictures.float().cpu().transpose(0, 1).flatten(0, 1), t)
        save_png(sheet, self.run_dir / 'logs' / 'images' / folder / f'{self.step_count:06d}.png')


def plot_curves(run_dir):
    """Draws the losses of stats.jsonl, training beside validation per refinement, to curves.png."""
    records = read_jsonl(Path(run_dir) / 'stats.jsonl')
    figure = Figure(figsize=(10, 4), layout='constrained')
    left, right = figure.subplots(1, 2)
    for axes, prefix in ((left, 'train/'), (right, 'test/loss_')):
        names = sorted({k for r in records for k in r if k.startswith(prefix)})
        for name in names:
            points = [(r['step'], r[name]) for r in records if name in r]
            axes.plot(*zip(*points), label=name.removeprefix(prefix))
        axes.set(xlabel='optimiser steps', yscale='log')
        if names:
            axes.legend()
    left.set_title('training, last refinement')
    right.set_title('validation loss after each refinement')
    with atomic_path(Path(run_dir) / 'curves.png') as temp:
        figure.savefig(temp, format='png')
