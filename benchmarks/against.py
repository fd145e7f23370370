"""Times this checkout's code and another's in one run, in turn, so that both meet the same machine.

    python benchmarks/anonymise.py --size=256 --precision=bf16 --against=FOLDER
    python benchmarks/train_step.py --size=64 --cfg=small --precision=bf16 --against=FOLDER

Each checkout has a process of its own. In every round both do each piece of work once, first the
one and then, in the next round, first the other. Medians are given: of the seconds that went by,
and of the seconds of all cores that the process took, which others on the machine disturb less.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.machine import describe, synchronize
from utils.cli import positive_int
from utils.errors import UserError

Work = dict[str, Callable[[], object]]  # what is timed, by name
_SOURCE = Path(__file__).resolve()


def environment(folder: str | Path) -> dict[str, str]:
    """In which a program of this checkout imports the project's code from the one in `folder`."""
    return {**os.environ, 'PYTHONPATH': str(folder)}


def told_elsewhere(folder: str | Path, program: str, arguments: Sequence[str]) -> Any:
    """The JSON that a program prints with the code of the checkout in `folder`.

    UserError when it fails.
    """
    done = subprocess.run(
        [sys.executable, program, *arguments], env=environment(folder), stdout=subprocess.PIPE
    )
    if done.returncode:
        raise UserError(f'{folder}: its code cannot be measured; the reason stands above')
    return json.loads(done.stdout)


class Took(NamedTuple):
    """Seconds of one piece of work: by the clock, and of all cores of the process."""

    clock: float
    cores: float


def add_against(p: argparse.ArgumentParser) -> None:
    """Adds --against and --rounds."""
    p.add_argument('--against', metavar='FOLDER', help='another checkout, timed in turn with this')
    p.add_argument(
        '--rounds', type=positive_int, default=5, metavar='INT', help='with --against: turns'
    )


def optimisation_work(module: Any, opts: argparse.Namespace, device: torch.device) -> Work:
    """An inversion with one refinement and `opts.steps` steps of the group optimisation.

    module: `benchmarks.anonymise` of the checkout that is timed.
    """
    from anonymization.optimize import (
        ACTIVATIONS,
        Group,
        GroupOptimizer,
        OptimizeConfig,
        matmul_precision,
    )
    from models.psp import FrozenPSP, invert

    sizes: tuple[int, ...] = (opts.encoder_size, opts.channels)
    if not hasattr(module, 'channels_up_to'):  # before they could be chosen
        sizes = ()
    networks = module.random_networks(opts.size, opts.seed, *sizes)
    psp, content, style = (net.to(device) for net in networks)
    photos = module.photographs(opts.k * opts.groups, opts.seed + 2, *sizes[:1])
    x = photos.to(device).float().div(127.5).sub(1)
    frozen = FrozenPSP(psp, ACTIVATIONS[opts.precision])
    latents = psp.latent_avg + 0.2 * torch.randn(len(x), *psp.latent_avg.shape, device=device)
    with torch.no_grad():  # photographs stand for their reconstructions
        features = [content.features(part) for part in x.split(opts.k)]
    groups = [Group(*parts) for parts in zip(latents.split(opts.k), photos.split(opts.k), features)]
    config = OptimizeConfig(n_steps=opts.steps)
    engine = GroupOptimizer(
        psp, content, style, config=config, device=device, precision=opts.precision
    )

    def inversion() -> None:
        with matmul_precision(opts.precision):
            invert(frozen, x, n_iters=1)

    steps = f'{opts.steps} steps of {len(groups)} group(s)'
    return {'inversion, 1 refinement': inversion, steps: lambda: engine.run(groups)}


def training_work(module: Any, opts: argparse.Namespace, device: torch.device) -> Work:
    """`opts.steps` steps of a training. module: `benchmarks.train_step` of the timed checkout."""
    prepare = module.generator_step if opts.net == 'generator' else module.encoder_step
    step, _, _ = prepare(opts, device)
    return {f'{opts.steps} steps of the {opts.net}': lambda: [step() for _ in range(opts.steps)]}


WORK = {'anonymise': optimisation_work, 'train_step': training_work}


def timed(function: Callable[[], object], device: torch.device) -> Took:
    """How long `function` takes until the device has done it."""
    begin, used = time.perf_counter(), time.process_time()
    function()
    synchronize(device)
    return Took(time.perf_counter() - begin, time.process_time() - used)


def serve(folder: str, name: str, arguments: dict[str, Any]) -> None:
    """Prints the names of the work as JSON, then for each line of the input the times of all."""
    sys.path.insert(0, folder)
    module = importlib.import_module(f'benchmarks.{name}')
    opts, out = argparse.Namespace(**arguments), sys.stdout
    sys.stdout = sys.stderr  # of the libraries
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    device = torch.device(opts.device)
    work = WORK[name](module, opts, device)
    for function in work.values():  # kernels are loaded, caches filled
        function()
    print(json.dumps(list(work)), file=out, flush=True)
    for line in sys.stdin:
        took = timed(work[json.loads(line)], device)
        print(json.dumps(took), file=out, flush=True)


class Side:
    """A checkout's process."""

    def __init__(self, folder: Path, name: str, opts: argparse.Namespace) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(_SOURCE), str(folder), name, json.dumps(vars(opts))],
            env=environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f'{self.folder}: its code cannot be timed; the reason stands above')
        return json.loads(line)

    def time(self, work: str) -> Took:
        assert self.process.stdin is not None
        print(json.dumps(work), file=self.process.stdin, flush=True)
        return Took(*self.answer())


@contextmanager
def _sides(folders: list[Path], name: str, opts: argparse.Namespace) -> Iterator[list[Side]]:
    sides: list[Side] = []
    try:
        for folder in folders:
            sides.append(Side(folder, name, opts))
        yield sides
    finally:
        for side in sides:
            side.process.terminate()
            side.process.communicate()


def compare(
    name: str, opts: argparse.Namespace, this: Path = _SOURCE.parents[1]
) -> dict[str, tuple[Took, Took]]:
    """{work: (the other checkout's, this one's)}, medians over `opts.rounds` rounds.

    name: of the benchmark, a key of WORK; opts: its options. UserError when the folder is no
    checkout of the project or its code fails.
    """
    other = Path(opts.against).resolve()
    if not (other / 'benchmarks' / f'{name}.py').is_file():
        raise UserError(f'--against {opts.against}: no benchmarks/{name}.py there')
    with _sides([other, this], name, opts) as sides:
        names = [side.answer() for side in sides][0]
        took: dict[str, list[list[Took]]] = {work: [[], []] for work in names}
        for number in range(opts.rounds):
            for work in names:
                for i in (0, 1) if number % 2 == 0 else (1, 0):
                    took[work][i].append(sides[i].time(work))
    return {work: (_median(before), _median(after)) for work, (before, after) in took.items()}


def _median(took: list[Took]) -> Took:
    return Took(*(statistics.median(values) for values in zip(*took)))


def print_comparison(name: str, opts: argparse.Namespace, device: torch.device) -> None:
    """Compares and prints a Markdown table: seconds by the clock and of the cores, and ratios."""
    found = compare(name, argparse.Namespace(**{**vars(opts), 'device': str(device)}))
    print(describe(device))
    print(f'medians of {opts.rounds} rounds in turn; {opts.precision}, {opts.size} px')
    print('| | the other, s | this, s | ratio | the other, core s | this, core s | ratio |')
    print('|---|---|---|---|---|---|---|')
    for work, (before, after) in found.items():
        cells = [
            cell
            for old, new in zip(before, after)
            for cell in (f'{old:.2f}', f'{new:.2f}', f'{old / new:.2f}')
        ]
        print(f'| {work} | ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
    serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
