"""Compares the groupings: squared error, time against n, and peak memory.

    python benchmarks/cluster.py                       # error of every method
    python benchmarks/cluster.py --long                # ... and of long runs
    python benchmarks/cluster.py --scaling --plot docs/grouping_time.png
    python benchmarks/cluster.py --memory              # 88,702 x 8192 features from disk

Features are drawn from a seed unless --features names a file. Errors are SSE / SST in per cent:
0 is no loss of information, 100 a single group. The memory run writes a temporary file of
n x 8192 float32 (2.9 GB) and removes it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import platform
import resource
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from scipy.spatial.distance import pdist, squareform

from anonymization.grouping import assign_groups, squared_errors
from utils.cli import parser_of, positive_int, resolve_device, run

DATA = {
    'gaussian': 'isotropic, 512-d',
    'decay': 'Gaussian, 512-d, spectrum 1/i^1.4',
    'low-rank': '12 directions in 512-d plus noise',
    'mixture': '30 clusters, 64-d',
}


def draw(name: str, n: int, seed: int = 0) -> Float64[np.ndarray, 'n d']:
    """[n, d] float64 features of a kind of DATA."""
    rng = np.random.default_rng(seed)
    if name == 'gaussian':
        return rng.standard_normal((n, 512))
    if name == 'decay':
        return rng.standard_normal((n, 512)) * np.arange(1, 513) ** -0.7
    if name == 'low-rank':
        scores = rng.standard_normal((n, 12)) * np.linspace(3, 1, 12)
        return scores @ rng.standard_normal((12, 512)) + 0.35 * rng.standard_normal((n, 512))
    centres = 1.5 * rng.standard_normal((30, 64))
    spread = rng.standard_normal((n, 64)) * 2 / np.sqrt(1 + np.arange(64))
    rotation = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    return centres[rng.integers(0, 30, n)] + spread @ rotation


def plain_published(features: Float[np.ndarray, 'n d'], k: int) -> Int64[np.ndarray, ' n']:
    """The paper's greedy as published: all distances at once, row sums afresh for every group."""
    distances = squareform(pdist(features))
    np.fill_diagonal(distances, np.nan)
    labels = np.zeros(len(features), np.int64)
    for group in range(1, len(features) // k + 1):
        sums = np.nansum(distances, axis=1)
        sums[labels > 0] = -1
        seed = sums.argmax()
        members = np.append(np.argsort(distances[seed], kind='stable')[: k - 1], seed)
        labels[members] = group
        distances[members] = np.nan
        distances[:, members] = np.nan
    return labels


def machine() -> str:
    name = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.exists():
        names = [
            line.split(':')[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith('model name')
        ]
        name = names[0] if names else name
    return (
        f'{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, '
        f'torch {torch.__version__}, NumPy {np.__version__}'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print('| ' + ' | '.join(head) + ' |')
    print('|' + ' --- |' * len(head))
    for row in rows:
        print('| ' + ' | '.join(row) + ' |', flush=True)
    print()


def compare(args: argparse.Namespace) -> None:
    """Squared error and seconds of each method, per kind of features."""
    kinds = (
        {args.features: np.load(args.features, mmap_mode='r')}
        if args.features
        else {name: draw(name, args.n) for name in DATA}
    )
    methods: dict[str, dict[str, Any]] = {
        m: {'method': m} for m in ('published', 'mdav', 'kmeans-constrained', 'default')
    }
    if args.long:
        methods['long runs'] = dict(rounds=1000, block=640, tolerance=1e-6, restarts=2)
    rows = []
    for name, features in kinds.items():
        features = features.reshape(len(features), -1)
        reference = None
        for label, options in methods.items():
            begin = time.perf_counter()
            found = assign_groups(
                features, args.k, reduce=args.reduce, device=args.device, **options
            )
            seconds = time.perf_counter() - begin
            reference = reference or found.sse
            rows.append(
                [
                    name,
                    DATA.get(name, ''),
                    label,
                    f'{found.sse:,.0f}',
                    f'{100 * found.info["sse_ratio"]:.2f}',
                    f'{100 * (1 - found.sse / reference):+.2f}',
                    f'{seconds:.1f}',
                ]
            )
    print(f'n = {len(features)}, k = {args.k}; {machine()}\n')
    table(['features', '', 'method', 'SSE', 'SSE/SST %', 'below published greedy %', 's'], rows)


def scaling(args: argparse.Namespace) -> None:
    """Seconds against n of the default, the greedy with kept sums, and the greedy as published."""
    times: dict[str, dict[int, float]] = {
        'default': {},
        'greedy, O(n d) memory': {},
        'greedy as published': {},
    }
    rows = []
    for n in args.sizes:
        features = draw('low-rank', n).astype(np.float32)
        row = [f'{n:,}']
        for name, limit, call in (
            (
                'default',
                None,
                lambda x: assign_groups(x, args.k, reduce=args.reduce, device=args.device),
            ),
            (
                'greedy, O(n d) memory',
                args.greedy_max,
                lambda x: assign_groups(
                    x, args.k, method='published', reduce=args.reduce, device=args.device
                ),
            ),
            ('greedy as published', args.plain_max, lambda x: plain_published(x, args.k)),
        ):
            if limit is not None and n > limit:
                row.append('not run')
                continue
            begin = time.perf_counter()
            call(features)
            times[name][n] = time.perf_counter() - begin
            row.append(f'{times[name][n]:.1f}')
        rows.append(row)
        print(f'n = {n}: {row[1:]}', file=sys.stderr)
    print(f'seconds, k = {args.k}, low-rank features, 512-d; {machine()}\n')
    table(['n', *times], rows)
    if args.plot:
        plot(times, args.plot)


def plot(times: dict[str, dict[int, float]], path: str) -> None:
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout='constrained')
    for name, points in times.items():
        axes.loglog(list(points), list(points.values()), marker='o', label=name)
    plain = times['greedy as published']
    if plain:
        last = max(plain)
        sizes = np.array([last, max(times['default'])])
        axes.loglog(
            sizes,
            plain[last] * (sizes / last) ** 3,
            linestyle=':',
            color='grey',
            label='growth with the cube of n',
        )
    axes.set(xlabel='images', ylabel='seconds')
    axes.grid(alpha=0.3, which='both')
    axes.legend()
    figure.savefig(path, dpi=120, metadata={'Software': None})


def memory(args: argparse.Namespace) -> None:
    """Time and peak memory for features that are read from disk."""
    n, d = args.sizes[-1], 8192
    with tempfile.TemporaryDirectory(dir=args.temp_dir) as folder:
        path = Path(folder) / 'features.npy'
        features = np.lib.format.open_memmap(path, mode='w+', dtype=np.float32, shape=(n, d))
        rng = np.random.default_rng(0)
        directions = rng.standard_normal((100, d), dtype=np.float32)
        scale = (np.arange(1, 101) ** -0.5).astype(np.float32)
        for start in range(0, n, 2000):
            rows = min(2000, n - start)
            block = (rng.standard_normal((rows, 100), dtype=np.float32) * scale) @ directions
            block += 0.3 * rng.standard_normal((rows, d), dtype=np.float32)
            features[start : start + rows] = block
            features.flush()
        del features
        begin, busy = time.perf_counter(), time.process_time()
        found = assign_groups(
            np.load(path, mmap_mode='r'), args.k, reduce=args.reduce, device=args.device
        )
        seconds, busy = time.perf_counter() - begin, time.process_time() - busy
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        # A yardstick for the error: groups of neighbours along the file, which is random.
        chance = np.arange(n) // args.k
        chance[chance == n // args.k] = 0
        random_sse, sst = squared_errors(np.load(path, mmap_mode='r'), chance + 1)
    kept = found.info['reduction']
    print(f'k = {args.k}; {machine()}\n')
    table(
        [
            'n x d',
            'seconds',
            'CPU seconds',
            'peak GiB',
            'dimensions kept',
            'variance kept %',
            'SSE/SST %',
            'SSE/SST % of random groups',
        ],
        [
            [
                f'{n:,} x {d}',
                f'{seconds:.0f}',
                f'{busy:.0f}',
                f'{peak:.2f}',
                str(kept['dims']) if kept else 'all',
                f'{100 * kept["kept_variance"]:.2f}' if kept else '100',
                f'{100 * found.info["sse_ratio"]:.2f}',
                f'{100 * random_sse / sst:.2f}',
            ]
        ],
    )


def build_parser() -> argparse.ArgumentParser:
    p = parser_of(__doc__)
    mode = p.add_mutually_exclusive_group()
    mode.add_argument('--scaling', action='store_true', help='time against n')
    mode.add_argument('--memory', action='store_true', help='features from disk')
    p.add_argument('--long', action='store_true', help='also the best of two long runs')
    p.add_argument('--features', metavar='NPY', help='file of [n, ...] features to compare on')
    p.add_argument('--n', type=positive_int, default=3000, metavar='INT', help='images')
    p.add_argument('--k', type=positive_int, default=5, metavar='INT', help='group size')
    p.add_argument(
        '--sizes',
        type=positive_int,
        nargs='+',
        metavar='INT',
        default=[1000, 3000, 10000, 30000, 88702],
        help='for --scaling; --memory takes the last',
    )
    p.add_argument(
        '--plain_max',
        type=positive_int,
        default=5000,
        metavar='INT',
        help='largest n for the greedy as published',
    )
    p.add_argument(
        '--greedy_max',
        type=positive_int,
        default=30000,
        metavar='INT',
        help='largest n for the greedy with kept sums',
    )
    p.add_argument(
        '--reduce',
        type=positive_int,
        metavar='INT',
        help='principal directions; by default all, above 1 GiB of features 256',
    )
    p.add_argument('--device', default='cpu', help='cpu, cuda, cuda:N or auto')
    p.add_argument('--plot', metavar='PNG', help='where --scaling draws its curves')
    p.add_argument('--temp_dir', metavar='DIR', help='for the file of --memory')
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.reduce = args.reduce or 'auto'
    args.device = resolve_device(args.device)
    (scaling if args.scaling else memory if args.memory else compare)(args)
    return 0


if __name__ == '__main__':
    run(main)
