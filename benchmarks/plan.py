"""What a GPU has to do for a generator, an encoder and a release, and how long that may take.

    python benchmarks/plan.py --size=512

Operations, bytes and memory are counted, without computing anything: the steps run on tensors that
have a shape and no numbers, in bfloat16 where there is a choice, by the PyTorch path. Operations
are those of convolutions and matrix products. Bytes are what every operation reads and writes;
fused kernels need fewer. Memory is what is kept for the backward pass. Hours are estimates, nothing
measured: half of the card's matrix rate (float32 without TF32), 0.8 of its bandwidth, one after the
other, and no less than 5 microseconds for each operation that is launched.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from anonymization.optimize import Group, GroupOptimizer, OptimizeConfig
from benchmarks.anonymise import one_step
from benchmarks.sizes import ENCODER_SIZE
from benchmarks.train_step import RandomImages, encoder_step
from models.encoders import build_encoder
from models.features.content import content_network_from_state
from models.features.style import VGGStyle
from models.psp import PSP, FrozenPSP, invert
from models.stylegan2 import Generator
from training.stylegan2_config import make_config
from training.stylegan2_loop import Draws, Trainer
from utils.cli import parser_of, power_of_two, run

K, STEPS, REFINEMENTS = 5, 100, 5  # of the published release


class Card(NamedTuple):
    """Peak rates by its maker: bfloat16 and float32 operations, and bytes, a second."""

    half: float
    single: float
    bandwidth: float


CARDS = {'H100': Card(989e12, 67e12, 3.35e12), 'A100': Card(312e12, 19.5e12, 2.04e12)}
_RATE, _BANDWIDTH, _LAUNCH = 0.5, 0.8, 5e-6


class Work(NamedTuple):
    """Of some images: operations in half and in single precision, bytes, launches, bytes kept."""

    half: float
    single: float
    bytes: float
    launches: float
    kept: float

    def times(self, n: float) -> 'Work':
        """`n` times the work, one after the other: the memory stays."""
        each = (self.half, self.single, self.bytes, self.launches)
        return Work._make([*(n * value for value in each), self.kept])

    def seconds(self, card: Card) -> float:
        """The estimate of the module's head."""
        busy = (self.half / card.half + self.single / card.single) / _RATE
        return max(busy + self.bytes / card.bandwidth / _BANDWIDTH, self.launches * _LAUNCH)


class Counting(TorchDispatchMode):
    """Counts the work of what runs within it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.kept: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if formula is not None:
            kind = 'half' if args[0].element_size() < 4 else 'single'
            self.found[kind] += formula(*args, **(kwargs or {}), out_val=out)
        views = all(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not views and func.namespace != 'prim':  # asking for a tensor's device is no work
            self.found['bytes'] += sum(t.numel() * t.element_size() for t in tensors)
            self.found['launches'] += 1
        return out

    def keep(self, tensor: Tensor) -> Tensor:
        """Notes a tensor that is kept for the backward pass."""
        storage = tensor.untyped_storage()
        self.kept[storage._cdata] = storage.nbytes()
        return tensor

    def work(self) -> Work:
        counts = (float(self.found[name]) for name in Work._fields[:4])
        return Work._make([*counts, float(sum(self.kept.values()))])


def count(function: Callable[[], object]) -> Work:
    """The work of one call."""
    counting, hooks = Counting(), torch.autograd.graph.saved_tensors_hooks
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        hooks(counting.keep, lambda tensor: tensor),
        counting,
    ):
        function()
    return counting.work()


class _Training(Trainer):
    """Without photographs, augmentation and style mixing, whose draws need numbers."""

    def _next_reals(self) -> Tensor:
        return torch.empty(self.config.batch_gpu, 3, self.config.size, self.config.size)

    def _latents(self, draw: Draws, n: int) -> Tensor:
        z = torch.empty(n, self.config.style_dim)
        return self.g.broadcast(self.g.mapping(z))


def generator_work(size: int) -> tuple[Work, int]:
    """A step of the generator's training, the penalties in their shares, and its images."""
    config = make_config('auto', size, 1)
    trainer = _Training(RandomImages(1, 4), config, device='cpu', augment='noaug', precision='bf16')
    found = []
    for number in (0, 4, 1):  # with both penalties, with path lengths, plain
        trainer.n_steps = number
        found.append(count(trainer.step))
    shares = (1 / 16, 3 / 16, 12 / 16)
    mean = [sum(s * value for s, value in zip(shares, values)) for values in zip(*found)]
    return Work._make([*mean[:4], max(work.kept for work in found)]), config.batch


def encoder_work(size: int) -> tuple[Work, int]:
    """A step of the encoder's training, and its images."""
    opts = argparse.Namespace(
        size=size, encoder_size=ENCODER_SIZE, channels=512, batch=None, precision='bf16'
    )
    step, batch, _ = encoder_step(opts, torch.device('cpu'))
    return count(step), batch


def release_work(size: int) -> tuple[Work, Work]:
    """The inversion of a photograph, and a step of the optimisation of a group."""
    generator = Generator(size)
    encoder = build_encoder(
        'ResNetBackboneEncoder', n_styles=generator.n_latent, input_size=ENCODER_SIZE
    )
    average = torch.zeros(generator.n_latent, 512)
    psp = PSP(encoder, generator, average, ENCODER_SIZE).eval().requires_grad_(False)
    content = content_network_from_state(
        torchvision.models.resnet50(weights=None).state_dict(), source='no weights'
    )
    frozen = FrozenPSP(psp, torch.bfloat16)
    x = torch.empty(1, 3, ENCODER_SIZE, ENCODER_SIZE)
    inversion = count(lambda: invert(frozen, x, n_iters=REFINEMENTS))
    config = OptimizeConfig(n_steps=STEPS)
    engine = GroupOptimizer(psp, content, VGGStyle(), config=config, device='cpu', precision='bf16')
    ws = average.expand(K, -1, -1)
    photos = torch.empty(K, 3, ENCODER_SIZE, ENCODER_SIZE, dtype=torch.uint8)
    targets = engine.targets([Group(ws, photos, torch.empty(K, 2048))])
    return inversion, count(lambda: one_step(engine, ws[:1], targets))


def rows(size: int) -> list[tuple[str, Work, float]]:
    """(what, work per image or group, how many of them the hours are for)."""
    generator, n_generator = generator_work(size)
    encoder, n_encoder = encoder_work(size)
    inversion, step = release_work(size)
    # 32 images or groups at a time: launches are shared.
    shared = (work._replace(launches=work.launches / 32) for work in (inversion, step.times(STEPS)))
    inversion, optimisation = shared
    return [
        ('generator, 1,000 kimg', _per(generator, n_generator), 1e6),
        (f'encoder, 100,000 steps of {n_encoder}', _per(encoder, n_encoder), 1e5 * n_encoder),
        ('inversion of 5,000 photographs', inversion, 5000),
        ('optimisation of 1,000 groups', optimisation, 1000),
    ]


def _per(work: Work, n: int) -> Work:
    return Work(*(value / n for value in work))


def build_parser() -> argparse.ArgumentParser:
    p = parser_of(__doc__)
    p.add_argument('--size', type=power_of_two, default=512, metavar='PX', help='of the pictures')
    return p


def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    cards = ''.join(f' {name}, hours (estimate) |' for name in CARDS)
    print(f'| {opts.size} px, each | TFLOP | of them float32 | GB | launches | GB kept |{cards}')
    print('|---|' + '---|' * (5 + len(CARDS)))
    for what, work, n in rows(opts.size):
        total = work.half + work.single
        hours = ''.join(f' {_round(n * work.seconds(card) / 3600)} |' for card in CARDS.values())
        print(
            f'| {what} | {total / 1e12:.2f} | {work.single / total:.0%} | {work.bytes / 1e9:.1f} | '
            f'{work.launches:,.0f} | {work.kept / 1e9:.2f} |{hours}'
        )
    return 0


def _round(hours: float) -> str:
    """Two digits: more would promise more than an estimate keeps."""
    digits = max(0, 1 - math.floor(math.log10(hours)))
    return f'{hours:.{digits}f}'


if __name__ == '__main__':
    run(main)
