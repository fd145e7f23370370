"""Time and memory of each stage of the main job on very many photographs, with tiny networks.

    python benchmarks/scale.py --n=22176 88702 --folder=scale

Writes n tiny photographs of n / 2 people (random pictures of 40 px) and makes a release of them
with networks of random weights: 32 px, latents of 8 x 512, one refinement, one step of
optimisation. So what is measured is everything but the networks. Memory is the most anonymous
memory of the process in the stage: memory-mapped files do not count. With several n, the last
column is the growth of the CPU time over that of n.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import contextlib
import functools
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.ndimage import zoom

from anonymization import Networks, OptimizeConfig, Settings, anonymize, job, pipeline
from datasets.table import read_table
from models.encoders import build_encoder
from models.features.content import content_checkpoint
from models.psp import PSP, psp_checkpoint
from models.resnet import build_resnet
from models.stylegan2 import Generator
from utils.cli import parser_of, positive_int, run
from utils.io import save_torch, write_csv
from utils.logs import setup_logging

SIDE, WIDTH = 32, 8
# Name of a stage -> the function that is the stage, where it is called.
STAGES = {
    'reading': (job, 'read_photographs'),
    'inversion': (pipeline, 'invert_all'),
    'grouping': (pipeline, 'form_groups'),
    'optimisation': (pipeline, 'optimise'),
    'writing': (pipeline, 'write'),
    'audit and publishing': (job, 'publish'),
}


class Cost(NamedTuple):
    """Seconds, CPU seconds and the most anonymous memory in bytes."""

    wall: float
    cpu: float
    memory: int


def save_networks(folder: Path) -> Networks:
    """Networks of random weights."""
    torch.manual_seed(0)
    decoder = Generator(SIDE, n_mlp=2, channels={4: WIDTH, 8: WIDTH, 16: WIDTH, 32: WIDTH})
    encoder = build_encoder('LightEncoder', n_styles=8, input_size=SIDE, width=WIDTH)
    psp = PSP(encoder, decoder, 0.1 * torch.randn(512), SIDE)
    save_torch(folder / 'psp.pt', psp_checkpoint(psp, {}))
    content = content_checkpoint(
        build_resnet('resnet18', small_stem=False),
        arch='resnet18',
        input_size=SIDE,
        small_stem=False,
    )
    save_torch(folder / 'content.pt', content)
    return Networks(folder / 'psp.pt', folder / 'content.pt', style=None)


def save_photographs(folder: Path, n: int) -> None:
    """Smooth random pictures of 40 px, two of each person, and their table."""
    rng = np.random.default_rng(0)
    (folder / 'images').mkdir(parents=True)
    for i in range(n):
        smooth = zoom(rng.normal(128, 50, (5, 5, 3)), (8, 8, 1), order=1)
        path = folder / 'images' / f'eye{i:06d}.png'
        Image.fromarray(smooth.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)
    table = {
        'id_code': [f'eye{i:06d}' for i in range(n)],
        'diagnosis': rng.integers(0, 5, n),
        'patient_id': [f'person{i // 2}' for i in range(n)],
        'eye': ['left' if i % 2 else 'right' for i in range(n)],
    }
    write_csv(folder / 'labels.csv', pd.DataFrame(table))


def anonymous_memory() -> int:
    """Bytes of this process that belong to no file (Linux)."""
    text = Path('/proc/self/status').read_text()
    return 1024 * int(text.split('RssAnon:')[1].split()[0])


@contextlib.contextmanager
def costs(found: dict[str, Cost], name: str) -> Iterator[None]:
    """Measures the block; nested blocks are each measured whole."""
    most, over = anonymous_memory(), threading.Event()

    def look() -> None:
        nonlocal most
        while not over.wait(0.05):
            most = max(most, anonymous_memory())

    watcher = threading.Thread(target=look)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        over.set()
        watcher.join()
        found[name] = Cost(wall, cpu, most)


@contextlib.contextmanager
def measured_stages(found: dict[str, Cost]) -> Iterator[None]:
    """Measures each of STAGES whenever it runs in the block."""
    own = {name: getattr(*place) for name, place in STAGES.items()}

    def measured(name: str) -> Callable[..., Any]:
        @functools.wraps(own[name])
        def stage(*args: Any, **options: Any) -> Any:
            with costs(found, name):
                return own[name](*args, **options)

        return stage

    for name, (module, function) in STAGES.items():
        setattr(module, function, measured(name))
    try:
        yield
    finally:
        for name, (module, function) in STAGES.items():
            setattr(module, function, own[name])


def drive(folder: Path, n: int, networks: Networks) -> dict[str, Cost]:
    """Costs of all stages for n photographs, which are written if they are not there."""
    data, found = folder / f'photographs{n}', dict[str, Cost]()
    if not (data / 'labels.csv').exists():
        save_photographs(data, n)
    settings = Settings(n_iters=1, optimize=OptimizeConfig(n_steps=1, style_weight=0.0))

    def make() -> None:
        table = read_table(data / 'labels.csv', data / 'images')
        anonymize(table, networks, settings, folder / f'run{n}')

    with measured_stages(found):
        make()
    with costs(found, 'started again'):
        make()
    return found


def report(all_costs: dict[int, dict[str, Cost]]) -> None:
    """Prints a table, a row for each stage."""
    sizes = sorted(all_costs)
    cells = [f'{n:,}: CPU s | s | GB' for n in sizes]
    print('| stage | ' + ' | '.join(cells) + ' | growth of CPU s over that of n |')
    print('|---' * (3 * len(sizes) + 2) + '|')
    for name in all_costs[sizes[-1]]:
        row = [all_costs[n][name] for n in sizes]
        numbers = [f'{c.cpu:.0f} | {c.wall:.0f} | {c.memory / 1e9:.2f}' for c in row]
        grown = row[-1].cpu / row[0].cpu / (sizes[-1] / sizes[0])
        print(f'| {name} | ' + ' | '.join(numbers) + f' | {grown:.2f} |', flush=True)


def build_parser() -> argparse.ArgumentParser:
    p = parser_of(__doc__)
    p.add_argument(
        '--n', type=positive_int, nargs='+', default=[88_702], metavar='N', help='photographs'
    )
    p.add_argument(
        '--folder', type=Path, metavar='DIR', help='photographs and runs are kept there, to go on'
    )
    return p


def main(argv: list[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    logging.getLogger().setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as temp:
        folder = opts.folder or Path(temp)
        folder.mkdir(parents=True, exist_ok=True)
        networks = save_networks(folder)
        report({n: drive(folder, n, networks) for n in opts.n})
    return 0


if __name__ == '__main__':
    run(main)
