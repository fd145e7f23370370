"""Makes more pictures than groups of a finished run: on the way between two groups of one grade.

    python scripts/walk_release.py --run=runs/release_k5 --out_dir=runs/walk --pictures_per_group=4

Post-processing: latents, names and grades of released groups enter, and which of them share
nobody; no photograph is looked at. A picture on the way stands for the people of two groups, at
least 2 k. Writes images/, labels.csv and manifest.json, once their check has passed; which groups
a picture lies between stays in the run's private/walk.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import logging
from collections.abc import Sequence

from anonymization.audit.walk import check_walk
from anonymization.walk import plan, read_source, write_walk
from utils import cli
from utils.errors import PrivacyError, UserError
from utils.logs import setup_logging

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
    p.add_argument('--run', type=Path, required=True, metavar='DIR', help='run of k-SALSA.py')
    p.add_argument('--out_dir', type=Path, required=True, metavar='DIR', help='a new folder')
    p.add_argument(
        '--pictures_per_group',
        type=cli.positive_int,
        default=2,
        metavar='N',
        help='2 or more; the released picture of the group counts',
    )
    p.add_argument('--seed', type=cli.nonnegative_int, default=0, metavar='INT', help='of the draw')
    return p


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    if opts.pictures_per_group < 2:
        raise UserError('--pictures_per_group 1: that is the release itself; use 2 or more')
    source = read_source(opts.run)
    steps = plan(source.labels.tolist(), source.people, opts.pictures_per_group, seed=opts.seed)
    staging = opts.out_dir.with_name(opts.out_dir.name + '.staging')
    if opts.out_dir.exists():
        raise UserError(f'--out_dir {opts.out_dir} exists; choose a new folder')
    write_walk(source, steps, staging, pictures_per_group=opts.pictures_per_group, seed=opts.seed)
    checks = check_walk(staging, opts.run)
    for check in checks:
        log.info('%s: %s (%s)', 'passed' if check.passed else 'FAILED', check.name, check.detail)
    if not all(check.passed for check in checks):
        raise PrivacyError(f'the pictures fail their check and are not published ({staging})')
    staging.rename(opts.out_dir)
    log.info('%d pictures in %s', len(steps), opts.out_dir)
    return 0


if __name__ == '__main__':
    cli.run(main)
