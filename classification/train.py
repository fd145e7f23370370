"""The training of a grader on arrays of pictures: an epoch, a state, a result.

Shapes: n pictures, S side, C grades.
"""

import dataclasses
import hashlib
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Num, UInt8
from torch import Tensor, nn

from classification.augment import augment
from classification.grader import (
    GraderResult,
    build_grader,
    channel_statistics,
    forward,
    interpret,
    learning_rate,
    loss_function,
    metric_options,
    training_targets,
    unit_range,
)
from classification.metrics import grading_metrics
from classification.settings import Settings
from models.features.pretrained import weight_file
from training.checkpoints import Checkpoints
from training.curves import Panel
from training.run import Training, TrainingRun
from utils.errors import UserError
from utils.io import sha256_file
from utils.seeds import numpy_generator, torch_generator
from utils.transfer import send

_SAVE_SECONDS = 30.0  # epochs may be shorter than the writing of a state


def _rounds(n: int, settings: Settings) -> int:
    """How often an epoch goes through n pictures."""
    return max(1, -(-settings.min_steps_per_epoch * settings.batch_size // n))


def _epoch_order(
    classes: Int[np.ndarray, ' n'], settings: Settings, seed: int, epoch: int
) -> Int[np.ndarray, ' m']:
    """Indices of one epoch's pictures in training order, several rounds of small sets."""
    rng = numpy_generator(seed, 'epoch', epoch)
    n, rounds = len(classes), _rounds(len(classes), settings)
    if settings.sampling == 'instance':
        return np.concatenate([rng.permutation(n) for _ in range(rounds)])
    _, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
    weight = 1 / counts[inverse]
    return rng.choice(n, size=rounds * n, p=weight / weight.sum())


def _fingerprint(
    images: UInt8[np.ndarray, 'n 3 S S'],
    targets: Float[Tensor, 'n C'],
    settings: Settings,
    seed: int,
    imagenet_weights: str | Path | None,
) -> str:
    """Changes with anything that shapes the training."""
    weights = imagenet_weights and sha256_file(weight_file(imagenet_weights))
    digest = hashlib.sha256(
        repr((dataclasses.astuple(settings), seed, len(images), weights)).encode()
    )
    digest.update(targets.numpy().tobytes())
    for image in images:
        digest.update(zlib.crc32(np.ascontiguousarray(image).data).to_bytes(4, 'little'))
    return digest.hexdigest()


class GraderTraining(Training):
    """A grader in training. Everything random is a function of (seed, epoch).

    images: uint8 [n, 3, S, S] with S = settings.image_size (numpy or CPU tensor). targets: grades
    [n] (int) or shares [n, C] (soft labels, trained on as they are). val_images, val_labels:
    pictures and grades the best epoch is chosen on (highest quadratic kappa, then lowest loss);
    without them the last epoch is the best. history: one record per finished epoch.
    UserError for too few pictures, an unfit weight file, and fp16 without a GPU.
    """

    unit, means = 'epoch', False

    def __init__(
        self,
        images: UInt8[np.ndarray, 'n 3 S S'] | UInt8[Tensor, 'n 3 S S'],
        targets: Num[np.ndarray, ' n *C'],
        val_images: UInt8[np.ndarray, 'm 3 S S'] | None,
        val_labels: Int[np.ndarray, ' m'] | None,
        *,
        settings: Settings,
        seed: int,
        device: torch.device,
        imagenet_weights: str | Path | None,
    ) -> None:
        if len(images) < 2:
            raise UserError(f'{len(images)} training pictures are too few to train a grader')
        if tuple(images.shape[1:]) != (3, settings.image_size, settings.image_size):
            raise ValueError(
                f'train_images {tuple(images.shape)}, want [n, 3, '
                f'{settings.image_size}, {settings.image_size}]'
            )
        if settings.precision == 'fp16' and device.type != 'cuda':
            raise UserError('fp16 needs a GPU; use --precision bf16 or fp32')
        self.pictures = images.numpy() if torch.is_tensor(images) else images
        self.targets = training_targets(targets, settings)
        classes = np.asarray(targets)
        self.classes = classes.argmax(1) if classes.ndim == 2 else classes
        self.validation = val_images, val_labels
        self.settings, self.seed, self.device = settings, seed, device
        self.images = len(images) * _rounds(len(images), settings)
        mean, std = (
            channel_statistics(self.pictures)
            if settings.mean is None
            else (torch.tensor(settings.mean), torch.tensor(settings.std))
        )
        self.net = build_grader(settings, seed=seed, imagenet_weights=imagenet_weights)
        self.net.to(device)
        self.net.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
            weight_decay=settings.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == 'fp16')
        self.grader = GraderResult(
            self.net, settings, mean.to(device), std.to(device), device=device
        )
        self.mark = _fingerprint(self.pictures, self.targets, settings, seed, imagenet_weights)
        self.history: list[dict] = []
        self.best: dict[str, Any] = {'epoch': None, 'rank': None, 'state': None}

    @property
    def progress(self) -> int:
        """Epochs done."""
        return len(self.history)

    def advance(self) -> dict[str, float]:
        """One epoch; the scores of its record that are defined."""
        record = self.train_epoch()
        left_out = ('epoch', 'learning_rate')
        return {k: v for k, v in record.items() if k not in left_out and v is not None}

    def facts(self) -> dict[str, float]:
        """The learning rate of the last epoch."""
        return {'learning_rate': self.history[-1]['learning_rate']}

    def panels(self, names: set[str]) -> list[Panel]:
        """Losses, scores on the validation pictures, learning rate."""
        scores = tuple(sorted(names - {'loss', 'val_loss', 'learning_rate'}))
        groups = [('loss', 'val_loss'), scores, ('learning_rate',)]
        return [Panel(group) for group in groups if group]

    def train_epoch(self) -> dict:
        """Trains and validates one epoch; its record. UserError when the training diverges."""
        epoch, settings = len(self.history), self.settings
        rate = learning_rate(epoch, settings)
        for group in self.optimizer.param_groups:
            group['lr'] = rate
        record = {'epoch': epoch + 1, 'loss': self._pass(epoch), 'learning_rate': rate}
        rank, last = None, epoch + 1 == settings.epochs
        if self.validation[0] is not None and ((epoch + 1) % settings.eval_interval == 0 or last):
            raw = self.grader.raw_outputs(self.validation[0])
            if not raw.isfinite().all():
                raise _diverged(epoch)
            record |= _validation_scores(raw, np.asarray(self.validation[1]), settings)
            rank = [record['kappa'], -record['val_loss']]
        self.history.append(record)
        better = rank is not None and (self.best['rank'] is None or rank > self.best['rank'])
        if better or (self.validation[0] is None and last):
            self.best = {'epoch': epoch + 1, 'rank': rank, 'state': _cpu_state(self.net)}
        return record

    def _pass(self, epoch: int) -> float:
        """One pass over the pictures in full batches; the mean loss."""
        order = _epoch_order(self.classes, self.settings, self.seed, epoch)
        generator = torch_generator(self.seed, 'augment', epoch)
        size = min(self.settings.batch_size, len(self.pictures))
        total, n_steps = torch.zeros((), device=self.device), len(order) // size
        self.net.train()
        for step in range(n_steps):
            pick = order[step * size : (step + 1) * size]
            batch = augment(unit_range(self.pictures[pick], self.device), self.settings, generator)
            raw = forward(self.net, batch, self.grader.mean, self.grader.std, self.settings)
            loss = loss_function(raw, send(self.targets[pick], self.device), self.settings)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            total += loss.detach()
        mean = float(total) / n_steps
        if not math.isfinite(mean):
            raise _diverged(epoch)
        return mean

    def state(self) -> dict:
        """Everything needed to go on exactly where this epoch ended."""
        return {
            'fingerprint': self.mark,
            'net': _cpu_state(self.net),
            'optimiser': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(),
            'history': self.history,
            'best': self.best,
        }

    def load_state(self, state: dict, *, source: str | Path = 'state') -> None:
        """Takes over a saved `state()`; UserError for that of another training."""
        if not isinstance(state, dict) or state.get('fingerprint') != self.mark:
            raise UserError(
                f'{source} belongs to a training with other pictures, labels or '
                'settings; remove it or choose another output folder'
            )
        self.net.load_state_dict(state['net'])
        self.optimizer.load_state_dict(state['optimiser'])
        self.scaler.load_state_dict(state['scaler'])
        self.history, self.best = state['history'], state['best']

    def result(self) -> GraderResult:
        """The trained grader, which predicts with its best epoch."""
        return GraderResult(
            self.net,
            self.settings,
            self.grader.mean,
            self.grader.std,
            device=self.device,
            history=self.history,
            best_epoch=self.best['epoch'],
            best_state=self.best['state'],
            final_state=_cpu_state(self.net),
        ).use('best')


def train_grader(
    train_images: UInt8[np.ndarray, 'n 3 S S'] | UInt8[Tensor, 'n 3 S S'],
    train_targets: Num[np.ndarray, ' n *C'],
    val_images: UInt8[np.ndarray, 'm 3 S S'] | None = None,
    val_labels: Int[np.ndarray, ' m'] | None = None,
    *,
    settings: Settings | None = None,
    seed: int = 0,
    device: torch.device | str = 'cpu',
    imagenet_weights: str | Path | None = None,
    folder: Path | None = None,
    label: str = '',
    stopped: Callable[[], bool] = lambda: False,
) -> GraderResult | None:
    """Trains a grader (see GraderTraining); None where it was stopped before its end.

    settings: None takes the published ones. folder: keeps records, curves and checkpoint.pt,
    written after epochs at most every 30 seconds, and when the training is stopped; a run that
    goes on from it ends as an uninterrupted one. None keeps nothing. label: begins the status
    lines. stopped: asked after every epoch.
    """
    settings = settings or Settings()
    training = GraderTraining(
        train_images,
        train_targets,
        val_images,
        val_labels,
        settings=settings,
        seed=seed,
        device=torch.device(device),
        imagenet_weights=imagenet_weights,
    )
    if folder is None:
        while training.progress < settings.epochs:
            training.train_epoch()
        return training.result()
    run = TrainingRun(
        training,
        folder,
        grader_checkpoint(folder),
        length=settings.epochs,
        record_every=1,
        save_every=1,
        save_seconds=_SAVE_SECONDS,
        label=label,
    )
    run.resume()
    return training.result() if run.to_the_end(requested=stopped) else None


def grader_checkpoint(folder: Path) -> Checkpoints:
    """The one checkpoint of a grader in training, checkpoint.pt."""
    return Checkpoints(
        folder,
        'checkpoint',
        number=lambda epoch: '',
        what='grader checkpoint',
        hint='Remove it to start again.',
    )


def _cpu_state(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().cpu().clone() for k, v in net.state_dict().items()}


def _diverged(epoch: int) -> UserError:
    return UserError(
        f'training diverged in epoch {epoch + 1}; lower learning_rate in the configuration'
    )


def _validation_scores(
    raw: Float[Tensor, 'n C'], labels: Int[np.ndarray, ' n'], settings: Settings
) -> dict[str, float]:
    loss = loss_function(raw, training_targets(labels, settings), settings)
    found = interpret(raw, settings)
    values = grading_metrics(labels, found.grades, found.score, **metric_options(settings))
    return {
        'val_loss': float(loss),
        **{name: values[name] for name in ('kappa', 'accuracy', 'auc_referable')},
    }
