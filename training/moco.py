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
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader

from datasets.images_dataset import StepSampler
from models.features.content import content_checkpoint
from models.resnet import build_resnet
from training.checkpoints import latest_checkpoint, save_checkpoint
from training.run import Stopping
from training.sync_batchnorm import share_batch_statistics
from utils import distributed
from utils.errors import UserError
from utils.images import from_uint8, grid, save_png
from utils.io import atomic_path, save_torch
from utils.logs import ScalarLog, read_jsonl
from utils.seeds import derive, torch_generator
from utils.signals import leave_signals_to_parent
from utils.transfer import send_together

log = logging.getLogger(__name__)

STATE_FORMAT = 1
STATE_PREFIX = 'state'
EXPORT_NAME = 'content_encoder.pt'
PROJECTION_DIM = 128
MAX_QUEUE = 65536  # published
_LUMA = (0.299, 0.587, 0.114)
_SHEET_IMAGES = 12


# Views --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ViewConfig:
    """How far a view may differ from its photograph.

    min_area: smallest crop, as a share of the picture's area. rotation: largest angle, degrees.
    mirror, upend: probability of a flip left-right, up-down. brightness, contrast, saturation:
    factors are drawn from [1 - v, 1 + v]. hue: largest rotation of the hue, in turns. blur:
    largest sigma of a Gaussian, as a share of the side; half of the views are blurred.
    """

    min_area: float = 0.6
    rotation: float = 20.0
    mirror: float = 0.5
    upend: float = 0.0
    brightness: float = 0.15
    contrast: float = 0.15
    saturation: float = 0.1
    hue: float = 0.01
    blur: float = 0.012


def draw_views(n, config, generator):
    """Random transformations of n pictures, for `apply_views`.

    {'grid': sampling positions [n, 2, 3], 'color': matrices [n, 3, 3], 'contrast': factors [n],
    'blur': sigmas [n] as shares of the side}.
    """

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator)

    def flips(probability):
        return 1 - 2 * (torch.rand(n, generator=generator) < probability).float()

    area, aspect = uniform(config.min_area, 1.0), uniform(math.log(4 / 5), math.log(5 / 4)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x, y = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    angle = uniform(-config.rotation, config.rotation) * (math.pi / 180)
    sx, sy = width * flips(config.mirror), height * flips(config.upend)
    c, s = angle.cos(), angle.sin()
    grids = torch.stack(
        [torch.stack([c * sx, -s * sy, x], 1), torch.stack([s * sx, c * sy, y], 1)], 1
    )
    color = _color_matrices(
        uniform(1 - config.brightness, 1 + config.brightness),
        uniform(1 - config.saturation, 1 + config.saturation),
        uniform(-config.hue, config.hue) * (2 * math.pi),
    )
    blur = uniform(0, config.blur) * (torch.rand(n, generator=generator) < 0.5)
    return {
        'grid': grids,
        'color': color,
        'blur': blur,
        'contrast': uniform(1 - config.contrast, 1 + config.contrast),
    }


def _color_matrices(brightness, saturation, hue):
    """[n, 3, 3]: rotation by `hue` about the grey axis, saturation, then brightness."""
    n = len(hue)
    eye, ones = torch.eye(3).expand(n, 3, 3), torch.full((3, 3), 1 / 3)
    axis = torch.full((3,), 3**-0.5)
    cross = torch.tensor([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    c, s = hue.cos()[:, None, None], hue.sin()[:, None, None]
    rotation = c * eye + s * cross + (1 - c) * ones  # Rodrigues
    grey = torch.tensor(_LUMA).expand(3, 3)
    v = saturation[:, None, None]
    return brightness[:, None, None] * ((v * eye + (1 - v) * grey) @ rotation)


def apply_views(img, views):
    """img [N, 3, S, S] in [-1, 1] -> views of the same shape and range.

    What a rotation brings in from outside is black, as around the field of view.
    """
    n, _, size, _ = img.shape
    views = send_together(views, img.device)
    x = img.add(1).mul(0.5)
    where = F.affine_grid(views['grid'], list(img.shape), align_corners=False)
    x = F.grid_sample(x, where, mode='bilinear', padding_mode='zeros', align_corners=False)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * views['contrast'][:, None, None, None]
    x = (views['color'] @ x.flatten(2)).view_as(x)
    blur = _blur_matrices(views['blur'] * size, size)[:, None]
    x = blur @ x @ blur.transpose(2, 3)
    return x.clamp(0, 1).mul(2).sub(1)


def _blur_matrices(sigma, size):
    """sigma [n] in pixels -> [n, size, size] whose rows are Gaussians that sum to 1."""
    at = torch.arange(size, device=sigma.device, dtype=torch.float32)
    distance = (at[:, None] - at).square()
    weight = torch.exp(-distance / (2 * sigma.clamp(min=1e-2).square())[:, None, None])
    return weight / weight.sum(2, keepdim=True)


# Networks -----------------------------------------------------------------------------------------


def info_nce(q, keys, own, temperature):
    """InfoNCE: unit vectors q [N, D] and keys [K, D] -> (losses [N], logits [N, K]).

    own [N]: which key is that of the row's own image; all others are negatives.
    """
    logits = q @ keys.T / temperature
    return F.cross_entropy(logits, own, reduction='none'), logits


class _Network(nn.Module):
    """A ResNet with a two-layer projection head: [N, 3, S, S] -> unit vectors [N, D]."""

    def __init__(self, arch, *, small_stem, dim=PROJECTION_DIM):
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

    def forward(self, img):
        return F.normalize(self.head(self.backbone(img)).float(), dim=1)


class MoCo(nn.Module):
    """Query network, key network that follows it, and the queue of earlier keys.

    The key network stays in eval mode (see the module's note). queue_size must be a multiple of
    the batch.
    """

    def __init__(self, arch, *, small_stem, queue_size, generator):
        super().__init__()
        self.query = _Network(arch, small_stem=small_stem)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        queue = torch.randn(queue_size, PROJECTION_DIM, generator=generator)
        self.register_buffer('queue', F.normalize(queue, dim=1))
        self.register_buffer('queue_at', torch.zeros((), dtype=torch.int64))

    def train(self, mode=True):
        super().train(mode)
        self.key.train(False)
        return self

    @torch.no_grad()
    def follow(self, momentum):
        """key <- momentum * key + (1 - momentum) * query, running statistics included."""
        pairs = zip(self.key.state_dict().values(), self.query.state_dict().values())
        for k, q in pairs:
            if k.dtype.is_floating_point:
                k.lerp_(q, 1 - momentum)
            else:
                k.copy_(q)

    @torch.no_grad()
    def enqueue(self, keys):
        """Replaces the oldest keys by `keys` [B, D], B a divisor of K; returns their places [B]."""
        places = self.queue_at + torch.arange(len(keys), device=keys.device)
        self.queue.index_copy_(0, places, keys)
        self.queue_at.add_(len(keys)).remainder_(len(self.queue))
        return places


def export_encoder(moco, *, arch, input_size, small_stem):
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


# Training -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MocoConfig:
    """What shapes a content encoder training; intervals in optimiser steps.

    batch_size counts the images of one step over all processes. learning_rate is for batches of
    256 and scaled with the batch; it follows half a cosine to 0 at max_steps after
    `warmup_steps` of linear rise. queue_size None: half of the training images, at most 65536
    (an image's own earlier keys would be wrong negatives).
    """

    arch: str = 'resnet50'
    small_stem: bool = False
    input_size: int = 224
    batch_size: int = 256
    queue_size: int | None = None
    max_steps: int = 20_000
    warmup_steps: int = 0
    learning_rate: float = 0.03
    sgd_momentum: float = 0.9
    weight_decay: float = 1e-4
    key_momentum: float = 0.999
    temperature: float = 0.2
    amp: str = 'no'
    log_interval: int = 50
    save_interval: int = 1000
    seed: int = 0
    views: ViewConfig = ViewConfig()


def automatic_queue(n_images, batch_size):
    """Half of the images, at most 65536, in whole batches (at least one)."""
    return max(min(MAX_QUEUE, n_images // 2) // batch_size, 1) * batch_size


def learning_rate(config, step):
    """The rate of optimiser step `step` (counted from 0)."""
    peak = config.learning_rate * config.batch_size / 256
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))


def key_momentum(config, step):
    """The share of itself the key network keeps at `step`: rises from 0.1 to the set value."""
    return min(config.key_momentum, (1 + step) / (10 + step))


class MocoTrainer:
    """Trains a MoCo on `train_set` (items (index, mirrored) -> uint8 [3, S, S]).

    Raises UserError when there are fewer images than a batch, or the batch cannot be divided
    among the processes, or does not divide the queue.
    """

    def __init__(self, train_set, config, *, run_dir, device, workers=0, keep_states=2):
        self.train_set, self.config = train_set, config
        self.run_dir, self.device = Path(run_dir), torch.device(device)
        self.workers, self.keep_states, self.step_count = workers, keep_states, 0
        self.queue_size = config.queue_size or automatic_queue(len(train_set), config.batch_size)
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
            share_batch_statistics(moco.query)
        self.moco = moco.to(self.device, memory_format=torch.channels_last)
        self.parameters = [p for p in self.moco.query.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=0.0, momentum=config.sgd_momentum, weight_decay=config.weight_decay
        )

    def _check(self):
        cfg, world = self.config, distributed.world_size()
        if len(self.train_set) < cfg.batch_size:
            raise UserError(
                f'{len(self.train_set)} training images are fewer than one batch of '
                f'{cfg.batch_size}; lower --batch_size or add images'
            )
        if cfg.batch_size % world:
            raise UserError(
                f'--batch_size {cfg.batch_size} cannot be divided among {world} processes'
            )
        if cfg.batch_size // world < 2:
            raise UserError('batch normalisation needs 2 images per process; raise --batch_size')
        if self.queue_size % cfg.batch_size:
            raise UserError(
                f'--queue_size {self.queue_size} is no multiple of --batch_size {cfg.batch_size}'
            )

    def _autocast(self):
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.config.amp == 'bf16'
        )

    def views(self, img, number):
        """View `number` (0 or 1) of this process's share img [N, 3, S, S] of the batch."""
        draw = torch_generator(self.config.seed, 'view', self.step_count, number)
        first = distributed.rank() * len(img)
        drawn = {
            k: v[first : first + len(img)]
            for k, v in draw_views(self.config.batch_size, self.config.views, draw).items()
        }
        return apply_views(img, drawn).contiguous(memory_format=torch.channels_last)

    def step(self, img):
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

    # -- checkpoints ------------------------------------------------------------------------

    def export(self):
        """The content encoder file as it stands."""
        cfg = self.config
        return export_encoder(
            self.moco, arch=cfg.arch, input_size=cfg.input_size, small_stem=cfg.small_stem
        )

    def state(self):
        """Everything a resumed run needs besides data and options."""
        return {
            'format': STATE_FORMAT,
            'step': self.step_count,
            'moco': self.moco.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'seed': self.config.seed,
        }

    def load_state(self, state, *, source='state'):
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
        self.step_count = state['step']

    def resume(self):
        """Loads the newest readable state of the run folder; whether there was one."""
        found = latest_checkpoint(self._checkpoints, STATE_PREFIX)
        if found is None:
            return False
        self.load_state(found[0], source=str(found[1]))
        log.info('resuming from %s at step %d', found[1], self.step_count)
        return True

    @property
    def _checkpoints(self):
        return self.run_dir / 'checkpoints'

    # -- the run ----------------------------------------------------------------------------

    def train(
        self, *, max_minutes: float | None = None, should_stop: Callable[[], bool] | None = None
    ) -> bool:
        """Runs to `max_steps`, or stops in good order with a saved state.

        It stops after `max_minutes`, or when `should_stop` says so in any process.
        Leaves content_encoder.pt, checkpoints/, stats.jsonl, curves.png, views.png (photographs
        with two views each) and logs/ in the run folder. Returns True when all steps are done.
        Raises UserError when the loss is not finite.
        """
        cfg, main = self.config, distributed.is_main()
        scalars = ScalarLog(self.run_dir, resume_step=self.step_count or -1) if main else None
        asked = Stopping(self.device, requested=should_stop, max_minutes=max_minutes)
        tick, tick_step, window = time.monotonic(), self.step_count, []
        for u8 in self._loader():
            img = from_uint8(u8.to(self.device, non_blocking=True))
            if main and self.step_count == 0:
                self._views_sheet(img)
            window.append(torch.stack(list((values := self.step(img)).values())))
            step, last = self.step_count, self.step_count == cfg.max_steps
            stopping = asked()
            saving = last or stopping or step % cfg.save_interval == 0
            if saving or step % cfg.log_interval == 0:
                means = distributed.all_reduce_mean(torch.stack(window).mean(0)).tolist()
                numbers = dict(zip(values, means))
                if not math.isfinite(numbers['loss']):
                    raise UserError(
                        f'training diverged: the loss is {numbers["loss"]} at step '
                        f'{step}; lower --learning_rate, or use --amp no'
                    )
                rate = (step - tick_step) * cfg.batch_size / (time.monotonic() - tick)
                if main:
                    left = (cfg.max_steps - step) * cfg.batch_size / rate / 60
                    scalars.log(
                        step,
                        {
                            **numbers,
                            'learning_rate': learning_rate(cfg, step - 1),
                            'images_per_second': rate,
                        },
                    )
                    log.info(
                        'step %d/%d  %s  %.1f img/s  %.0f min left',
                        step,
                        cfg.max_steps,
                        '  '.join(f'{k} {v:.4f}' for k, v in numbers.items()),
                        rate,
                        left,
                    )
                tick, tick_step, window = time.monotonic(), step, []
            if main and saving:
                save_checkpoint(
                    self._checkpoints,
                    step,
                    self.state(),
                    prefix=STATE_PREFIX,
                    keep=self.keep_states,
                )
                save_torch(self.run_dir / EXPORT_NAME, self.export())
                plot_curves(self.run_dir)
            if stopping:
                break
        if main:
            scalars.close()
        distributed.barrier()
        return self.step_count >= cfg.max_steps

    def _loader(self):
        cfg, rank = self.config, distributed.rank()
        share = cfg.batch_size // distributed.world_size()
        sampler = StepSampler(
            len(self.train_set),
            batch_size=cfg.batch_size,
            seed=cfg.seed,
            start=self.step_count,
            stop=cfg.max_steps,
            mirror=False,
            part=(rank * share, (rank + 1) * share),
        )
        return DataLoader(
            self.train_set,
            batch_sampler=sampler,
            num_workers=self.workers,
            pin_memory=self.device.type == 'cuda',
            worker_init_fn=leave_signals_to_parent,
        )

    def _views_sheet(self, img):
        shown = torch.stack([img, self.views(img, 0), self.views(img, 1)], 1)[:_SHEET_IMAGES]
        save_png(grid(shown.flatten(0, 1).cpu(), 6), self.run_dir / 'views.png')


def plot_curves(run_dir):
    """Draws loss, accuracy and learning rate of stats.jsonl to curves.png."""
    records = read_jsonl(Path(run_dir) / 'stats.jsonl')
    figure = Figure(figsize=(12, 3.5), layout='constrained')
    panels = (('loss',), ('top1', 'similarity', 'spread'), ('learning_rate',))
    for axes, names in zip(figure.subplots(1, len(panels)), panels):
        for name in names:
            axes.plot([r['step'] for r in records], [r[name] for r in records], label=name)
        axes.set(xlabel='optimiser steps')
        axes.legend()
    with atomic_path(Path(run_dir) / 'curves.png') as temp:
        figure.savefig(temp, format='png')
