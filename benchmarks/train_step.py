"""Times training steps: images per second, share of the matrix rate, and where the time goes.

    python benchmarks/train_step.py --size=256 --cfg=auto --precision=fp16 --breakdown
    python benchmarks/train_step.py --net=encoder --size=512 --precision=bf16
    python benchmarks/train_step.py --size=64 --against=FOLDER    # another checkout's code and ours

`--net=generator` is one step of the StyleGAN2-ADA training (generator and discriminator, with
their regularisation in its true share), `--net=encoder` one step of the ReStyle training with the
published networks, losses (pixels, LPIPS, content) and five refinements, `--net=joint` one step of
encoder and generator together, with means and opponents. Random images and weights stand in for
real ones; they cost the same. The matrix rate of the machine is measured in the same
run, so that the fraction of it that a step reaches can be given.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from jaxtyping import Float, UInt8
from torch import Tensor

from benchmarks.against import add_against, print_comparison
from benchmarks.machine import OperationCount, clock, describe, matrix_rate, synchronize
from benchmarks.sizes import add_sizes, channels_up_to
from criteria.laplacian import band_variances, fine_deviations
from models.encoders import build_encoder
from models.features.pretrained import load_feature_network
from models.psp import PSP
from models.stylegan2 import Generator
from training.augment import PIPES
from training.coach_config import CoachConfig
from training.coach_restyle_e4e import E4EConfig
from training.coach_restyle_joint import JointCoach, JointOptions
from training.coach_restyle_psp import Coach
from training.reconstruction import BandTerm, ContentTerm, L2Term, LpipsTerm
from training.stylegan2_config import PRESETS, make_config
from training.stylegan2_loop import Trainer
from utils.cli import fraction, parser_of, positive_int, resolve_device, run
from utils.images import from_uint8
from utils.options import build

DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
ENCODER_BATCH = 8
JOINT_BATCH = 10


class RandomImages(torch.utils.data.Dataset):
    """`n` fixed uint8 images."""

    def __init__(self, n: int, size: int) -> None:
        self.images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, '3 S S'], Float[Tensor, ' 0']]:
        return self.images[index], torch.zeros(0)


def build_parser() -> argparse.ArgumentParser:
    p = parser_of(__doc__)
    p.add_argument('--net', choices=sorted(_STEPS), default='generator', help='what is trained')
    add_sizes(p)
    p.add_argument('--cfg', choices=PRESETS, default='auto', help='configuration of generators')
    p.add_argument(
        '--batch',
        type=positive_int,
        metavar='INT',
        help="images per step (default: the configuration's; 8 for encoders, 10 for both)",
    )
    p.add_argument(
        '--precision',
        choices=sorted(DTYPES),
        default='fp32',
        help='of the four highest resolutions, or of encoder and losses',
    )
    p.add_argument('--p', type=fraction, default=0.3, metavar='FLOAT', help='augmentation strength')
    p.add_argument(
        '--steps',
        type=positive_int,
        default=16,
        metavar='INT',
        help='timed steps; 16 hold every regularisation in its true share',
    )
    p.add_argument('--device', default='auto', help='cpu, cuda, cuda:N or auto')
    p.add_argument('--breakdown', action='store_true', help='print the costliest operations')
    add_against(p)
    return p


def generator_step(
    opts: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], object], int, int]:
    """(function that takes one step, images per step, steps of a whole round of regularisation)."""
    config = make_config(opts.cfg, opts.size, 1, batch=opts.batch)
    trainer = Trainer(
        RandomImages(2 * config.batch, opts.size),
        config,
        device=device,
        augment='fixed',
        augment_names=PIPES['bgc'],
        augment_p=opts.p,
        precision=None if opts.precision == 'fp32' else opts.precision,
    )
    return trainer.step, config.batch, config.d_reg_interval


def encoder_step(
    opts: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], object], int, int]:
    """As generator_step; every step is alike."""
    batch = opts.batch or ENCODER_BATCH
    generator = Generator(opts.size, channels=channels_up_to(opts.size, opts.channels))
    encoder = build_encoder(
        'ResNetBackboneEncoder', n_styles=generator.n_latent, input_size=opts.encoder_size
    )
    psp = PSP(encoder, generator, generator.mean_latent(1000), opts.encoder_size)
    with tempfile.TemporaryDirectory() as folder:
        losses: dict[str, Any] = {'l2': (L2Term(), 1.0)}
        for name, term, net, weight in (
            ('lpips', LpipsTerm, torchvision.models.alexnet, 0.8),
            ('moco', ContentTerm, torchvision.models.resnet50, 0.5),
        ):
            path = Path(folder) / f'{name}.pt'
            torch.save(net(weights=None).state_dict(), path)
            losses[name] = term(path, device), weight
        amp = 'no' if opts.precision == 'fp32' else opts.precision
        images = RandomImages(batch, opts.encoder_size)
        coach = Coach(
            psp,
            images,
            images,
            CoachConfig(batch_size=batch, amp=amp),
            losses=losses,
            device=device,
        )
    x = from_uint8(images.images.to(device))
    return lambda: coach.step(x), batch, 1


def joint_step(
    opts: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], object], int, int]:
    """As encoder_step, with the losses, means and opponents of the default settings."""
    batch = opts.batch or JOINT_BATCH
    generator = Generator(opts.size, channels=channels_up_to(opts.size, opts.channels))
    n_styles = generator.n_latent
    encoder = build_encoder('LightPooledEncoder', n_styles=n_styles, input_size=opts.encoder_size)
    psp = PSP(encoder, generator, torch.zeros(n_styles, 512), opts.encoder_size)
    images = RandomImages(batch, opts.encoder_size)
    x = from_uint8(images.images)
    joint = build(JointOptions, {'mean_start': 0, 'adv_start': 0, 'adv_ramp': 0})
    coach = JointCoach(
        psp,
        images,
        images,
        CoachConfig(
            batch_size=batch,
            n_iters=1,
            optim_name='adam',
            train_decoder=True,
            amp='no' if opts.precision == 'fp32' else opts.precision,
        ),
        losses={'bands': (BandTerm(joint.band_lambdas, band_variances(x)), 1.0)},
        device=device,
        e4e=E4EConfig(progressive_steps=(0, *[10**9] * (n_styles - 1))),
        joint=dataclasses.replace(joint.joint, game=joint.game),
        features=load_feature_network('lite0').to(device),
        deviations=fine_deviations(x),
    )
    x = x.to(device)
    return lambda: coach.step(x), batch, 1


_STEPS = {'generator': generator_step, 'encoder': encoder_step, 'joint': joint_step}


def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    device = resolve_device(opts.device)
    if opts.against:
        print_comparison('train_step', opts, device)
        return 0
    torch.backends.cudnn.benchmark = True
    step, batch, period = _STEPS[opts.net](opts, device)
    for _ in range(3 if device.type == 'cuda' else 1):
        step()
    with OperationCount() as counter:
        for _ in range(period):
            step()
    work = counter.total / period
    begin = clock(device)
    for _ in range(opts.steps):
        step()
    took = (clock(device) - begin) / opts.steps
    rate = matrix_rate(device, DTYPES[opts.precision])
    print(describe(device))
    setting = f', {opts.cfg}, p {opts.p}' if opts.net == 'generator' else ''
    print(
        f'{opts.net} {opts.size} px{setting}, batch {batch}, {opts.precision}: '
        f'{took:.2f} s a step, {batch / took:.2f} images/s, {1000 * took / batch:.1f} s/kimg'
    )
    print(
        f'{work / 1e12:.3f} TFLOP a step, {work / took / 1e12:.2f} TFLOP/s, '
        f'{work / took / rate:.1%} of the measured {opts.precision} matrix rate '
        f'({rate / 1e12:.2f} TFLOP/s)'
    )
    if device.type == 'cuda':
        print(f'peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB')
    if opts.breakdown:
        with torch.profiler.profile() as profiler:
            for _ in range(4):
                step()
            synchronize(device)
        key = 'self_cuda_time_total' if device.type == 'cuda' else 'self_cpu_time_total'
        print(profiler.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60))
    return 0


if __name__ == '__main__':
    run(main)
