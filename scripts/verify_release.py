"""Checks independently that a release is what its groups and its run record say.

    python scripts/verify_release.py runs/aptos_k5/release --private runs/aptos_k5/private
    python scripts/verify_release.py release --public_key institution.pem.pub

With --private, the maker's way: pages, labels and manifest are derived again and compared byte for
byte, pictures with the digests of the run; groups are counted anew in distinct patients, and with
--recompute pictures are synthesised anew. Messages carry no source id; what does is written to
audit.json in the private folder. Without --private, what a recipient can check: names, form,
schema, sums and hashes, and with --public_key the signature. Exit code 0 when all is well, 1 when
not, 2 when the check could not be made.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure

from anonymization.audit import audit_release, plot_distances, report_dict, report_text
from anonymization.publish import write_audit
from anonymization.release import check_outside_release
from anonymization.signature import check_signature, signature_path
from datasets.table import Table, read_table
from utils import cli
from utils.errors import UserError
from utils.io import atomic_path, write_json
from utils.logs import setup_logging


def _how_many(text: str) -> int | None:
    return None if text == 'all' else cli.nonnegative_int(text)


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
    p.add_argument('release', type=Path, metavar='RELEASE', help='release folder')
    p.add_argument('--private', type=Path, metavar='DIR', help='the private folder of the same run')
    p.add_argument(
        '--data_path',
        '--image_dir',
        type=Path,
        metavar='DIR',
        help='folder of the photographs (default: as in the run)',
    )
    p.add_argument(
        '--df', '--table', type=Path, metavar='CSV', help='their table (default: as in the run)'
    )
    p.add_argument(
        '--recompute',
        type=_how_many,
        default=0,
        metavar='N',
        help='synthesise N pictures anew from the latents of their groups, or "all"',
    )
    p.add_argument(
        '--checkpoint_path',
        '--checkpoint',
        type=Path,
        metavar='FILE',
        help='networks for --recompute (default: as in the run)',
    )
    p.add_argument(
        '--device',
        default='auto',
        metavar='DEVICE',
        help='for --recompute: cpu, cuda, cuda:N, or auto',
    )
    p.add_argument(
        '--public_key', type=Path, metavar='PEM', help='check the signature with this Ed25519 key'
    )
    p.add_argument(
        '--signature',
        type=Path,
        metavar='FILE',
        help='signature file (default: RELEASE.sig beside the folder)',
    )
    p.add_argument(
        '--out',
        type=Path,
        metavar='JSON',
        help='also write the verdict here, without source ids, and the distances beside it as .png',
    )
    return p


def source_table(opts: argparse.Namespace) -> Table:
    """The table of the photographs, from the flags or from the run's own record."""
    try:
        record = json.loads((opts.private / 'options.json').read_text(encoding='utf-8'))['options']
        df, data_path = opts.df or record['df'], opts.data_path or record['data_path']
        split, n_images = record.get('split'), record.get('n_images')
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{opts.private} is not the private folder of a run (options.json is '
            'missing or damaged)'
        ) from error
    if df is None:
        raise UserError('this run was made without a table file; name one with --df')
    return read_table(df, data_path, split=split, n_images=n_images)


def check_flags(opts: argparse.Namespace) -> None:
    """Flags that mean nothing without another."""
    for flag in ('data_path', 'df', 'recompute', 'checkpoint_path'):
        if opts.private is None and getattr(opts, flag) not in (None, 0):
            raise UserError(f'--{flag} needs --private')
    if opts.private is None and opts.recompute is None:
        raise UserError('--recompute needs --private')
    if opts.out is not None:
        check_outside_release(opts.out, '--out')
    if opts.signature is not None and opts.public_key is None:
        raise UserError('--signature needs --public_key')


@cli.names_flags(build_parser)
def main(argv: list[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    check_flags(opts)
    if opts.release.is_file():
        raise UserError(f'{opts.release} is a file; name the release folder')
    table = source_table(opts) if opts.private else None
    audit = audit_release(
        opts.release,
        private=opts.private,
        source_table=table,
        recompute_n=opts.recompute,
        checkpoint=opts.checkpoint_path,
        device=cli.resolve_device(opts.device) if opts.recompute != 0 else 'cpu',
    )
    if opts.public_key is not None:
        audit.checks.append(check_signature(opts.release, opts.public_key, opts.signature))
    elif signature_path(opts.release).exists():
        audit.notes.append('there is a signature; --public_key would check it')
    if opts.private is not None:
        write_audit(opts.private, opts.release, audit)
    if opts.out is not None:
        write_json(opts.out, report_dict(audit))
        if audit.distances is not None:
            figure = Figure(figsize=(8, 4), layout='constrained')
            plot_distances(audit, figure.subplots())
            with atomic_path(opts.out.with_suffix('.png')) as temp:
                figure.savefig(temp, format='png')
    print(report_text(audit))
    if not audit.passed and any(c.private for c in audit.checks) and opts.private is not None:
        print(f'names and ids: {opts.private / "audit.json"}')
    kept = (
        'the release keeps its promises'
        if opts.private is not None
        else 'the release is of the known form and its files agree; whether its pictures are '
        'those of its groups, only --private can tell'
    )
    print(kept if audit.passed else 'THE RELEASE FAILS: do not share it')
    return 0 if audit.passed else 1


if __name__ == '__main__':
    cli.run(main)
