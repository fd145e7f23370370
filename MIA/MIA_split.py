"""Splits a table into members, whose release is attacked, and a population never used.

    python MIA/MIA_split.py --df labels.csv --image_dir photos/ --out_dir split/

Whole patients fall on one side, and identical photographs show one patient. Writes members.csv
(make the release from it), others.csv (make a second release from it to test the trained attack
on, or take it as non-members) and split.csv, the record. All three name photographs: keep them
private.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import logging
from collections.abc import Sequence

import pandas as pd

from datasets.people import merge_identical
from datasets.table import read_table
from evaluation.splits import MEMBER, OTHER, split_by_patient, split_table
from utils import cli
from utils.errors import UserError
from utils.io import write_csv
from utils.logs import setup_logging
from utils.runs import run_record, start_run

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
    p.add_argument(
        '--df', '--table', type=Path, required=True, metavar='CSV', help='table of photographs'
    )
    p.add_argument(
        '--image_dir',
        type=Path,
        metavar='DIR',
        help='their folder (default: images/ beside the table)',
    )
    p.add_argument(
        '--members',
        type=cli.fraction,
        default=0.5,
        metavar='SHARE',
        help='share of the patients that become members',
    )
    p.add_argument('--out_dir', type=Path, required=True, metavar='DIR', help='new folder')
    p.add_argument('--seed', type=cli.nonnegative_int, default=0, metavar='INT', help='random seed')
    return p


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    table = read_table(opts.df, opts.image_dir)
    if table.patients is None:
        log.warning(
            '%s has no patient column: images are split, and two images of one person '
            'may fall on different sides',
            opts.df,
        )
    table = merge_identical(table)
    roles = split_by_patient(table.patients or table.ids, opts.members, seed=opts.seed)
    record = run_record({'members': opts.members}, inputs={'df': opts.df}, seed=opts.seed)
    if start_run(opts.out_dir, record, resume=True):
        raise UserError(f'{opts.out_dir} already holds this split')
    frame = pd.read_csv(opts.df, dtype=str, keep_default_na=False)
    for role in (MEMBER, OTHER):
        write_csv(opts.out_dir / f'{role}s.csv', frame[[r == role for r in roles]])
    write_csv(opts.out_dir / 'split.csv', split_table(table, roles))
    print(
        f'{roles.count(MEMBER)} photographs of members, {roles.count(OTHER)} of others: '
        f'{opts.out_dir}'
    )
    return 0


if __name__ == '__main__':
    cli.run(main)
