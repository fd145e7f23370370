"""Groups per minute: the published way of computing against this project's, in one run.

    python benchmarks/anonymise.py --size=256 --precision=fp32 --markdown
    python benchmarks/anonymise.py --size=256 --precision=bf16 --steps=100    # not extrapolated
    python benchmarks/anonymise.py --size=256 --against=FOLDER    # another checkout's code and ours

Both sides get the same networks (published sizes, random weights), photographs, losses and
settings. Each side's steps are timed over --steps steps of an optimisation of that length, the
first left out as warm-up, and extrapolated to --n_steps. The two inversions of the published way
do the same work; one is timed and counted twice. Loading files, grouping and writing pictures are
left out on both sides. The floor is the operations of this project's way, as counted by
torch.utils.flop_counter, over the matrix rate measured in the same run. TF32 is on for both sides
or for none. Losses are compared from the latents and reconstructions of the published way; how far
the latents of both sides are apart is given by itself. Exit code 1 when the losses disagree.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from anonymization.optimize import (
    ACTIVATIONS,
    PRECISIONS,
    Group,
    GroupOptimizer,
    OptimizeConfig,
    Targets,
    matmul_precision,
)
from benchmarks.against import add_against, print_comparison
from benchmarks.machine import OperationCount, clock, describe, matrix_rate, print_rows
from benchmarks.published import PublishedWay, synthesis
from benchmarks.sizes import ENCODER_SIZE, add_sizes, channels_up_to
from models.encoders import build_encoder
from models.features.content import ContentNetwork, content_network_from_state
from models.features.style import VGGStyle
from models.psp import PSP, FrozenPSP, invert
from models.stylegan2 import Generator
from utils.cli import parser_of, positive_int, resolve_device, run
from utils.images import from_uint8

# Relative differences of the total loss allowed over the first steps and at the last one. In low
# precision the beginning is not judged: the best-matching patch of the style loss is a choice among
# near equals, so the loss jumps where the pictures hardly differ.
AGREEMENT = {'fp32': (1e-3, 0.01), 'tf32': (float('inf'), 0.05), 'bf16': (float('inf'), 0.15)}
FIRST_STEPS = 3

Found = tuple[Tensor, Tensor]  # latents and reconstructions
Result = TypeVar('Result')


def add_group_sizes(p: argparse.ArgumentParser) -> None:
    """Adds the sizes of `random_networks` and of the groups."""
    add_sizes(p)
    p.add_argument('--k', type=positive_int, default=5, metavar='INT', help='group size')


def build_parser() -> argparse.ArgumentParser:
    p = parser_of(__doc__)
    add_group_sizes(p)
    p.add_argument(
        '--groups',
        type=positive_int,
        default=1,
        metavar='INT',
        help='groups anonymised by this project',
    )
    p.add_argument(
        '--group_batch',
        type=positive_int,
        metavar='INT',
        help='of them optimised together (default: all)',
    )
    p.add_argument(
        '--steps', type=positive_int, default=6, metavar='INT', help='timed steps of each side'
    )
    p.add_argument(
        '--n_steps',
        type=positive_int,
        default=100,
        metavar='INT',
        help='steps of a group, extrapolated to',
    )
    p.add_argument(
        '--batch_size',
        type=positive_int,
        default=8,
        metavar='INT',
        help='photographs inverted together by this project',
    )
    p.add_argument('--precision', choices=PRECISIONS, default='fp32', help='of this project')
    p.add_argument('--device', default='auto', help='cpu, cuda, cuda:N or auto')
    p.add_argument('--seed', type=int, default=0, help='of weights and photographs')
    p.add_argument('--markdown', action='store_true', help='print a Markdown table')
    add_against(p)
    return p


def random_networks(
    size: int, seed: int, side: int = ENCODER_SIZE, channels: int = 512
) -> tuple[PSP, ContentNetwork, VGGStyle]:
    """(PSP, content network, style network): published sizes, random weights.

    size, side: of generated pictures and of those the encoder sees; channels: most of a map.
    Batch statistics are those of random pictures, and latents and generated pictures are scaled
    to a usual spread, so that activations and losses have ordinary sizes.
    """
    torch.manual_seed(seed)
    generator = Generator(size, channels=channels_up_to(size, channels))
    with torch.no_grad():
        for layer in (generator.conv1, *generator.convs):
            layer.noise.weight.fill_(0.1)
        spread = generator(torch.randn(4, 512)).std()
        for layer in (generator.to_rgb1, *generator.to_rgbs):
            layer.conv.weight.mul_(0.5 / spread)
    pictures = from_uint8(photographs(4, seed + 1, side))
    encoder = build_encoder('ResNetBackboneEncoder', n_styles=generator.n_latent, input_size=side)
    offsets = set_statistics(encoder, torch.cat([pictures, pictures.flip(0)], 1))
    with torch.no_grad():
        for style in encoder.get_submodule('styles').children():
            style.get_parameter('linear.weight').mul_(0.2 / offsets.std())
    resnet = torchvision.models.resnet50(weights=None)
    set_statistics(resnet, pictures[..., :224, :224])
    psp = PSP(encoder, generator, generator.mean_latent(1000), side)
    content = content_network_from_state(resnet.state_dict(), source='random weights')
    return psp.eval().requires_grad_(False), content, VGGStyle()


@torch.no_grad()
def set_statistics(net: nn.Module, x: Float[Tensor, 'N C H W']) -> Float[Tensor, 'N ...']:
    """Sets the running statistics of batch normalisation to those of x; returns net(x)."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    return net.train()(x)


def photographs(n: int, seed: int, side: int = ENCODER_SIZE) -> UInt8[Tensor, 'n 3 S S']:
    """[n, 3, S, S] uint8: coarse coloured shapes and a little grain."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 8, 8, generator=draw)
    picture = F.interpolate(coarse, size=side, mode='bicubic', align_corners=False)
    grain = torch.randn(picture.shape, generator=draw)
    return (255 * picture + 8 * grain).clamp(0, 255).to(torch.uint8)


class Clock:
    """Seconds of named phases, after waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def time(self, name: str, function: Callable[[], Result]) -> Result:
        begin = clock(self.device)
        result = function()
        self.seconds[name] = clock(self.device) - begin
        return result


def run_published(
    psp: PSP,
    content: ContentNetwork,
    style: VGGStyle,
    photos: UInt8[Tensor, 'n 3 S S'],
    config: OptimizeConfig,
    opts: argparse.Namespace,
    device: torch.device,
) -> tuple[dict[str, float], Float[Tensor, 'steps 2'], Found]:
    """(seconds per phase, losses [steps, 2], (latents, reconstructions)) of the first group."""
    way, clock = PublishedWay(psp, content, style, config), Clock(device)
    x = from_uint8(photos[: opts.k].to(device))
    if device.type == 'cuda':
        way.invert(x, 1)  # loads kernels
    ws, recon = clock.time('first inversion', lambda: way.invert(x))
    clock.seconds['second inversion'] = clock.seconds['first inversion']
    features = clock.time('targets', lambda: way.targets(x))
    losses, seconds = way.steps(ws, recon, features, opts.steps)
    clock.seconds['steps'] = per_step(seconds) * opts.n_steps
    with torch.no_grad():
        clock.time('final picture', lambda: synthesis(psp.decoder, ws[:1]))
    return clock.seconds, losses, (ws, recon)


def run_ours(
    psp: PSP,
    content: ContentNetwork,
    style: VGGStyle,
    photos: UInt8[Tensor, 'n 3 S S'],
    config: OptimizeConfig,
    opts: argparse.Namespace,
    device: torch.device,
    found_before: Found,
) -> tuple[dict[str, float], dict[str, float], Float[Tensor, 'steps 2'], Float[Tensor, 'k L D']]:
    """(seconds, operations) per group and phase; losses [steps, 2] and latents of the first.

    found_before: (latents, reconstructions) from which the losses are to start.
    """
    frozen, clock = FrozenPSP(psp, ACTIVATIONS[opts.precision]), Clock(device)
    work = {}
    x_batches = from_uint8(photos.to(device)).split(opts.batch_size)
    with matmul_precision(opts.precision):
        if device.type == 'cuda':
            invert(frozen, x_batches[0], n_iters=1)
        found = clock.time('first inversion', lambda: [invert(frozen, x) for x in x_batches])
        work['first inversion'] = (
            operations(lambda: invert(frozen, x_batches[0])) * len(photos) / len(x_batches[0])
        )
    latents = torch.cat([f.ws for f in found]).split(opts.k)
    features = torch.cat([content.features(f.recon) for f in found]).split(opts.k)
    groups = [Group(*parts) for parts in zip(latents, photos.split(opts.k), features)]
    same = Group(found_before[0], groups[0].photos, content.features(found_before[1]))
    engine = GroupOptimizer(
        psp, content, style, config=config, device=device, precision=opts.precision
    )
    size = opts.group_batch or opts.groups
    batches = [groups[i : i + size] for i in range(0, len(groups), size)]
    with matmul_precision(opts.precision):
        targets = clock.time('targets', lambda: [engine.targets(b) for b in batches])[0]
        start = torch.stack([g.ws.mean(0) for g in batches[0]])
        scale = len(groups) / len(batches[0])
        work['targets'] = scale * operations(lambda: engine.targets(batches[0]))
        work['steps'] = scale * opts.n_steps * operations(lambda: one_step(engine, start, targets))
    timed = [timed_run(engine, batch, device) for batch in batches]
    clock.seconds['steps'] = opts.n_steps * sum(per_step(seconds) for seconds in timed)
    with torch.no_grad(), matmul_precision(opts.precision):
        clock.time('final picture', lambda: engine.synthesis(start))
        clock.seconds['final picture'] *= scale
        work['final picture'] = scale * operations(lambda: engine.synthesis(start))
    share = {phase: took / len(groups) for phase, took in clock.seconds.items()}
    work = {phase: w / len(groups) for phase, w in work.items()}
    return share, work, engine.run([same]).losses[:, 0], latents[0]


def timed_run(engine: GroupOptimizer, groups: Sequence[Group], device: torch.device) -> list[float]:
    """Seconds of each step of a batch; the first step's hold the targets too."""
    ticks = [clock(device)]

    def tick(_: int) -> None:
        ticks.append(clock(device))

    engine.run(groups, on_step=tick)
    return [b - a for a, b in zip(ticks, ticks[1:])]


def one_step(engine: GroupOptimizer, start: Float[Tensor, 'G L D'], targets: Targets) -> None:
    ws = start.clone().requires_grad_(True)
    content, style, _ = engine.losses(ws, targets)
    torch.autograd.grad((content + style).sum(), ws)


def operations(function: Callable[[], object]) -> int:
    with OperationCount() as counter:
        function()
    return counter.total


def per_step(seconds: Sequence[float]) -> float:
    """Mean seconds of a step, without the first where there are more."""
    kept = seconds[1:] or seconds
    return sum(kept) / len(kept)


def print_table(
    published: dict[str, float],
    ours: dict[str, float],
    work: dict[str, float],
    rate: float,
    opts: argparse.Namespace,
) -> tuple[float, float, float]:
    """Prints the seconds; times the published way, times the floor, groups a minute."""
    rows = [['phase', 'published, s', 'ours, s', 'ratio', 'floor, s']]
    for phase, old in published.items():
        new = ours.get(phase, 0.0)
        rows.append(
            [
                phase,
                f'{old:.2f}',
                f'{new:.2f}',
                f'{old / new:.1f}' if new else '',
                f'{work.get(phase, 0) / rate:.2f}',
            ]
        )
    old, new = sum(published.values()), sum(ours.values())
    floor = sum(work.values()) / rate
    rows.append(['one group', f'{old:.2f}', f'{new:.2f}', f'{old / new:.1f}', f'{floor:.2f}'])
    rows.append(
        ['groups per minute', *(f'{60 / v:.3g}' for v in (old, new)), '', f'{60 / floor:.3g}']
    )
    print_rows(rows, markdown=opts.markdown)
    return old / new, new / floor, 60 / new


def loss_differences(
    published: Float[Tensor, 'steps 2'], ours: Float[Tensor, 'steps 2'], config: OptimizeConfig
) -> Float[Tensor, ' steps']:
    """Relative differences of the total loss at every step."""
    weights = torch.tensor([config.content_weight, config.style_weight])
    old, new = (losses.cpu().float() @ weights for losses in (published, ours))
    return (new - old).abs() / old


def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    device = resolve_device(opts.device)
    if opts.against:
        print_comparison('anonymise', opts, device)
        return 0
    torch.backends.cudnn.benchmark = True
    config = OptimizeConfig(n_steps=opts.steps)
    psp, content, style = random_networks(opts.size, opts.seed, opts.encoder_size, opts.channels)
    psp, content, style = psp.to(device), content.to(device), style.to(device)
    photos = photographs(opts.k * opts.groups, opts.seed + 2, opts.encoder_size)
    with matmul_precision(opts.precision):
        published, old_losses, found = run_published(
            *copy.deepcopy((psp, content, style)), photos, config, opts, device
        )
        rate = matrix_rate(device, ACTIVATIONS[opts.precision])
    ours, work, losses, latents = run_ours(psp, content, style, photos, config, opts, device, found)
    print(f'{describe(device)}; {opts.precision} matrix rate {rate / 1e9:.0f} GFLOP/s')
    print(
        f'{opts.size} px, k = {opts.k}, {opts.groups} group(s), '
        f'{opts.group_batch or opts.groups} at a time, {opts.steps} steps timed, '
        f'{opts.n_steps} counted; seconds per group'
    )
    ratio, distance, speed = print_table(published, ours, work, rate, opts)
    print(
        f'{speed:.3g} groups a minute, {ratio:.1f} times the published way; '
        f'{distance:.1f} times the floor'
    )
    if device.type == 'cuda':
        print(f'peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB')
    differences = loss_differences(old_losses, losses, config)
    first, last = AGREEMENT[opts.precision]
    start = differences[:FIRST_STEPS].max()
    apart = (latents - found[0]).norm() / (found[0] - psp.latent_avg).norm()
    print(f'latents: {float(apart):.1e} apart, relative to their distance from the average')
    print(
        f'total loss: {float(start):.1e} apart over the first {min(FIRST_STEPS, opts.steps)} '
        f'steps (allowed {first:g}), {float(differences[-1]):.1e} at the last (allowed {last:g})'
    )
    return int(bool(start > first or differences[-1] > last))


if __name__ == '__main__':
    run(main)
