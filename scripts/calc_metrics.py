"""Compares synthetic with real pictures: distances, precision, coverage, vessels, sharpness.

    python scripts/calc_metrics.py REAL SYNTHETIC
    python scripts/calc_metrics.py real.zip RUN/release/images --metrics fundus,inception \\
        --content_weights content.pt --inception_weights pt_inception-2015-12-05-6726825d.pth

REAL and SYNTHETIC are folders (searched recursively) or ZIP archives; contact sheets (grid.png of
scripts/generate.py) do not count. `features` takes pooled features of the networks --features
(FD-lite1; no further file is needed), `fundus` those of the project's content encoder
(FD-fundus), `inception` those of FID; their statistics come with bootstrap intervals, and the
distances with those of real against real pictures as the yardstick. `detail` compares the amount
of vessels and the power at high frequencies, `spectrum` radial power spectra. A network that the
manifest of a release names among its makers does not judge it alone, and is marked.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import contextlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from evaluation.features import Network, load_feature_network, picture_names, read_pictures
from evaluation.fidelity import compare_pictures, fidelity, scaled
from evaluation.judges import Judge, load_judges, networks_of
from evaluation.probe import pooled_features
from evaluation.spectra import high_frequency_ratio, sharpness
from evaluation.vessel_amount import vessel_ratios
from models.features.pretrained import SMALLEST_SIDE
from utils.cli import add_common, names_flags, parser_of, positive_int, resolve_device, run
from utils.errors import UserError, listing
from utils.logs import setup_logging
from utils.runs import versions

log = logging.getLogger(__name__)

KINDS = ('features', 'fundus', 'inception', 'detail', 'spectrum')
DETAIL = {'area': 'vessel area', 'length': 'vessel length', 'high_frequencies': 'fine texture'}
LABELS = {'fundus': ('FD-fundus', 'KID-fundus'), 'inception': ('FID', 'KID')}


def build_parser() -> argparse.ArgumentParser:
    p = parser_of(__doc__)
    p.add_argument('real', type=Path, metavar='REAL', help='real pictures')
    p.add_argument('synthetic', type=Path, metavar='SYNTHETIC', help='synthetic pictures')
    p.add_argument(
        '--metrics',
        metavar='LIST',
        help=f'comma-separated: {", ".join(KINDS)} (default: detail, spectrum, what '
        'weights are given for, and without those of Inception features)',
    )
    p.add_argument(
        '--features',
        nargs='+',
        default=['lite1'],
        metavar='NAME',
        help='networks of `features`: lite0, lite1, lite2',
    )
    p.add_argument(
        '--content_weights',
        type=Path,
        metavar='FILE',
        help='content encoder (scripts/train_content_encoder.py) or MoCo weights',
    )
    p.add_argument(
        '--inception_weights',
        type=Path,
        metavar='FILE',
        help='pt_inception-2015-12-05-6726825d.pth; nothing is downloaded',
    )
    p.add_argument(
        '--n_bootstrap',
        type=positive_int,
        default=100,
        metavar='INT',
        help='draws for the intervals',
    )
    p.add_argument(
        '--batch_size',
        '--batch-size',
        type=positive_int,
        default=32,
        metavar='INT',
        help='pictures per pass',
    )
    p.add_argument(
        '--out',
        type=Path,
        metavar='FILE',
        help='append the numbers as one line to this JSON-lines file',
    )
    return add_common(p)


def chosen(opts: argparse.Namespace) -> list[str]:
    """The kinds of statistics to compute."""
    if opts.metrics is None:
        given = {
            'features': not opts.inception_weights,
            'fundus': opts.content_weights,
            'inception': opts.inception_weights,
        }
        return [k for k in KINDS if given.get(k, True)]
    kinds = [k for k in opts.metrics.split(',') if k]
    unknown = [k for k in kinds if k not in KINDS]
    if unknown or not kinds:
        raise UserError(f'--metrics {opts.metrics}: choose from {", ".join(KINDS)}')
    return kinds


def picture_side(path: str | Path, *, one_size: bool) -> int:
    """Shorter side of the first picture of a folder or ZIP.

    one_size: UserError when the pictures are not all of one size, as those of a generator or a
    release are; something else lies among them then.
    """
    store, names = picture_names(path)
    sizes = {}
    for name in names:
        with contextlib.suppress(UserError):  # unreadable ones are listed when all are read
            sizes[name] = store.size(name)
    if not sizes:
        raise UserError(f'{path}: none of its {len(names)} images can be read')
    if one_size:
        common, _ = Counter(sizes.values()).most_common(1)[0]
        others = [f'{name}: {w}x{h}' for name, (w, h) in sizes.items() if (w, h) != common]
        if others:
            raise UserError(
                listing(
                    f'{path} holds {len(sizes) - len(others)} pictures of '
                    f'{common[0]}x{common[1]} and {len(others)} of another '
                    'size; give a folder of the synthetic pictures alone',
                    others,
                )
            )
    return min(next(iter(sizes.values())))


def table(results: dict[str, Any]) -> str:
    """Printable rows: statistic, value, interval, real against real."""
    lines = [f'{"statistic":<24}{"value":>10}  {"95 % interval":<22}{"real split":>10}']
    for kind, found in results.items():
        if kind == 'detail':
            for name, title in DETAIL.items():
                score = found[name]
                lines.append(
                    f'{title:<24}{score["value"]:>10.4f}  {score["low"]:.4f} to {score["high"]:.4f}'
                )
            continue
        if kind == 'spectrum':
            for name in ('high_frequency_ratio', 'log_spectrum_rmse'):
                lines.append(f'{name:<24}{found[name]:>10.4f}')
            continue
        split = found['real_split'] or {}
        fd, kid = LABELS.get(kind, (f'FD-{kind}', f'KID-{kind}'))
        names = {
            'fd': fd,
            'kid': kid,
            **{n: f'{n} ({kind})' for n in ('precision', 'recall', 'density', 'coverage')},
        }
        for key, name in names.items():
            score = found[key]
            yardstick = f'{split[key]:.4f}' if key in split else ''
            interval = f'{score["low"]:.4f} to {score["high"]:.4f}'
            lines.append(f'{name:<24}{score["value"]:>10.4f}  {interval:<22}{yardstick:>10}')
        lines.append(
            f'  n = {found["n_real"]} real, {found["n_fake"]} synthetic, '
            f'{found["dim"]} dimensions'
            + (', fewer pictures than dimensions' if found['rank_deficient'] else '')
        )
        if split:
            lines.append(f'  real split: {split["n_reference"]} against {split["n_sample"]}')
    return '\n'.join(lines)


def detail(
    real: UInt8[np.ndarray, 'n 3 S S'], synthetic: UInt8[np.ndarray, 'm 3 S S'], seed: int
) -> dict:
    """Vessels and power at high frequencies, synthetic over real."""
    return {
        **vessel_ratios(real, synthetic, seed=seed),
        'high_frequencies': high_frequency_ratio(real, synthetic, seed=seed),
    }


def judged(
    judge: Judge,
    pictures: Sequence[UInt8[np.ndarray, '_ 3 S S']],
    opts: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """The statistics of real and synthetic pictures by the pooled features of one network."""
    real, synthetic = (
        scaled(pooled_features(judge.network, u8, device=device, batch_size=opts.batch_size))
        for u8 in pictures
    )
    return fidelity(real, synthetic, n_bootstrap=opts.n_bootstrap, seed=opts.seed)


def compute(
    opts: argparse.Namespace,
    kinds: Sequence[str],
    judges: Sequence[Judge],
    networks: dict[str, Network],
    device: torch.device,
) -> dict[str, Any]:
    """The statistics of every kind, by the names under which the table shows them."""
    side = min(picture_side(opts.real, one_size=False), picture_side(opts.synthetic, one_size=True))
    pictures = []
    if set(kinds) - LABELS.keys():
        pictures = [read_pictures(path, side) for path in (opts.real, opts.synthetic)]
    if judges and side < SMALLEST_SIDE and opts.metrics is None:
        log.warning(
            'pictures of %d px are too small for %s: left out',
            side,
            ', '.join(j.label for j in judges),
        )
        judges = []
    results = {judge.label: judged(judge, pictures, opts, device) for judge in judges}
    for kind, network in networks.items():
        results[kind] = compare_pictures(
            opts.real,
            opts.synthetic,
            network,
            device=device,
            n_bootstrap=opts.n_bootstrap,
            seed=opts.seed,
            batch_size=opts.batch_size,
        )
    if 'detail' in kinds:
        real, synthetic = pictures
        results['detail'] = detail(real, synthetic, opts.seed)
    if 'spectrum' in kinds:
        results['spectrum'] = sharpness(*pictures)
    return results


@names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    kinds = chosen(opts)
    device = resolve_device(opts.device)
    networks = {
        kind: load_feature_network(
            metric='fd_fundus' if kind == 'fundus' else 'fid',
            content_weights=opts.content_weights,
            inception_weights=opts.inception_weights,
        )
        for kind in kinds
        if kind in LABELS
    }
    judges = (
        load_judges(opts.features, [networks_of(opts.synthetic)]) if 'features' in kinds else []
    )
    results = compute(opts, kinds, judges, networks, device)
    count = {
        name: len(picture_names(path)[1])
        for name, path in (('n_real', opts.real), ('n_synthetic', opts.synthetic))
    }
    print(f'{count["n_real"]} real and {count["n_synthetic"]} synthetic pictures')
    print(table(results))
    if opts.out is not None:
        facts = {'real': str(opts.real), 'synthetic': str(opts.synthetic), **count}
        row = {**facts, 'seed': opts.seed, 'versions': versions(), **results}
        opts.out.parent.mkdir(parents=True, exist_ok=True)
        with open(opts.out, 'a', encoding='utf-8') as file:
            file.write(json.dumps(row) + '\n')
    return 0


if __name__ == '__main__':
    run(main)
