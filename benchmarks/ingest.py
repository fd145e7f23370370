"""How fast photographs of 3888 x 2592 are read, and cropped to the field of view.

    python benchmarks/ingest.py
    python benchmarks/ingest.py --against=FOLDER    # beside another checkout

Draws JPEGs (eyes of phantoms, enlarged, with the noise of a sensor) and reads them into arrays: by
Pillow in the plain way, whole and resized; as this project does when it decodes them whole; and as
it does, decoded at a smaller scale, half for 512 px and a quarter for 256. Beside that stand its
parts: the entropy code, shown by decoding to an eighth in grey; decoding without the resize, by
Pillow and as this project does. Then it crops them as
`scripts/dataset_tool.py --transform=fundus` does. Counted are photographs per second of CPU time,
which other work on the machine disturbs least, and the cores in use. With --against the crops of
both checkouts are compared; exit code 1 when they differ by more than the tolerance that is
printed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == '__main__' and '--json' not in sys.argv:  # the other checkout is on PYTHONPATH
    sys.path.insert(0, str(ROOT))

import argparse
import importlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from datasets.prepare import build_archive
from utils.cli import parser, positive_int, power_of_two, run
from utils.images import find_images, load_rgb, resize

decode_rgb: Any
list_source: Any
load_pictures: Any
make_dataset: Any
open_image: Any
try:
    list_source = importlib.import_module('datasets.sources').list_source
    load_pictures = importlib.import_module('datasets.pictures').load_pictures
    make_dataset = importlib.import_module('datasets.phantoms.dataset').make_dataset
    open_image = importlib.import_module('utils.images').open_image
except ModuleNotFoundError:  # checkouts before datasets/pictures.py read one by one
    list_source = importlib.import_module('datasets.prepare').list_source
    load_pictures = make_dataset = open_image = None
try:
    decode_rgb = importlib.import_module('utils.decoding').decode_rgb
except ModuleNotFoundError:
    decode_rgb = None

FRAME, DRAWN, NOISE, QUALITY = (3888, 2592), 512, 3.0, 90  # noise: deviation in grey levels
MOST_MEAN, MOST_APART = 1.0, 0.005  # grey levels on average; share of values over 16 apart
PLAIN = 'whole, Pillow'
Rate = tuple[float, float]  # photographs per second of CPU time, cores in use


def make_photographs(folder: Path, n: int) -> None:
    """n JPEGs of FRAME, the field of view as high as the frame, the rest black."""
    with tempfile.TemporaryDirectory() as temp:
        make_dataset(Path(temp) / 'eyes', n_patients=n, size=DRAWN, seed=0, eyes=('left',))
        drawn = [load_rgb(path) for path in find_images(Path(temp) / 'eyes' / 'images')]
    rng, (width, height) = np.random.default_rng(0), FRAME
    folder.mkdir()
    for i, eye in enumerate(drawn):
        frame = Image.new('RGB', FRAME)
        large = eye.resize((height, height), Image.Resampling.BICUBIC)
        frame.paste(large, ((width - height) // 2, 0))
        pixels = np.asarray(frame, np.float32)
        grain = NOISE * rng.standard_normal((height, width, 1), np.float32)
        noisy = pixels + grain * (pixels.max(2, keepdims=True) > 12)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
            folder / f'{i:02d}.jpg', quality=QUALITY
        )


def rate(work: Callable[[], object], n: int) -> Rate:
    """Of work on n photographs, done once before."""
    work()
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return n / cpu, cpu / wall


def ways_to_decode(side: int) -> dict[str, Callable[[Path], np.ndarray]]:
    """Parts of reading at the scale that leaves `side` pixels."""

    def entropy(path: Path) -> np.ndarray:
        with open_image(path) as image:
            image.draft('L', (1, 1))
            return np.asarray(image)

    def decode(path: Path) -> np.ndarray:
        return np.asarray(load_rgb(path, side))

    found: dict[str, Callable[[Path], np.ndarray]] = {
        'entropy code': entropy,
        'scaled by Pillow, not resized': decode,
    }
    if decode_rgb is not None:
        found['scaled, not resized'] = lambda path: decode_rgb(path.read_bytes, '', side).pixels
    return found


def measure(folder: Path, size: int, threads: int, crops: Path) -> dict[str, Rate]:
    """All ways of reading and the cropping, by the checkout that is imported; crops: new folder."""
    paths = find_images(folder)

    def plain(path: Path) -> np.ndarray:
        with open_image(path) as image:
            rgb = image.convert('RGB')
        return np.asarray(rgb.resize((size, size), Image.Resampling.BILINEAR))

    def whole(path: Path) -> np.ndarray:
        return np.asarray(resize(load_rgb(path), size))

    def each(read: Callable[[Path], np.ndarray]) -> Callable[[], object]:
        def work() -> object:
            with ThreadPoolExecutor(threads) as pool:
                return list(pool.map(read, paths))

        return work

    def crop() -> None:
        with tempfile.TemporaryDirectory() as temp:
            build_archive(
                list_source(folder),
                Path(temp) / 'crops',
                transform='fundus',
                width=size,
                height=size,
                workers=threads,
            )
            shutil.rmtree(crops, ignore_errors=True)
            shutil.move(Path(temp) / 'crops', crops)

    found = {'whole': each(whole)}
    if load_pictures is not None:
        found[PLAIN] = each(plain)
        found['scaled'] = lambda: load_pictures(paths, size, threads=threads)
        found |= {name: each(read) for name, read in ways_to_decode(2 * size).items()}
    rates = {name: rate(work, len(paths)) for name, work in found.items()}
    return rates | {'crop': rate(crop, len(paths))}


def difference(one: Path, other: Path) -> tuple[float, float]:
    """Mean difference of the crops in grey levels, and the share of values over 16 apart."""
    pairs = zip(find_images(one), find_images(other), strict=True)
    apart = np.stack(
        [
            np.abs(np.asarray(load_rgb(a), np.int16) - np.asarray(load_rgb(b), np.int16))
            for a, b in pairs
        ]
    )
    return float(apart.mean()), float((apart > 16).mean())


def build_parser() -> argparse.ArgumentParser:
    lines = __doc__.splitlines()
    p = parser(lines[0], epilog='\n'.join(lines[1:]))
    p.add_argument(
        '--size',
        type=power_of_two,
        nargs='+',
        default=[512, 256],
        metavar='PX',
        help='wanted sides',
    )
    p.add_argument('--n', type=positive_int, default=12, metavar='N', help='photographs')
    p.add_argument('--threads', type=positive_int, default=2, metavar='N', help='that decode')
    p.add_argument('--against', metavar='FOLDER', help='another checkout, measured beside')
    p.add_argument('--json', action='store_true', help='print JSON, of the project on PYTHONPATH')
    p.add_argument('--photographs', type=Path, metavar='DIR', help='with --json: the photographs')
    p.add_argument('--crops', type=Path, metavar='DIR', help='with --json: where crops are left')
    return p


def report(found: dict[str, dict[str, Rate]], size: int) -> None:
    """Prints what was measured, by checkout ('now', 'before') and way."""
    print(f'| into {size} x {size} | photographs a second of a core | cores in use |')
    print('|---|---|---|')
    for name, rates in found.items():
        for way, (speed, cores) in rates.items():
            print(f'| {way}, {name} | {speed:.1f} | {cores:.2f} |')
    now = found['now']
    for way in (PLAIN, 'whole'):
        print(f'reading scaled over {way}: {now["scaled"][0] / now[way][0]:.1f} times')
    if before := found.get('before'):
        print(f'over whole, before: {now["scaled"][0] / before["whole"][0]:.1f} times')
        print(f'cropping, over before: {now["crop"][0] / before["crop"][0]:.1f} times')


def main(argv: list[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    if opts.json:
        print(json.dumps(measure(opts.photographs, opts.size[0], opts.threads, opts.crops)))
        return 0
    from benchmarks.against import told_elsewhere  # above, it would be that of the other checkout

    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp) / 'photographs'
        make_photographs(folder, opts.n)
        mean_size = np.mean([path.stat().st_size for path in find_images(folder)])
        print(f'{opts.n} JPEGs of {FRAME[0]} x {FRAME[1]}, {mean_size / 1e6:.2f} MB each')
        checkouts = {'now': str(ROOT)} | ({'before': opts.against} if opts.against else {})
        failed = False
        for size in opts.size:
            options = ['--json', f'--size={size}', f'--threads={opts.threads}']
            options += [f'--photographs={folder}']
            found = {
                name: told_elsewhere(checkout, __file__, [*options, f'--crops={Path(temp) / name}'])
                for name, checkout in checkouts.items()
            }
            report(found, size)
            if opts.against:
                mean, apart = difference(Path(temp) / 'now', Path(temp) / 'before')
                print(
                    f'crops differ by {mean:.2f} grey levels on average (at most {MOST_MEAN:g}), '
                    f'{apart:.2%} of values by over 16 (at most {MOST_APART:.1%})'
                )
                failed |= mean > MOST_MEAN or apart > MOST_APART
    return int(failed)


if __name__ == '__main__':
    run(main)
