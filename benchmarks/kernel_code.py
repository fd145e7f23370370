"""What the compiler made of the resampling kernels: registers, instructions per row, access widths.

Needs no GPU, but nvcc (CUDA_HOME, or the pip command that the ops name) and cuobjdump
(`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`). "instructions a row": those of the
innermost loop that reads and writes, per output row of one warp; with up 2 a thread makes two
columns. "ceiling": the share of 3.0 TB/s that 132 multiprocessors of 1.7 GHz could move if they
did nothing but issue these instructions, loads from memory counted once.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.stylegan2.op import build

KERNELS = {
    ('6__half', 4): 'half, 4 channels',
    ('6__half', 1): 'half, 1 channel',
    ('f', 2): 'float, 2 channels',
    ('f', 1): 'float, 1 channel',
}
WIDTH = {'6__half': 2, 'f': 4}
# (up, down): output rows and output columns a thread makes per trip of its unrolled loop, and
# input elements per output element.
FACTORS = {(1, 1): ('blur', 4, 1, 1.0), (2, 1): ('up 2', 4, 2, 0.25), (1, 2): ('down 2', 2, 1, 4.0)}
ISSUE, COPY = 132 * 4 * 1.7e9, 3.0e12


def compiled(architecture: str, folder: Path) -> tuple[str, str]:
    """(ptxas report, machine code as text) of the kernels."""
    library = folder / 'kernels.so'
    done = subprocess.run(
        [
            build.find_nvcc(),
            '-O3',
            '-std=c++17',
            f'-arch={architecture}',
            '-Xptxas',
            '-v',
            '-shared',
            '-Xcompiler',
            '-fPIC',
            '-cudart',
            'none',
            build.SOURCE,
            '-o',
            library,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    tool = shutil.which('cuobjdump') or str(build.find_nvcc().with_name('cuobjdump'))
    code = subprocess.run([tool, '-sass', library], capture_output=True, text=True, check=True)
    return done.stderr, code.stdout


def inner_loop(function: str) -> list[str]:
    """Instructions of the smallest loop that loads and stores."""
    lines = [
        (int(at, 16), text) for at, text in re.findall(r'/\*([0-9a-f]{4,5})\*/\s+(.*?);', function)
    ]
    place = {at: i for i, (at, _) in enumerate(lines)}
    best: list[str] = []
    for i, (at, text) in enumerate(lines):
        back = re.search(r'\bBRA\b.*0x([0-9a-f]+)', text)
        if back and int(back[1], 16) < at and int(back[1], 16) in place:
            body = [t for _, t in lines[place[int(back[1], 16)] : i + 1]]
            if all(any(word in t for t in body) for word in ('LDG', 'STG')):
                best = body if not best or len(body) < len(best) else best
    return best


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--arch', default='sm_90', metavar='SM', help='sm_80, sm_90, sm_120, ...')
    return p


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report, code = compiled(args.arch, Path(folder))
    registers = dict(re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", report, re.S))
    print(f'| {args.arch} | | registers | instructions a row | loads | stores | ceiling |')
    print('|---|---|---|---|---|---|---|')
    for function in re.split(r'Function : ', code)[1:]:
        name = function.split('\n')[0].strip()
        found = re.search(r'filter_smallI(f|6__half)Li(\d)ELi(\d)ELi(\d)E', name)
        if not found:
            continue
        kind, channels, factors = found[1], int(found[2]), (int(found[3]), int(found[4]))
        label, rows, columns, inputs = FACTORS[factors]
        body = inner_loop(function)
        per_row = len(body) / rows
        loads, stores = (
            sorted({m[1] for t in body if (m := re.search(rf'({w}[\w.]*)', t))})
            for w in ('LDG', 'STG')
        )
        moved = 32 * columns * channels * WIDTH[kind] * (1 + inputs)
        print(
            f'| {label} | {KERNELS[kind, channels]} | {registers[name]} | {per_row:.0f} | '
            f'{" ".join(loads)} | {" ".join(stores)} | '
            f'{min(1.0, moved * ISSUE / per_row / COPY):.0%} |'
        )
    return 0


if __name__ == '__main__':
    sys.exit(main())
