"""The StyleGAN2-ADA training loop: losses, regularisation, averaging, snapshots, resume.

Sources: StyleGAN2 (Karras et al. 2020), section 3 (path length, lazy regularisation); ADA
(Karras et al. 2020), section 2. Random numbers are a function of (seed, step, pass), never a
running state, so a resumed run draws what the uninterrupted one would have drawn.
"""

import copy
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

from models.stylegan2 import Generator
from models.stylegan2.checkpoint import generator_from_state
from models.stylegan2.model import NoiseInjection, set_low_precision
from training.adversarial import (
    LOSSES,
    before_step,
    build_discriminator,
    compute_in,
    freeze_discriminator,
)
from training.augment import MAX_STRENGTH, AdaptiveStrength, AugmentPipe
from utils import distributed
from utils.errors import UserError
from utils.images import from_uint8, grid, save_png
from utils.io import load_weights, save_torch
from utils.logs import ScalarLog, read_jsonl
from utils.seeds import derive, seed_everything, torch_generator
from utils.signals import leave_signals_to_parent

log = logging.getLogger(__name__)

SNAPSHOT_FORMAT = 1
SNAPSHOT_PREFIX = 'network-snapshot-'
_ADA_INTERVAL = 4  # steps between two adjustments of the augmentation strength
_MEAN_LATENT_SAMPLES = 20_000
_TRANSFER_ADA_KIMG = 100  # the published value when training goes on from a network
_STATUS_SECONDS = 60  # a sign of life between ticks
_SPOILT_STEPS = 16  # so many steps in a row with values that are not finite end a run


class EndlessSampler(torch.utils.data.Sampler):
    """Dataset indices of this process's passes, from image number `start` on, without end.

    Every epoch is a fresh permutation that depends on (seed, epoch) alone. Pass m of a step goes
    to process m % world, so the set of images in a step does not depend on the processes.
    """

    def __init__(self, n, *, batch, batch_gpu, seed, start=0):
        self.n, self.batch, self.batch_gpu, self.seed, self.start = n, batch, batch_gpu, seed, start

    def __iter__(self):
        rank, world = distributed.rank(), distributed.world_size()
        position, epoch, order = self.start, None, None
        while True:
            for index in range(self.batch):
                if index // self.batch_gpu % world == rank:
                    wanted = (position + index) // self.n
                    if wanted != epoch:
                        epoch = wanted
                        order = np.random.default_rng(
                            derive(self.seed, 'epoch', epoch)
                        ).permutation(self.n)
                    yield int(order[(position + index) % self.n])
            position += self.batch


class Draws(NamedTuple):
    """The generators of one pass, of the images' device and of the CPU; the same one on CPUs.

    What decides about images is drawn on the CPU, so that a GPU need not be asked for it.
    """

    images: torch.Generator
    host: torch.Generator


class Trainer:
    """Holds networks, optimisers and counters; `step()` is one optimiser step of both networks.

    dataset: items (uint8 [3, R, R], label). config: TrainConfig. precision: None, 'fp16' or
    'bf16' for the four highest resolutions. augment: 'ada', 'fixed' or 'noaug'. settings: what
    else shapes the run, plain values that are kept in snapshots.
    """

    def __init__(
        self,
        dataset,
        config,
        *,
        device,
        seed=0,
        augment='ada',
        augment_names=(),
        augment_p=0.0,
        ada_target=0.6,
        ada_kimg=500,
        precision=None,
        workers=0,
        settings=None,
    ):
        self.config, self.device, self.seed = config, torch.device(device), seed
        self.settings = settings or {}
        self.augment = augment
        world = distributed.world_size()
        self.rounds = config.batch // (config.batch_gpu * world)
        seed_everything(seed, 'init')  # every process starts from the same weights
        self.g = Generator(
            config.size, style_dim=config.style_dim, n_mlp=config.n_mlp, channels=config.channels
        )
        self.d = build_discriminator(config, self.device)
        self.loss = LOSSES[config.discriminator]
        self.noise = 'random' if config.use_noise else 'none'
        self.g_ema = copy.deepcopy(self.g).eval().requires_grad_(False)
        for module in (self.g, self.g_ema):
            module.to(self.device)
        self.set_precision(precision)
        self.d_trained = freeze_discriminator(self.d, config.freezed)
        self.g_optim = self._optimizer(self.g.parameters(), config.lr, config.g_reg_interval)
        self.d_optim = self._optimizer(
            self.d_trained, config.d_lr or config.lr, config.d_reg_interval
        )
        self.pipe = AugmentPipe(augment_names, self.device) if augment != 'noaug' else None
        self.ada = AdaptiveStrength(
            target=ada_target, adjust_kimg=ada_kimg, p=augment_p if augment == 'fixed' else 0.0
        )
        self.pl_mean = torch.zeros([], device=self.device)
        self.n_steps = self.n_img = 0
        self.ema_warm = False  # a transferred network needs no ramp-up of its average
        self._signs = torch.zeros(2, dtype=torch.float64, device=self.device)  # sum, count
        # Steps in a row, to this one, of which a value was not finite in this process.
        self.spoilt_steps = torch.zeros([], dtype=torch.int64, device=self.device)
        self.dataset, self.workers = dataset, workers
        self._batches = None

    def set_precision(self, precision):
        dtype = {None: None, 'fp16': torch.float16, 'bf16': torch.bfloat16}[precision]
        for module in (self.g, self.g_ema):
            set_low_precision(module, dtype)
        compute_in(self.d, dtype)

    def _optimizer(self, parameters, lr, interval):
        # Lazy regularisation: one of (interval + 1) updates is the penalty's own.
        ratio = interval / (interval + 1)
        return torch.optim.Adam(
            list(parameters), lr=lr * ratio, betas=(0.0, 0.99**ratio), eps=1e-8, fused=True
        )

    # -- one step ---------------------------------------------------------------------------

    def _next_reals(self):
        if self._batches is None:
            sampler = EndlessSampler(
                len(self.dataset),
                batch=self.config.batch,
                batch_gpu=self.config.batch_gpu,
                seed=self.seed,
                start=self.n_img,
            )
            self._batches = iter(
                torch.utils.data.DataLoader(
                    self.dataset,
                    batch_size=self.config.batch_gpu,
                    sampler=sampler,
                    num_workers=self.workers,
                    pin_memory=self.device.type == 'cuda',
                    persistent_workers=False,
                    worker_init_fn=leave_signals_to_parent,
                )
            )
        return from_uint8(next(self._batches)[0].to(self.device, non_blocking=True))

    def _passes(self, phase: str) -> Iterator[Draws]:
        """The random generators of this process's passes in `phase` of this step."""
        world = distributed.world_size()
        for r in range(self.rounds):
            number = r * world + distributed.rank()
            images = torch_generator(self.seed, self.n_steps, phase, number, device=self.device)
            yield Draws(
                images,
                images
                if self.device.type == 'cpu'
                else torch_generator(self.seed, self.n_steps, phase, number),
            )

    def _latents(self, draw: Draws, n: int) -> torch.Tensor:
        """ws [n, L, D] of fresh z, styles mixed with the configured probability."""
        z = torch.randn(n, self.config.style_dim, device=self.device, generator=draw.images)
        z2 = torch.randn(n, self.config.style_dim, device=self.device, generator=draw.images)
        # The cut is the same for all passes of the step.
        shared = torch_generator(self.seed, self.n_steps, 'cut')
        mixed = float(torch.rand([], generator=shared)) < self.config.style_mixing
        cut = int(torch.randint(1, self.g.n_latent, [], generator=shared))
        ws = self.g.broadcast(self.g.mapping(z))
        if mixed:
            ws = torch.cat([ws[:, :cut], self.g.broadcast(self.g.mapping(z2))[:, cut:]], 1)
        return ws

    def _judge(self, draw: Draws, *batches: torch.Tensor) -> torch.Tensor:
        """Scores of batches [n, 3, R, R] of one size, one after the other, in one pass.

        Each is augmented and judged by itself.
        """
        if self.pipe is not None:
            draws = {'generator': draw.host, 'pixel_generator': draw.images}
            batches = tuple(self.pipe(images, self.ada.p, **draws) for images in batches)
        return self.d(torch.cat(batches), parts=len(batches))

    def _count_signs(self, logits: torch.Tensor) -> None:
        """Notes the signs of scores of photographs; those that are not finite do not count."""
        finite = logits.detach().isfinite()
        signs = torch.where(finite, logits.detach().sign(), 0)
        self._signs += torch.stack([signs.double().sum(), finite.double().sum()])

    def step(self) -> dict[str, torch.Tensor]:
        """One step; returns a dict of 0-d tensors averaged over this process's passes."""
        stats = {}
        cfg = self.config

        def record(name, value):
            stats[name] = stats.get(name, 0) + value.detach().float().mean() / self.rounds

        self.d.requires_grad_(False)
        for draw in self._passes('g_main'):
            fake = self.g.synthesis(
                self._latents(draw, cfg.batch_gpu), noise=self.noise, generator=draw.images
            )
            loss = self.loss.generator(self._judge(draw, fake)).mean()
            record('loss_g', loss)
            (loss / self.rounds).backward()
        self._update(self.g_optim)
        if cfg.pl_weight and self.n_steps % cfg.g_reg_interval == 0:
            n = max(cfg.batch_gpu // cfg.pl_batch_shrink, 1)
            lengths = []
            for draw in self._passes('g_reg'):
                loss, length = self._path_length(self._latents(draw, n), draw)
                lengths.append(length)
                record('loss_pl', loss)
                (loss * cfg.g_reg_interval / self.rounds).backward()
            mean = distributed.all_reduce_mean(torch.stack(lengths).mean())
            moved = self.pl_mean.lerp(mean, cfg.pl_decay)
            self.pl_mean = torch.where(moved.isfinite(), moved, self.pl_mean)
            self._update(self.g_optim)
        self._unfreeze_trained()

        before_step(self.d)
        reals = []
        for draw in self._passes('d_main'):
            with torch.no_grad():
                fake = self.g.synthesis(
                    self._latents(draw, cfg.batch_gpu), noise=self.noise, generator=draw.images
                )
            reals.append(self._next_reals())
            logits_fake, logits = self._judge(draw, fake, reals[-1]).chunk(2)
            loss_fake = self.loss.fake(logits_fake).mean()
            loss_real = self.loss.real(logits).mean()
            self._count_signs(logits)
            record('loss_d', loss_fake + loss_real)
            record('score_real', logits)
            ((loss_fake + loss_real) / self.rounds).backward()
        self._update(self.d_optim)
        if cfg.gamma and self.n_steps % cfg.d_reg_interval == 0:
            for draw, real in zip(self._passes('d_reg'), reals):
                real = real.detach().requires_grad_()
                logits = self._judge(draw, real)
                self._count_signs(logits)
                # The gradient is taken at the image before augmentation (ADA, section 2).
                (grad,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
                penalty = grad.square().sum((1, 2, 3)).mean()
                record('r1', penalty)
                loss = penalty * (cfg.gamma / 2 * cfg.d_reg_interval) / self.rounds
                # Layers the penalty does not reach get a gradient of 0, so that Adam counts a step.
                (loss + 0 * logits.sum()).backward()
            self._update(self.d_optim)

        finite = torch.stack(list(stats.values())).isfinite().all()
        self.spoilt_steps = torch.where(finite, 0, self.spoilt_steps + 1)
        self.n_steps += 1
        self.n_img += cfg.batch
        self._average_weights()
        if self.n_steps % _ADA_INTERVAL == 0:
            self._adapt()
        return stats

    def _path_length(self, ws: torch.Tensor, draw: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """Penalty and mean path length of one pass, for ws [n, L, D].

        As published, the target first moves to this pass's mean, and the gradient goes through it.
        """
        images = self.g.synthesis(ws, noise=self.noise, generator=draw.images)
        noise = torch.randn(images.shape, device=self.device, generator=draw.images)
        noise = noise / math.sqrt(images.shape[2] * images.shape[3])
        (grad,) = torch.autograd.grad((images * noise).sum(), ws, create_graph=True)
        lengths = grad.square().sum(2).mean(1).sqrt()
        target = self.pl_mean.lerp(lengths.mean(), self.config.pl_decay)
        penalty = (lengths - target).square().mean() * self.config.pl_weight
        # The biases of to-RGB layers get a gradient of 0, so that Adam counts a step.
        return penalty + 0 * images[:, 0, 0, 0].sum(), lengths.detach().mean()

    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        distributed.average_gradients(parameters)
        if self.g.low_precision is not None and self.g.low_precision[0] == torch.float16:
            # float16 without loss scaling overflows now and then; the published recipe.
            gradients = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([g.flatten() for g in gradients])  # one pass over all of them
            flat.nan_to_num_(nan=0, posinf=1e5, neginf=-1e5)
            parts = flat.split([g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [v.view_as(g) for v, g in zip(parts, gradients)])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _unfreeze_trained(self):
        for p in self.d_trained:
            p.requires_grad_(True)

    @torch.no_grad()
    def _average_weights(self):
        cfg = self.config
        half_life = cfg.ema_kimg * 1000
        if cfg.ema_rampup is not None and not self.ema_warm:
            half_life = min(half_life, self.n_img * cfg.ema_rampup)
        beta = 0.5 ** (cfg.batch / max(half_life, 1e-8))
        averaged, current = list(self.g_ema.parameters()), list(self.g.parameters())
        torch._foreach_lerp_(averaged, current, 1 - beta)

    def _adapt(self):
        signs, count = distributed.all_reduce_sum(self._signs.clone()).tolist()
        if not count:
            return
        mean_sign = signs / count
        if self.augment == 'ada':
            self.ada.update(mean_sign, self.config.batch * _ADA_INTERVAL)
        else:
            self.ada.overfitting = mean_sign
        self._signs.zero_()

    # -- snapshots --------------------------------------------------------------------------

    def state(self):
        """Everything a resumed run needs, in the project's weight-file format."""
        return {
            'format': SNAPSHOT_FORMAT,
            'g_ema': self.g_ema.state_dict(),
            'g': self.g.state_dict(),
            'd': self.d.state_dict(),
            'latent_avg': self.g_ema.mean_latent(_MEAN_LATENT_SAMPLES, seed=0),
            'g_optim': self.g_optim.state_dict(),
            'd_optim': self.d_optim.state_dict(),
            'ada': {'p': self.ada.p, 'overfitting': self.ada.overfitting, 'signs': self._signs},
            'pl_mean': self.pl_mean,
            'n_steps': self.n_steps,
            'n_img': self.n_img,
            'ema_warm': self.ema_warm,
            'seed': self.seed,
            'config': self.config.to_dict(),
            'settings': self.settings,
        }

    def weights_finite(self) -> bool:
        """Whether all weights of the three networks are numbers."""
        return all(
            bool(p.isfinite().all())
            for net in (self.g, self.d, self.g_ema)
            for p in net.parameters()
        )

    def load_state(self, state: dict, *, source: str | Path = 'the snapshot') -> None:
        """Continues exactly from `state()`, read from `source`; UserError when networks differ.

        A fixed augmentation strength stays this trainer's own.
        """
        self._load_networks(state, source)
        self.g_optim.load_state_dict(state['g_optim'])
        self.d_optim.load_state_dict(state['d_optim'])
        self.ada.overfitting = state['ada']['overfitting']
        if self.augment == 'ada':
            self.ada.p = state['ada']['p']
        self._signs.copy_(state['ada']['signs'])
        self.pl_mean.copy_(state['pl_mean'])
        self.n_steps, self.n_img = state['n_steps'], state['n_img']
        if state['ema_warm']:
            self.mark_transferred()
        self._batches = None

    def transfer(self, weights: dict, *, source: str | Path = 'the weight file') -> None:
        """Starts from the networks of a weight file (transfer learning); counters stay at 0.

        source: where `weights` came from, for messages. UserError when they do not fit.
        """
        self._load_networks(weights, source)
        self.mark_transferred()

    def mark_transferred(self):
        """Says that the networks are trained ones: no ramp-up of their average, quicker ADA."""
        self.ema_warm = True
        self.ada.adjust_kimg = _TRANSFER_ADA_KIMG

    def _load_networks(self, weights: dict, source: str | Path) -> None:
        if not isinstance(weights.get('g_ema'), dict):
            raise UserError(
                f'{source} holds no generator (g_ema); give a snapshot or a generator file'
            )
        parts = {'g_ema': self.g_ema, 'g': self.g, 'd': self.d}
        opponent = weights.get('config', {}).get('discriminator', 'stylegan2')
        if opponent != self.config.discriminator:
            weights = {k: v for k, v in weights.items() if k != 'd'}  # of another kind
        for name, module in parts.items():
            state = weights.get(name) or (weights['g_ema'] if name == 'g' else None)
            if state is None:
                log.warning('%s holds no %s; it starts untrained', source, name)
                continue
            try:
                module.load_state_dict(state)
            except RuntimeError as error:
                held = generator_from_state(weights['g_ema'], source=source)
                raise UserError(
                    f'{source} holds networks for {_described(held)}, this run '
                    f'wants {_described(self.g)}; choose images of that size, and the '
                    '--cfg and --map-depth it was trained with'
                ) from error
        if not self.config.use_noise:
            silence_noise(self.g)
            silence_noise(self.g_ema)


def _described(net):
    channels = ', '.join(f'{r}: {c}' for r, c in net.channels.items())
    return f'{net.size} px, {net.n_mlp} mapping layers and channels {{{channels}}}'


@torch.no_grad()
def silence_noise(generator):
    """Sets the strength of the noise to 0 in all layers; what uses the network adds none then."""
    for module in generator.modules():
        if isinstance(module, NoiseInjection):
            module.weight.zero_()


def save_snapshot(trainer, run_dir):
    """Writes `network-snapshot-<kimg>.pt` (with images, not kimg, below one kimg) atomically."""
    path = Path(run_dir) / f'{SNAPSHOT_PREFIX}{trainer.n_img / 1000:09.3f}.pt'
    save_torch(path, trainer.state())
    return path


def latest_snapshot(run_dir):
    """(path, contents) of the newest loadable snapshot, or None; damaged ones are passed over."""
    for path in sorted(Path(run_dir).glob(f'{SNAPSHOT_PREFIX}*.pt'), reverse=True):
        try:
            return path, load_weights(path, what='training snapshot')
        except UserError as error:
            log.warning('passing over a damaged snapshot: %s', error)
    return None


def export_inference(snapshot_path, target):
    """Writes the generator alone: g_ema and latent_avg, without what leaks or is not needed."""
    state = load_weights(snapshot_path, what='training snapshot')
    save_torch(target, {'g_ema': state['g_ema'], 'latent_avg': state['latent_avg']})


@torch.no_grad()
def sample_grid(generator, *, n, seed, device, psi=1.0, latent_avg=None, batch=32):
    """n images [n, 3, R, R] of fixed latents with stored noise, on the CPU."""
    z = torch.randn(n, generator.style_dim, generator=torch_generator(seed, 'grid'))
    images = []
    for part in z.split(batch):
        images.append(
            generator(part.to(device), truncation=psi, truncation_latent=latent_avg).float().cpu()
        )
    return torch.cat(images)


def train(
    trainer,
    run_dir,
    *,
    kimg,
    snapshot_kimg,
    tick_kimg=1.0,
    n_grid=64,
    metric=None,
    keep_snapshots=None,
    should_stop=lambda: False,
):
    """Runs `trainer` to `kimg`, leaving snapshots, grids, logs and curves in `run_dir`.

    metric: function(generator, device) -> dict of numbers, called at every snapshot.
    keep_snapshots: how many of the newest to keep (None: all). should_stop: asked after every
    step; when it answers True in any process, all stop in good order, with a snapshot. Returns the
    path of the last snapshot (None on other processes than the first). Raises UserError when the
    losses stop being finite.
    """
    run_dir = Path(run_dir)
    main = distributed.is_main()
    scalars = (
        ScalarLog(run_dir, resume_step=trainer.n_img if trainer.n_img else None) if main else None
    )
    side = max(1, int(math.sqrt(n_grid)))
    if main and not trainer.n_img:
        reals = torch.stack(
            [trainer.dataset[i][0] for i in range(min(n_grid, len(trainer.dataset)))]
        )
        save_png(grid(from_uint8(reals), side), run_dir / 'reals.png')
        fakes = sample_grid(trainer.g_ema, n=n_grid, seed=0, device=trainer.device)
        save_png(grid(fakes, side), run_dir / 'fakes_init.png')
    total = int(kimg * 1000)
    if main and trainer.n_img >= total:
        log.info(
            'already at %g of %g kimg; a larger --kimg would go on', trainer.n_img / 1000, kimg
        )
    started = tick_start = last_status = time.monotonic()
    tick_img, start_img = trainer.n_img, trainer.n_img
    sums = {}  # of each value, and of the steps in which it was finite, [2]

    def averages():
        now = time.monotonic()
        return {
            **{k: float(v[0] / v[1]) for k, v in sums.items() if v[1]},
            'augment_p': trainer.ada.p,
            'overfitting': trainer.ada.overfitting,
            'images_per_second': (trainer.n_img - tick_img) / max(now - tick_start, 1e-9),
            'kimg': trainer.n_img / 1000,
            'memory_gb': _memory_gb(trainer.device),
        }

    last = None
    while True:
        done = trainer.n_img >= total
        # Asking all GPUs makes them wait for each other, so only when the strength does it anyway.
        ask = (
            trainer.n_steps % _ADA_INTERVAL == 0
            or trainer.device.type != 'cuda'
            or distributed.world_size() == 1
        )
        stopping = ask and not done and distributed.any_process(should_stop(), trainer.device)
        if (tick_img < trainer.n_img and _crosses(trainer, tick_kimg)) or done or stopping:
            sums = {k: distributed.all_reduce_sum(v) for k, v in sums.items()}
            _check_finite(trainer)
            if main and sums:
                values = averages()
                scalars.log(trainer.n_img, values)
                _status(trainer, values, time.monotonic() - started, start_img, total)
            sums = {}
            tick_img, tick_start = trainer.n_img, time.monotonic()
            last_status = tick_start
        elif main and sums and time.monotonic() - last_status > _STATUS_SECONDS:
            last_status = time.monotonic()
            _status(trainer, averages(), last_status - started, start_img, total)
        if (start_img < trainer.n_img and _crosses(trainer, snapshot_kimg)) or done or stopping:
            _check_finite(trainer, saving=True)
            # A scheduler that asks to stop waits seconds, which a metric would not fit in.
            last = _snapshot(
                trainer,
                run_dir,
                side,
                n_grid,
                None if stopping else metric,
                scalars,
                keep_snapshots,
            )
            tick_start = last_status = time.monotonic()
        if done or stopping:
            break
        for name, value in trainer.step().items():
            sums[name] = sums.get(name, 0) + torch.stack(
                [value.nan_to_num(0, 0, 0), value.isfinite().float()]
            )
    if main:
        scalars.close()
        if stopping:
            log.info(
                'stopped at %g of %g kimg; --resume=%s goes on', trainer.n_img / 1000, kimg, run_dir
            )
    distributed.barrier()
    return last


def _crosses(trainer: Trainer, kimg: float) -> bool:
    """Whether the last step reached a multiple of `kimg`: the same ones in a resumed run."""
    unit = kimg * 1000
    return trainer.n_img // unit > (trainer.n_img - trainer.config.batch) // unit


def _snapshot(trainer, run_dir, side, n_grid, metric, scalars, keep):
    if not distributed.is_main():
        distributed.barrier()
        return None
    path = save_snapshot(trainer, run_dir)
    fakes = sample_grid(trainer.g_ema, n=n_grid, seed=0, device=trainer.device)
    save_png(grid(fakes, side), run_dir / f'fakes{path.stem.removeprefix(SNAPSHOT_PREFIX)}.png')
    if metric is not None:
        values = metric(trainer.g_ema, trainer.device)
        scalars.log(trainer.n_img, values)
        log.info(
            'kimg %.1f  %s',
            trainer.n_img / 1000,
            '  '.join(f'{k} {v:.4g}' for k, v in values.items()),
        )
    if keep is not None:
        for old in sorted(run_dir.glob(f'{SNAPSHOT_PREFIX}*.pt'))[:-keep]:
            old.unlink()
    plot_curves(run_dir)
    distributed.barrier()
    return path


def _check_finite(trainer: Trainer, *, saving: bool = False) -> None:
    """UserError when weights are not finite, or losses have not been for many steps.

    Weights are looked at after a step whose losses were not finite, and before `saving`.

    float16 without loss scaling overflows in single steps, whose gradients are cleaned: such a
    step is survived.
    """
    spoilt = torch.stack([(trainer.spoilt_steps >= _SPOILT_STEPS), trainer.spoilt_steps > 0])
    lasting, now = distributed.all_reduce_sum(spoilt.float()).tolist()
    if lasting or ((now or saving) and not trainer.weights_finite()):
        raise UserError(
            f'training diverged: losses or weights are not finite at kimg '
            f'{trainer.n_img / 1000:.1f}; resume from an earlier snapshot, with '
            '--transfer=1 and a larger --gamma, or in full precision (--fp32=1)'
        )


def _memory_gb(device):
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def _status(trainer, values, elapsed, start_img, total):
    rate = (trainer.n_img - start_img) / max(elapsed, 1e-9)
    eta = max(total - trainer.n_img, 0) / max(rate, 1e-9)
    log.info(
        'kimg %8.2f  time %s  eta %s  img/s %6.1f  p %.3f%s  r_t %+.2f  G %.3f  D %.3f  mem %.1fG',
        trainer.n_img / 1000,
        _clock(elapsed),
        _clock(eta),
        values['images_per_second'],
        trainer.ada.p,
        ' (at its cap)' if trainer.ada.p >= MAX_STRENGTH else '',
        trainer.ada.overfitting,
        values.get('loss_g', math.nan),
        values.get('loss_d', math.nan),
        values['memory_gb'],
    )


def _clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}'


def plot_curves(run_dir):
    """Draws `curves.png` from the run's stats.jsonl, if there is one yet."""
    from matplotlib.figure import Figure

    run_dir = Path(run_dir)
    if not (run_dir / 'stats.jsonl').is_file():
        return
    rows = read_jsonl(run_dir / 'stats.jsonl')
    names = [
        ('loss_g', 'loss_d'),
        ('score_real', 'overfitting'),
        ('augment_p',),
        ('r1',),
        ('loss_pl',),
    ]
    known = {n for group in names for n in group} | {
        'step',
        'kimg',
        'images_per_second',
        'memory_gb',
    }
    logged = {k for r in rows for k in r}
    names += [(n,) for n in sorted(logged - known)]
    names = [group for group in names if logged & set(group)]
    figure = Figure(figsize=(4 * len(names), 3), layout='constrained')
    for axis, group in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for name in group:
            points = [(r['step'] / 1000, r[name]) for r in rows if name in r]
            if points:
                axis.plot(*zip(*points), label=name, marker='.' if len(points) == 1 else None)
        axis.set_xlabel('kimg')
        if axis.lines:
            axis.legend()
    figure.savefig(run_dir / 'curves.png', dpi=80, metadata={'Software': None})
