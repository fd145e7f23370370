"""Host waits and operations (launches, roughly) of one step of everything, counted without a GPU.

    python benchmarks/launches.py --size=512
    python benchmarks/launches.py --size=512 --against=FOLDER    # beside another checkout

The steps run on the pretended device of tests/support: numbers on the CPU, counts as on a GPU.
Views are not counted, a fused kernel or the replay of a graph counts once. Numbers of operations
depend on the depth of the networks, hardly on their width or the batch; the generator is narrow
here and batches are of two, to be quick.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == '__main__' and '--json' not in sys.argv:  # the other checkout is on PYTHONPATH
    sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / 'tests' / 'support'))

import argparse
import importlib
import inspect
import json
import tempfile
from typing import Any

import torch
import torchvision
from pretended_device import PretendedGPU, pretended_gpu

from anonymization.optimize import Group, GroupOptimizer, OptimizeConfig
from models.encoders import build_encoder
from models.psp import PSP
from models.stylegan2 import Generator
from training.augment import PIPES
from training.coach_restyle_psp import Coach, CoachConfig
from training.reconstruction import ContentTerm, L2Term, LpipsTerm
from training.stylegan2_config import make_config
from training.stylegan2_loop import Trainer
from utils.cli import parser, power_of_two, run

try:
    networks = [importlib.import_module(f'models.features.{name}') for name in ('content', 'style')]
except ModuleNotFoundError:  # where checkouts before models/features have them
    networks = [importlib.import_module(f'criteria.{name}') for name in ('content', 'local_style')]

Counts = dict[str, tuple[float, float]]  # waits and operations of a step, by its name
DEVICE = torch.device('cuda')
ENCODER_SIZE, STYLE_SIZE, WIDTH, MEMBERS, FEATURES = 256, 64, 4, 5, 2048


class Pictures(torch.utils.data.Dataset):
    """Random pictures."""

    def __init__(self, size: int) -> None:
        self.images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], torch.zeros(0)


def channels(size: int) -> dict[int, int]:
    return {2**i: WIDTH for i in range(2, size.bit_length())}


def count_generator(gpu: PretendedGPU, size: int) -> Counts:
    """A step of the generator's training, averaged over 16 with the penalties in their shares."""
    config = make_config('auto', size, 1, batch=2, batch_gpu=2, channels=channels(size))
    trainer = Trainer(
        Pictures(size),
        config,
        device=DEVICE,
        augment='fixed',
        augment_p=0.3,
        augment_names=PIPES['bgc'],
        precision='fp16',
    )
    waits, operations = 0.0, 0.0
    for number, share in ((0, 1 / 16), (4, 3 / 16), (1, 12 / 16)):
        trainer.n_steps = number
        gpu.clear()
        trainer.step()
        waits += share * gpu.n_waits
        operations += share * gpu.n_operations
    return {'generator, fp16, mean of 16 steps': (waits, operations)}


def count_encoder(gpu: PretendedGPU, size: int) -> Counts:
    """A step of the encoder's training, with the published networks and losses."""
    generator = Generator(size, channels=channels(size))
    encoder = build_encoder(
        'ResNetBackboneEncoder', n_styles=generator.n_latent, input_size=ENCODER_SIZE
    )
    psp, pictures = PSP(encoder, generator, torch.zeros(512), ENCODER_SIZE), Pictures(ENCODER_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        losses: dict[str, tuple[Any, float]] = {'l2': (L2Term(), 1.0)}
        for name, term, net in (
            ('lpips', LpipsTerm, torchvision.models.alexnet),
            ('moco', ContentTerm, torchvision.models.resnet50),
        ):
            path = Path(folder) / f'{name}.pt'
            torch.save(net(weights=None).state_dict(), path)
            losses[name] = term(path, DEVICE), 0.5
        config = CoachConfig(batch_size=2, amp='bf16')
        older: dict[str, Any] = {}
        if 'run_dir' in inspect.signature(Coach).parameters:  # of older checkouts
            older['run_dir'] = folder
        coach = Coach(psp, pictures, pictures, config, losses=losses, device=DEVICE, **older)
    x = pictures.images[:2].to(DEVICE).float().div(127.5).sub(1)
    coach.step(x)
    gpu.clear()
    coach.step(x)
    return {'encoder, bf16, 5 refinements': (gpu.n_waits, gpu.n_operations)}


def count_groups(gpu: PretendedGPU, size: int) -> Counts:
    """A step of the optimisation of one group and of many; what a run costs once is left out."""
    generator = Generator(size, channels=channels(size))
    psp = PSP(torch.nn.Identity(), generator, torch.zeros(512), STYLE_SIZE)
    state = torchvision.models.resnet50(weights=None).state_dict()
    group = Group(
        torch.randn(MEMBERS, generator.n_latent, 512),
        Pictures(STYLE_SIZE).images[:1].expand(MEMBERS, -1, -1, -1),
        torch.nn.functional.normalize(torch.randn(MEMBERS, FEATURES), dim=1),
    )
    found = {}
    for precision in ('fp32', 'bf16'):
        content = networks[0].content_network_from_state(state, source='random weights')
        engine = GroupOptimizer(
            psp,
            content,
            networks[1].VGGStyle(),
            config=OptimizeConfig(),
            device=DEVICE,
            precision=precision,
        )
        for n_groups in (6, 1):
            counts = []
            for steps in (20, 22) if n_groups == 1 else (2, 3):
                engine.config = OptimizeConfig(n_steps=steps)
                gpu.clear()
                engine.run([group] * n_groups)
                counts.append((gpu.n_waits, gpu.n_operations))
            n = 2 if n_groups == 1 else 1
            name = f'optimisation of {n_groups} group{"s" if n_groups > 1 else ""}, {precision}'
            found[name] = tuple((more - less) / n for less, more in zip(*counts))
    return found


PARTS = {'generator': count_generator, 'encoder': count_encoder, 'groups': count_groups}


def count(parts: list[str], size: int) -> Counts:
    found: Counts = {}
    for part in parts:
        torch.manual_seed(0)
        with pretended_gpu() as gpu:
            found |= PARTS[part](gpu, size)
            if gpu.faults:
                print(gpu.report(part), file=sys.stderr)
    return found


def count_elsewhere(folder: str, parts: list[str], size: int) -> Counts:
    """The same of the checkout in `folder`."""
    from benchmarks.against import told_elsewhere  # above, it would be that of the other checkout

    return told_elsewhere(folder, __file__, [f'--size={size}', '--json', '--parts', *parts])


def build_parser() -> argparse.ArgumentParser:
    lines = __doc__.splitlines()
    p = parser(lines[0], epilog='\n'.join(lines[1:]))
    p.add_argument('--size', type=power_of_two, default=512, metavar='PX', help='of the pictures')
    p.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS), help='what is counted')
    p.add_argument('--against', metavar='FOLDER', help='another checkout, to be counted beside')
    p.add_argument('--json', action='store_true', help='print JSON, of the project on PYTHONPATH')
    return p


def main(argv: list[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    found = count(opts.parts, opts.size)
    if opts.json:
        print(json.dumps(found))
        return 0
    before = count_elsewhere(opts.against, opts.parts, opts.size) if opts.against else {}
    print(f'| one step, {opts.size} px | waits before | now | operations before | now | |')
    print('|---|---|---|---|---|---|')
    for name, (waits, operations) in found.items():
        old = before.get(name)
        cells = [
            f'{old[0]:.1f}' if old else '',
            f'{waits:.1f}',
            f'{old[1]:,.0f}' if old else '',
            f'{operations:,.0f}',
            f'{operations / old[1] - 1:+.0%}' if old else '',
        ]
        print(f'| {name} | ' + ' | '.join(cells) + ' |')
    return 0


if __name__ == '__main__':
    run(main)
