"""Signs a verified release, so that recipients know whose it is.

    python scripts/sign_release.py --make_key institution.pem
    python scripts/sign_release.py runs/aptos_k5/release --key institution.pem

The first line makes a key, once: `institution.pem` stays secret, `institution.pem.pub` is published
where recipients trust it. The second writes the signature beside the folder, as `release.sig`.
Recipients check it with scripts/verify_release.py RELEASE --public_key institution.pem.pub.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anonymization.audit import audit_release, report_text
from anonymization.signature import make_key, sign
from utils import cli
from utils.errors import UserError
from utils.logs import setup_logging


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
    p.add_argument('release', type=Path, nargs='?', metavar='RELEASE', help='release folder')
    p.add_argument('--key', type=Path, metavar='PEM', help='private Ed25519 key to sign with')
    p.add_argument(
        '--make_key',
        type=Path,
        metavar='PEM',
        help='make a new private key, and its public one beside it',
    )
    return p


@cli.names_flags(build_parser)
def main(argv: list[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    if opts.make_key is not None:
        if opts.release is not None or opts.key is not None:
            raise UserError('--make_key makes a key and signs nothing; give it alone')
        print(
            f'public key:  {make_key(opts.make_key)}\n'
            f'private key: {opts.make_key} (keep it secret, and outside of release folders)'
        )
        return 0
    if opts.release is None or opts.key is None:
        raise UserError('name a release folder and --key, or --make_key')
    audit = audit_release(opts.release)
    if not audit.passed:
        print(report_text(audit))
        print('THE RELEASE FAILS: it is not signed')
        return 1
    print(f'signature: {sign(opts.release, opts.key)}')
    return 0


if __name__ == '__main__':
    cli.run(main)
