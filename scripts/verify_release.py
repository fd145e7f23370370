"""Checks independently that a release keeps its promises.

    python scripts/verify_release.py runs/aptos_k5/release --private runs/aptos_k5/private

With --private: group sizes in distinct patients, disjoint groups, names and texts free of source
ids, no copy of a photograph, grade diversity. Without it, only what any recipient can check:
files and hashes, pictures and metadata, labels. Exit code 0 when all is well, 1 when not.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json

from matplotlib.figure import Figure

from anonymization.audit import audit_release, plot_distances, report_dict, report_text
from datasets.table import read_table
from utils import cli
from utils.errors import UserError
from utils.io import atomic_path, write_json
from utils.logs import setup_logging


def build_parser():
    p = cli.parser(__doc__.splitlines()[0], '\n'.join(__doc__.splitlines()[1:]))
    p.add_argument('release', type=Path, metavar='RELEASE', help='release folder')
    p.add_argument('--private', type=Path, metavar='DIR', help='the private folder of the same run')
    p.add_argument('--data_path', type=Path, metavar='DIR',
                   help='folder of the photographs (default: as in the run)')
    p.add_argument('--df', type=Path, metavar='CSV', help='their table (default: as in the run)')
    p.add_argument('--out', type=Path, metavar='JSON',
                   help='also write the verdict here, and the distances beside it as .png')
    return p


def source_table(opts):
    """The table of the photographs, from the flags or from the run's own record."""
    try:
        record = json.loads((opts.private / 'options.json').read_text(encoding='utf-8'))['options']
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f'{opts.private} is not the private folder of a run: {error}') from error
    df, data_path = opts.df or record['df'], opts.data_path or record['data_path']
    table = read_table(df, data_path, split=record.get('split'))
    if record.get('n_images'):
        table = table.subset(range(min(record['n_images'], len(table))))
    return table


def main(argv=None):
    opts = build_parser().parse_args(argv)
    setup_logging()
    table = source_table(opts) if opts.private else None
    audit = audit_release(opts.release, private=opts.private, source_table=table)
    if opts.out is not None:
        write_json(opts.out, report_dict(audit))
        if audit.distances is not None:
            figure = Figure(figsize=(8, 4), layout='constrained')
            plot_distances(audit, figure.subplots())
            with atomic_path(opts.out.with_suffix('.png')) as temp:
                figure.savefig(temp, format='png')
    print(report_text(audit))
    print('the release keeps its promises' if audit.passed else
          'THE RELEASE FAILS: do not share it')
    return 0 if audit.passed else 1


if __name__ == '__main__':
    cli.run(main)
