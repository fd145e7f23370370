"""The published attack: does this photograph belong to the group behind this release picture?

A ResNet-18 sees a photograph and a release picture stacked to six channels and answers with two
classes, other (0) and member (1). It is trained on groups whose members the attacker knows.

Shapes: n photographs and C release pictures, uint8 [*, 3, S, S]; group_of [n] is the index of a
photograph's release picture.
"""

import dataclasses
import logging
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, Shaped, UInt8
from torch import Tensor, nn

from models.loading import load_state, mismatch
from models.resnet import build_resnet, describe_resnet
from utils.errors import UserError
from utils.io import load_weights
from utils.logs import progress
from utils.seeds import derive, numpy_generator
from utils.transfer import send

log = logging.getLogger(__name__)

PRECISIONS = ('fp32', 'bf16')
PAIRS = ('mixed', 'published')


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """Settings of the attack's training; defaults are the published ones.

    An epoch is a permutation of the photographs, a step takes k * mult_batch of them.
    pairs='published': the group of the first is the anchor; all its members, and the other
    photographs of the step (members among them count again), are paired with its release picture.
    There batch normalisation can tell the members by their likeness to each other,
    without the picture, which fails on other people. pairs='mixed' is the stronger attack: every
    photograph drawn is paired with its own group's picture and with another's.
    """

    k: int = 5
    mult_batch: int = 5
    lr: float = 1e-4
    epochs: int = 20
    image_size: int = 224
    precision: str = 'fp32'
    pairs: str = 'mixed'
    seed: int = 0


class PairNet(nn.Module):
    """photos and pictures [N, 3, S, S] in [-1, 1] -> logits [N, 2]."""

    def __init__(self, image_size: int = 224) -> None:
        super().__init__()
        self.small_stem = image_size < 100
        self.body = build_resnet('resnet18', small_stem=self.small_stem)
        first = self.body.conv1
        self.body.conv1 = nn.Conv2d(
            6, 64, first.kernel_size, stride=2, padding=first.padding, bias=False
        )
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(512, 2)

    def forward(
        self, photos: Float[Tensor, 'n 3 S S'], pictures: Float[Tensor, 'n 3 S S']
    ) -> Float[Tensor, 'n 2']:
        return self.fc(self.drop(self.body(torch.cat([photos, pictures], 1))))


def build_pair_net(config: PairConfig, *, imagenet_weights: str | Path | None = None) -> PairNet:
    """An untrained PairNet, or one whose layers but the first come from a ResNet-18 file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, 'pair net'))
        net = PairNet(config.image_size)
    if imagenet_weights is not None:
        state = load_state(
            imagenet_weights,
            what='ImageNet weights',
            hint='Take resnet18 from the torchvision model page.',
        )
        own = net.body.state_dict()
        try:
            if describe_resnet(state)[0] != 'resnet18':
                raise KeyError('another architecture')
            net.body.load_state_dict(
                {k: own[k] if k.startswith('conv1.') else state[k] for k in own}
            )
        except (KeyError, IndexError, RuntimeError) as error:
            raise UserError(
                f'`imagenet_weights` {imagenet_weights}: not a ResNet-18 ({mismatch(error)})'
            ) from error
    return net


def standardisation(
    photos: UInt8[np.ndarray, 'n 3 S S'],
) -> tuple[Float[Tensor, '1 3 1 1'], Float[Tensor, '1 3 1 1']]:
    """Channel mean and standard deviation of photographs: two tensors [1, 3, 1, 1] in [-1, 1].

    photos: uint8 [n, 3, S, S]. Counted by value, photograph by photograph: exact, and in the
    memory of one of them.
    """
    counts = np.zeros((3, 256), np.int64)
    for photo in photos:
        counts += np.stack([np.bincount(channel.ravel(), minlength=256) for channel in photo])
    values = np.arange(256) / 127.5 - 1
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(1))
    return (
        torch.tensor(mean, dtype=torch.float32).reshape(1, 3, 1, 1),
        torch.tensor(std, dtype=torch.float32).reshape(1, 3, 1, 1),
    )


def step_pairs(
    group_of: Int[np.ndarray, ' n'],
    drawn: Int[np.ndarray, ' d'],
    pairs: str,
    rng: np.random.Generator,
) -> tuple[Int[np.ndarray, ' p'], Int[np.ndarray, ' p'], Shaped[np.ndarray, ' p']]:
    """One step's pairs: photographs [p], release pictures [p], membership [p].

    drawn: indices of the step's photographs. pairs: of PAIRS.
    """
    own = group_of[drawn]
    if pairs == 'mixed':
        groups = np.unique(group_of)
        place = np.searchsorted(groups, own) + rng.integers(1, len(groups), len(own))
        pictures = np.concatenate([own, groups[place % len(groups)]])
        photos = np.tile(drawn, 2)
    else:
        photos = np.concatenate([np.flatnonzero(group_of == own[0]), drawn[1:]])
        pictures = np.full(len(photos), own[0])
    return photos, pictures, (group_of[photos] == pictures).astype(np.int64)


class PairAttack:
    """Trains a PairNet on (photos, pictures, group_of) and scores pairs with it.

    mean, std [1, 3, 1, 1] standardise both inputs. UserError with fewer than two groups.
    """

    def __init__(
        self,
        config: PairConfig,
        *,
        mean: Float[Tensor, '1 3 1 1'],
        std: Float[Tensor, '1 3 1 1'],
        device: torch.device | str,
        imagenet_weights: str | Path | None = None,
    ) -> None:
        if config.precision not in PRECISIONS or config.pairs not in PAIRS:
            raise ValueError(
                f'precision={config.precision!r}, pairs={config.pairs!r}; want one '
                f'of {PRECISIONS} and one of {PAIRS}'
            )
        self.config, self.device = config, torch.device(device)
        self.mean, self.std = mean.to(self.device), std.to(self.device)
        self.net = build_pair_net(config, imagenet_weights=imagenet_weights).to(self.device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=config.lr)
        self.epoch = 0

    def _input(self, pictures: UInt8[np.ndarray, 'n 3 S S']) -> Float[Tensor, 'n 3 S S']:
        x = send(torch.from_numpy(np.ascontiguousarray(pictures)), self.device)
        return (x.float().div(127.5).sub(1) - self.mean) / self.std

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == 'bf16'
        )

    def train_epoch(
        self,
        photos: UInt8[np.ndarray, 'n 3 S S'],
        pictures: UInt8[np.ndarray, 'C 3 S S'],
        group_of: Int[np.ndarray, ' n'],
    ) -> dict:
        """One epoch of n / (k * mult_batch) steps; returns {'epoch', 'loss', 'accuracy'}."""
        if len(np.unique(group_of)) < 2:
            raise UserError('the attack needs at least two groups to train on')
        cfg = self.config
        rate = 0.5 * cfg.lr * (1 + math.cos(math.pi * self.epoch / cfg.epochs))
        for group in self.optimizer.param_groups:
            group['lr'] = rate
        rng = numpy_generator(cfg.seed, 'pairs', self.epoch)
        self.net.train()
        order, size = rng.permutation(len(group_of)), cfg.k * cfg.mult_batch
        steps = max(1, len(order) // size)
        total = torch.zeros(2, device=self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == 'cuda' else []):
            torch.manual_seed(derive(cfg.seed, 'dropout', self.epoch))
            for step in range(steps):
                rows, shown, same = step_pairs(
                    group_of, order[step * size :][:size], cfg.pairs, rng
                )
                truth = send(torch.from_numpy(same), self.device)
                with self._autocast():
                    logits = self.net(
                        self._input(photos[rows]), self._input(pictures[shown])
                    ).float()
                loss = F.cross_entropy(logits, truth)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                right = (logits.argmax(1) == truth).float().mean()
                total += torch.stack([loss.detach(), right])
        self.epoch += 1
        loss, accuracy = (total / steps).tolist()
        if not math.isfinite(loss):
            raise UserError(f'the attack diverged in epoch {self.epoch}; lower `lr`')
        return {'epoch': self.epoch, 'loss': loss, 'accuracy': accuracy}

    @torch.no_grad()
    def scores(
        self,
        photos: UInt8[np.ndarray, 'n 3 S S'],
        pictures: UInt8[np.ndarray, 'C 3 S S'],
        *,
        batch_size: int = 256,
    ) -> Float32[np.ndarray, 'C n 2']:
        """Softmax scores float32 [C, n, 2] of every release picture with every photograph."""
        self.net.eval()
        found = np.empty((len(pictures), len(photos), 2), np.float32)
        # Of the photographs, only one batch is on the device at a time.
        for start in progress(range(0, len(photos), batch_size), desc='scoring', unit='batch'):
            batch = self._input(photos[start : start + batch_size])
            for c in range(len(pictures)):
                picture = self._input(pictures[c : c + 1])
                with self._autocast():
                    logits = self.net(batch, picture.expand(len(batch), -1, -1, -1)).float()
                found[c, start : start + len(batch)] = logits.softmax(1).cpu().numpy()
        return found

    def state(self) -> dict:
        """Everything needed to go on exactly where this epoch ended."""
        return {
            'epoch': self.epoch,
            'config': dataclasses.asdict(self.config),
            'net': {k: v.cpu() for k, v in self.net.state_dict().items()},
            'optimizer': self.optimizer.state_dict(),
            'mean': self.mean.cpu(),
            'std': self.std.cpu(),
        }

    def load_state(self, state: dict) -> None:
        """Takes over a `state()` of the same configuration."""
        self.net.load_state_dict(state['net'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.epoch = state['epoch']


def load_pair_attack(path: str | Path, device: torch.device | str) -> PairAttack:
    """A trained PairAttack from a checkpoint of MIA_train.py; UserError when it is none."""
    state = load_weights(path, what='attack checkpoint', hint='Train one with MIA/MIA_train.py.')
    if not isinstance(state, dict) or not {'net', 'config', 'mean', 'std'} <= state.keys():
        raise UserError(f'{path} is not a checkpoint of MIA/MIA_train.py')
    try:
        attack = PairAttack(
            PairConfig(**state['config']), mean=state['mean'], std=state['std'], device=device
        )
        attack.net.load_state_dict(state['net'])
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f'{path} is not a checkpoint of MIA/MIA_train.py ({mismatch(error)})'
        ) from error
    return attack
