"""Draws fundus phantoms: procedural colour fundus photographs with known vessels and lesions.

    python scripts/make_phantoms.py --out_dir=phantoms --n_patients=500 --size=256 --visits=2

Writes images/<id_code>.png, labels.csv (id_code, diagnosis, patient_id, eye, visit), with
--masks the vessel masks, and contact_sheet.png. The same flags give the same bytes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import logging
from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from datasets.phantoms import EYES, GRADE_SHARES, MAX_SIZE, MIN_SIZE, make_dataset
from utils.cli import fraction, nonnegative_int, parser_of, positive_int, run
from utils.errors import UserError
from utils.images import grid, load_tensor, save_png
from utils.logs import setup_logging
from utils.runs import run_record, start_run

log = logging.getLogger(__name__)

_SHEET_PER_GRADE = 6


def grade_shares(text: str) -> list[float]:
    """Five numbers, the shares of grades 0 to 4."""
    try:
        shares = [float(v) for v in text.split(',')]
    except ValueError:
        shares = []
    if len(shares) != 5 or min(shares) < 0 or sum(shares) <= 0:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not five shares such as 0.5,0.12,0.22,0.08,0.08'
        )
    return shares


def build_parser() -> argparse.ArgumentParser:
    p = parser_of(__doc__)
    p.add_argument('--out_dir', required=True, type=Path, metavar='DIR', help='a new folder')
    p.add_argument(
        '--n_patients', required=True, type=positive_int, metavar='INT', help='patients to draw'
    )
    p.add_argument(
        '--size',
        type=positive_int,
        default=256,
        metavar='PX',
        help=f'width of the pictures, {MIN_SIZE} to {MAX_SIZE}',
    )
    p.add_argument(
        '--visits', type=positive_int, default=1, metavar='INT', help='photographs of each eye'
    )
    p.add_argument('--eyes', choices=(*EYES, 'both'), default='both', help='which eyes')
    p.add_argument(
        '--grades',
        type=grade_shares,
        metavar='S0,..,S4',
        default=','.join(map(str, GRADE_SHARES)),
        help='shares of grades 0 to 4',
    )
    p.add_argument(
        '--progression',
        type=fraction,
        default=0.0,
        metavar='P',
        help='chance that the grade of an eye rises by one from a visit to the next',
    )
    p.add_argument('--masks', action='store_true', help='write vessel masks too')
    p.add_argument('--seed', type=nonnegative_int, default=0, metavar='INT', help='random seed')
    p.add_argument('--workers', type=positive_int, default=1, metavar='INT', help='processes')
    return p


def contact_sheet(table: pd.DataFrame, image_dir: Path) -> Float[Tensor, '3 H W']:
    """A few pictures of each grade, one row per grade."""
    rows = []
    for _, part in table.groupby('diagnosis'):
        rows += [part.iloc[i % len(part)].id_code for i in range(_SHEET_PER_GRADE)]
    images = [load_tensor(image_dir / f'{name}.png', 192) for name in rows]
    return grid(torch.stack(images), _SHEET_PER_GRADE)


def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    if not MIN_SIZE <= opts.size <= MAX_SIZE:
        raise UserError(f'--size {opts.size}: choose {MIN_SIZE} to {MAX_SIZE}')
    options = {k: v for k, v in vars(opts).items() if k not in ('out_dir', 'workers')}
    start_run(opts.out_dir, run_record(options, seed=opts.seed))
    table = make_dataset(
        opts.out_dir,
        n_patients=opts.n_patients,
        size=opts.size,
        seed=opts.seed,
        visits=opts.visits,
        progression=opts.progression,
        masks=opts.masks,
        eyes=EYES if opts.eyes == 'both' else (opts.eyes,),
        grade_shares=opts.grades,
        workers=opts.workers,
    )
    save_png(contact_sheet(table, opts.out_dir / 'images'), opts.out_dir / 'contact_sheet.png')
    log.info('%d photographs of %d patients in %s', len(table), opts.n_patients, opts.out_dir)
    return 0


if __name__ == '__main__':
    run(main)
