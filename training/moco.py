"""MoCo v2 on fundus photographs: the training of a content encoder.

Two views of every image; the query network learns to tell the image's other view, seen by a
slowly following key network, from a queue of earlier keys (He et al. 2020; Chen et al. 2020).

Differences from the original:
- The views keep colour and small lesions (no grey-scaling, large crops; see `ViewConfig`).
- The key network normalises with its own running statistics, which follow the query's like its
  weights do (Cai et al. 2021, 'EMAN'). Keys then do not depend on the batch they came in, so
  nothing is to be learned from batch statistics, and batches need no shuffling among GPUs. With
  the query's statistics taken over all processes, N processes compute what one does.
- Fundus photographs are so alike that an untrained network maps all of them to one point, from
  where it can tell new keys from old ones by drifting instead of looking. Three things prevent
  that: the batch's own keys are among the candidates, both layers of the projection head are
  batch-normalised (Chen et al. 2021, MoCo v3), and the key network follows faster in the first
  steps.

Shapes: N images of one process's share, B of the whole batch, S side, F features, D projection,
K queue. Random numbers are a function of (seed, step) and belong to the whole batch.
"""

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from models.features.content import content_checkpoint
from models.resnet import build_resnet
from training.batches import Batches, StepSampler
from training.checkpoints import Checkpoints
from training.content_options import MocoConfig
from training.curves import Panel
from training.moco_views import apply_views, draw_views
from training.run import Training, TrainingRun
from training.sync_batchnorm import share_batch_statistics
from utils import distributed
from utils.errors import UserError
from utils.images import from_uint8, grid, save_png
from utils.io import save_torch
from utils.seeds import derive, torch_generator

STATE_FORMAT = 1
EXPORT_NAME = 'content_encoder.pt'
PROJECTION_DIM = 128
MAX_QUEUE = 65536  # published
_SHEET_IMAGES = 12


def info_nce(q: Tensor, keys: Tensor, own: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE: unit vectors q [N, D] and keys [K, D] -> (losses [N], logits [N, K]).

    own [N]: which key is that of the row's own image; all others are negatives.
    """
    logits = q @ keys.T / temperature
    return F.cross_entropy(logits, own, reduction='none'), logits


class _Network(nn.Module):
    """A ResNet with a two-layer projection head: [N, 3, S, S] -> unit vectors [N, D]."""

    def __init__(self, arch: str, *, small_stem: bool, dim: int = PROJECTION_DIM) -> None:
        super().__init__()
        self.backbone = build_resnet(arch, small_stem=small_stem)
        width = self.backbone.feature_dim
        # 1x1 convolutions, so that the normalisation is one that processes can share.
        self.head = nn.Sequential(
            nn.Unflatten(1, (width, 1, 1)),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
            nn.Flatten(),
        )
        # A learned offset would bring back the common direction that is normalised away.
        self.head[-2].requires_grad_(False)

    def forward(self, img: Tensor) -> Tensor:
        return F.normalize(self.head(self.backbone(img)).float(), dim=1)


class MoCo(nn.Module):
    """Query network, key network that follows it, and the queue of earlier keys.

    The key network stays in eval mode (see the module's note). queue_size must be a multiple of
    the batch.
    """

    queue: Tensor
    queue_at: Tensor

    def __init__(
        self, arch: str, *, small_stem: bool, queue_size: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.query = _Network(arch, small_stem=small_stem)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        queue = torch.randn(queue_size, PROJECTION_DIM, generator=generator)
        self.register_buffer('queue', F.normalize(queue, dim=1))
        self.register_buffer('queue_at', torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> 'MoCo':
        super().train(mode)
        self.key.train(False)
        return self

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """key <- momentum * key + (1 - momentum) * query, running statistics included."""
        pairs = zip(self.key.state_dict().values(), self.query.state_dict().values())
        for k, q in pairs:
            if k.dtype.is_floating_point:
                k.lerp_(q, 1 - momentum)
            else:
                k.copy_(q)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> Tensor:
        """Replaces the oldest keys by `keys` [B, D], B a divisor of K; returns their places [B]."""
        places = self.queue_at + torch.arange(len(keys), device=keys.device)
        self.queue.index_copy_(0, places, keys)
        self.queue_at.add_(len(keys)).remainder_(len(self.queue))
        return places


def export_encoder(moco: MoCo, *, arch: str, input_size: int, small_stem: bool) -> dict:
    """The key network's ResNet as a content encoder file; convolutions as float16 to save space.

    The key network is an average over training and smoother than the query's last step.
    """
    file = content_checkpoint(
        moco.key.backbone, arch=arch, input_size=input_size, small_stem=small_stem
    )
    file['state_dict'] = {
        k: (v.half() if v.dim() == 4 else v).contiguous() for k, v in file['state_dict'].items()
    }
    return file


def automatic_queue(n_images: int, batch_size: int) -> int:
    """Half of the images, at most 65536, in whole batches (at least one)."""
    return max(min(MAX_QUEUE, n_images // 2) // batch_size, 1) * batch_size


def learning_rate(config: MocoConfig, step: int) -> float:
    """The rate of optimiser step `step` (counted from 0)."""
    peak = config.learning_rate * config.batch_size / 256
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))


def key_momentum(config: MocoConfig, step: int) -> float:
    """The share of itself the key network keeps at `step`: rises from 0.1 to the set value."""
    return min(config.key_momentum, (1 + step) / (10 + step))


class MocoTrainer(Training):
    """Trains a MoCo on `train_set` (items (index, mirrored) -> uint8 [3, S, S]).

    Raises UserError when there are fewer images than a batch, or the batch cannot be divided
    among the processes, or does not divide the queue.
    """

    remedy = 'lower `learning_rate`, or use `amp` no'

    def __init__(
        self,
        train_set: Dataset,
        config: MocoConfig,
        *,
        device: torch.device | str,
        workers: int = 0,
    ) -> None:
        self.train_set, self.config, self.device = train_set, config, torch.device(device)
        self.n_images: int = len(train_set)  # type: ignore[arg-type]
        self.workers, self.step_count, self.images = workers, 0, config.batch_size
        self.queue_size = config.queue_size or automatic_queue(self.n_images, config.batch_size)
        self._check()
        with torch.random.fork_rng(devices=[]):  # torch's layers draw from the global stream
            torch.manual_seed(derive(config.seed, 'moco'))
            moco = MoCo(
                config.arch,
                small_stem=config.small_stem,
                queue_size=self.queue_size,
                generator=torch_generator(config.seed, 'queue'),
            )
        if distributed.world_size() > 1:
            share_batch_statistics(moco.query, self.device)
        self.moco = moco.to(self.device).to(memory_format=torch.channels_last)
        self.parameters = [p for p in self.moco.query.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=0.0, momentum=config.sgd_momentum, weight_decay=config.weight_decay
        )

    def _check(self) -> None:
        cfg, world = self.config, distributed.world_size()
        if self.n_images < cfg.batch_size:
            raise UserError(
                f'{self.n_images} training images are fewer than one batch of '
                f'{cfg.batch_size}; lower `batch_size` or add images'
            )
        if cfg.batch_size % world:
            raise UserError(
                f'`batch_size` {cfg.batch_size} cannot be divided among {world} processes'
            )
        if cfg.batch_size // world < 2:
            raise UserError('batch normalisation needs 2 images per process; raise `batch_size`')
        if self.queue_size % cfg.batch_size:
            raise UserError(
                f'`queue_size` {self.queue_size} is no multiple of `batch_size` {cfg.batch_size}'
            )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.config.amp == 'bf16'
        )

    def views(self, img: Tensor, number: int) -> Tensor:
        """View `number` (0 or 1) of this process's share img [N, 3, S, S] of the batch."""
        draw = torch_generator(self.config.seed, 'view', self.step_count, number)
        first = distributed.rank() * len(img)
        drawn = {
            k: v[first : first + len(img)]
            for k, v in draw_views(self.config.batch_size, self.config.views, draw).items()
        }
        return apply_views(img, drawn).contiguous(memory_format=torch.channels_last)

    def step(self, img: Tensor) -> dict[str, Tensor]:
        """One optimiser step on this process's share [N, 3, S, S] of a batch, in [-1, 1].

        Returns {'loss', 'top1' (share of images whose own key is the nearest), 'similarity'
        (cosine of query and own key), 'spread' (standard deviation of query components, times
        sqrt(D); near 0 when the network has collapsed)} as 0-d tensors.
        """
        cfg, moco = self.config, self.moco
        moco.train()
        for group in self.optimizer.param_groups:
            group['lr'] = learning_rate(cfg, self.step_count)
        moco.follow(key_momentum(cfg, self.step_count))
        view_q, view_k = self.views(img, 0), self.views(img, 1)
        with torch.no_grad(), self._autocast():
            k = moco.key(view_k)
        with self._autocast():
            q = moco.query(view_q)
        first = distributed.rank() * len(q)
        own = moco.enqueue(distributed.all_gather(k))[first : first + len(q)]
        losses, logits = info_nce(q, moco.queue, own, cfg.temperature)
        losses.mean().backward()
        distributed.average_gradients(self.parameters)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        return {
            'loss': losses.detach().mean(),
            'top1': (logits.argmax(1) == own).float().mean(),
            'similarity': (q.detach() * k).sum(1).mean(),
            'spread': q.detach().std(0).mean() * q.shape[1] ** 0.5,
        }

    # -- the run ----------------------------------------------------------------------------

    @property
    def progress(self) -> int:
        """Optimiser steps done."""
        return self.step_count

    def _sampler(self) -> StepSampler:
        cfg = self.config
        return StepSampler(
            self.n_images,
            batch_size=cfg.batch_size,
            seed=cfg.seed,
            start=self.step_count,
            mirror=False,
        )

    def advance(self) -> dict[str, Tensor]:
        """One step on the next batch."""
        if self._batches is None:
            self._batches = Batches(
                self.train_set, self._sampler(), device=self.device, workers=self.workers
            )
        return self.step(next(self._batches))

    def export(self) -> dict:
        """The content encoder file as it stands."""
        cfg = self.config
        return export_encoder(
            self.moco, arch=cfg.arch, input_size=cfg.input_size, small_stem=cfg.small_stem
        )

    def state(self) -> dict:
        """Everything a resumed run needs besides data and options."""
        return {
            'format': STATE_FORMAT,
            'step': self.step_count,
            'moco': self.moco.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'seed': self.config.seed,
        }

    def load_state(self, state: dict, *, source: str | Path = 'state') -> None:
        """Continues from `state()`; UserError naming `source` when it belongs to another run."""
        if (
            not isinstance(state, dict)
            or state.get('format') != STATE_FORMAT
            or 'moco' not in state
        ):
            raise UserError(f'{source} is not a state of a content encoder training')
        try:
            self.moco.load_state_dict(state['moco'])
            self.optimizer.load_state_dict(state['optimizer'])
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f'{source} does not fit the options of this run: {str(error).splitlines()[0]}'
            ) from error
        self.step_count, self._batches = state['step'], None

    def begin(self, run: TrainingRun) -> None:
        """Of a run that begins: photographs of the first batch with two views each."""
        if self.step_count or not distributed.is_main():
            return
        pictures = [self.train_set[item] for item in next(iter(self._sampler()))]
        img = from_uint8(torch.stack(pictures).to(self.device))
        shown = torch.stack([img, self.views(img, 0), self.views(img, 1)], 1)[:_SHEET_IMAGES]
        save_png(grid(shown.flatten(0, 1).cpu(), 6), run.folder / 'views.png')

    def facts(self) -> dict[str, float]:
        """The learning rate of the last step."""
        return {'learning_rate': learning_rate(self.config, self.step_count - 1)}

    def panels(self, names: set[str]) -> list[Panel]:
        """Loss, what the query knows, learning rate."""
        return [
            Panel(('loss',)),
            Panel(('top1', 'similarity', 'spread')),
            Panel(('learning_rate',)),
        ]

    def after_save(self, run: TrainingRun, *, stopping: bool) -> None:
        """The encoder as it stands, for the other scripts."""
        save_torch(run.folder / EXPORT_NAME, self.export())


def content_run(trainer: MocoTrainer, folder: Path, *, keep_states: int = 2) -> TrainingRun:
    """The run of a content encoder training, to `max_steps`.

    Leaves content_encoder.pt, checkpoints/, stats.jsonl, curves.png, views.png and logs/.
    """
    return TrainingRun(
        trainer,
        folder,
        Checkpoints(folder / 'checkpoints', keep=keep_states),
        length=trainer.config.max_steps,
        record_every=trainer.config.log_interval,
        save_every=trainer.config.save_interval,
    )
