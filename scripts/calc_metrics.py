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
import json
from collections.abc import Sequence

from evaluation.features import load_feature_network, picture_names
from evaluation.folders import LABELS, Comparison, table
from evaluation.judges import load_judges, networks_of
from utils.cli import add_common, names_flags, parser_of, positive_int, resolve_device, run
from utils.errors import UserError
from utils.logs import setup_logging
from utils.runs import versions

KINDS = ('features', 'fundus', 'inception', 'detail', 'spectrum')


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
    compare = Comparison(
        judges,
        networks,
        detail='detail' in kinds,
        spectrum='spectrum' in kinds,
        small_too=opts.metrics is not None,
        n_bootstrap=opts.n_bootstrap,
        batch_size=opts.batch_size,
        seed=opts.seed,
        device=device,
    )
    results = compare(opts.real, opts.synthetic)
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
