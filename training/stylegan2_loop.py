"""The StyleGAN2-ADA training: losses, regularisation, averaging, snapshots.

Sources: StyleGAN2 (Karras et al. 2020), section 3 (path length, lazy regularisation); ADA
(Karras et al. 2020), section 2. Random numbers are a function of (seed, step, pass), never a
running state, so a resumed run draws what the uninterrupted one would have drawn.

Shapes: N images of a pass, L styles, D style dimension, R side of the pictures.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from models.stylegan2 import Generator
from models.stylegan2.model import set_low_precision
from training.adversarial import (
    LOSSES,
    before_step,
    build_discriminator,
    compute_in,
    freeze_discriminator,
)
from training.augment import AdaptiveStrength, AugmentPipe
from training.batches import Batches, StepSampler
from training.run import Training
from training.stylegan2_config import TrainConfig
from training.stylegan2_networks import load_networks
from utils import distributed
from utils.seeds import seed_everything, torch_generator

SNAPSHOT_FORMAT = 1
_ADA_INTERVAL = 4  # steps between two adjustments of the augmentation strength
_MEAN_LATENT_SAMPLES = 20_000
_TRANSFER_ADA_KIMG = 100  # the published value when training goes on from a network


class Draws(NamedTuple):
    """The generators of one pass, of the images' device and of the CPU; the same one on CPUs.

    What decides about images is drawn on the CPU, so that a GPU need not be asked for it.
    """

    images: torch.Generator
    host: torch.Generator


class Trainer(Training):
    """Holds networks, optimisers and counters; `step()` is one optimiser step of both networks.

    dataset: items (uint8 [3, R, R], label). config: TrainConfig. precision: None, 'fp16' or
    'bf16' for the four highest resolutions. augment: 'ada', 'fixed' or 'noaug'. settings: what
    else shapes the run, plain values that are kept in snapshots.
    """

    unit, scale = 'kimg', 1000

    def __init__(
        self,
        dataset: Dataset,
        config: TrainConfig,
        *,
        device: torch.device | str,
        seed: int = 0,
        augment: str = 'ada',
        augment_names: Iterable[str] = (),
        augment_p: float = 0.0,
        ada_target: float = 0.6,
        ada_kimg: float = 500,
        precision: str | None = None,
        workers: int = 0,
        settings: dict | None = None,
    ) -> None:
        self.config, self.device, self.seed = config, torch.device(device), seed
        self.settings = settings or {}
        self.augment, self.stride = augment, config.batch
        self.rounds = config.batch // (config.batch_gpu * distributed.world_size())
        self._build_networks()
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

    def _build_networks(self) -> None:
        config = self.config
        seed_everything(self.seed, 'init')  # every process starts from the same weights
        self.g = Generator(
            config.size, style_dim=config.style_dim, n_mlp=config.n_mlp, channels=config.channels
        )
        self.d = build_discriminator(config, self.device)
        self.loss = LOSSES[config.discriminator]
        self.noise = 'random' if config.use_noise else 'none'
        self.g_ema = copy.deepcopy(self.g).eval().requires_grad_(False)
        for module in (self.g, self.g_ema):
            module.to(self.device)

    @property
    def progress(self) -> int:
        """Images seen."""
        return self.n_img

    def set_precision(self, precision: str | None) -> None:
        """Computes the four highest resolutions in 'fp16', 'bf16' or (None) float32."""
        dtype = {None: None, 'fp16': torch.float16, 'bf16': torch.bfloat16}[precision]
        for module in (self.g, self.g_ema):
            set_low_precision(module, dtype)
        compute_in(self.d, dtype)

    def _optimizer(
        self, parameters: Iterable[nn.Parameter], lr: float, interval: int
    ) -> torch.optim.Optimizer:
        # Lazy regularisation: one of (interval + 1) updates is the penalty's own.
        ratio = interval / (interval + 1)
        return torch.optim.Adam(
            list(parameters), lr=lr * ratio, betas=(0.0, 0.99**ratio), eps=1e-8, fused=True
        )

    # -- one step ---------------------------------------------------------------------------

    def _next_reals(self) -> Tensor:
        if self._batches is None:
            sampler = StepSampler(
                len(self.dataset),  # type: ignore[arg-type]
                batch_size=self.config.batch,
                pass_size=self.config.batch_gpu,
                seed=self.seed,
                start=self.n_img // self.config.batch,
                whole_batches=False,
            )
            self._batches = Batches(self.dataset, sampler, device=self.device, workers=self.workers)
        return next(self._batches)

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

    def _latents(self, draw: Draws, n: int) -> Tensor:
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

    def _judge(self, draw: Draws, *batches: Tensor) -> Tensor:
        """Scores of batches [n, 3, R, R] of one size, one after the other, in one pass.

        Each is augmented and judged by itself.
        """
        if self.pipe is not None:
            batches = tuple(
                self.pipe(images, self.ada.p, generator=draw.host, pixel_generator=draw.images)
                for images in batches
            )
        return self.d(torch.cat(batches), parts=len(batches))

    def _count_signs(self, logits: Tensor) -> None:
        """Notes the signs of scores of photographs; those that are not finite do not count."""
        finite = logits.detach().isfinite()
        signs = torch.where(finite, logits.detach().sign(), 0)
        self._signs += torch.stack([signs.double().sum(), finite.double().sum()])

    def advance(self) -> dict[str, Tensor]:
        """One step of both networks."""
        return self.step()

    def step(self) -> dict[str, Tensor]:
        """One step; returns a dict of 0-d tensors averaged over this process's passes."""
        stats: dict[str, Tensor] = {}

        def record(name: str, value: Tensor) -> None:
            mean = value.detach().float().mean() / self.rounds
            stats[name] = stats[name] + mean if name in stats else mean

        self.d.requires_grad_(False)
        self._train_generator(record)
        for p in self.d_trained:
            p.requires_grad_(True)
        before_step(self.d)
        self._train_discriminator(record)
        finite = torch.stack(list(stats.values())).isfinite().all()
        self.spoilt_steps = torch.where(finite, 0, self.spoilt_steps + 1)
        self.n_steps += 1
        self.n_img += self.config.batch
        self._average_weights()
        if self.n_steps % _ADA_INTERVAL == 0:
            self._adapt()
        return stats

    def _fakes(self, draw: Draws) -> Tensor:
        """A pass of generated pictures [N, 3, R, R]."""
        ws = self._latents(draw, self.config.batch_gpu)
        return self.g.synthesis(ws, noise=self.noise, generator=draw.images)

    def _train_generator(self, record: Callable[[str, Tensor], None]) -> None:
        cfg = self.config
        for draw in self._passes('g_main'):
            loss = self.loss.generator(self._judge(draw, self._fakes(draw))).mean()
            record('loss_g', loss)
            (loss / self.rounds).backward()
        self._update(self.g_optim)
        if not cfg.pl_weight or self.n_steps % cfg.g_reg_interval:
            return
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

    def _train_discriminator(self, record: Callable[[str, Tensor], None]) -> None:
        cfg, reals = self.config, []
        for draw in self._passes('d_main'):
            with torch.no_grad():
                fake = self._fakes(draw)
            reals.append(self._next_reals())
            logits_fake, logits = self._judge(draw, fake, reals[-1]).chunk(2)
            loss_fake = self.loss.fake(logits_fake).mean()
            loss_real = self.loss.real(logits).mean()
            self._count_signs(logits)
            record('loss_d', loss_fake + loss_real)
            record('score_real', logits)
            ((loss_fake + loss_real) / self.rounds).backward()
        self._update(self.d_optim)
        if not cfg.gamma or self.n_steps % cfg.d_reg_interval:
            return
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

    def _path_length(self, ws: Tensor, draw: Draws) -> tuple[Tensor, Tensor]:
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

    @torch.no_grad()
    def _average_weights(self) -> None:
        cfg = self.config
        half_life = cfg.ema_kimg * 1000
        if cfg.ema_rampup is not None and not self.ema_warm:
            half_life = min(half_life, self.n_img * cfg.ema_rampup)
        beta = 0.5 ** (cfg.batch / max(half_life, 1e-8))
        averaged: list[Tensor] = [*self.g_ema.parameters()]
        torch._foreach_lerp_(averaged, [*self.g.parameters()], 1 - beta)

    def _adapt(self) -> None:
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

    def state(self) -> dict:
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
        load_networks(self, state, source)
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
        load_networks(self, weights, source)
        self.mark_transferred()

    def mark_transferred(self) -> None:
        """Says that the networks are trained ones: no ramp-up of their average, quicker ADA."""
        self.ema_warm = True
        self.ada.adjust_kimg = _TRANSFER_ADA_KIMG
