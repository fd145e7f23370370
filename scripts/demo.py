"""From phantoms to an evaluated release with the embedded weights: what `make demo` does.

    python scripts/demo.py --out_dir=demo_output

Draws photographs of eyes that never existed (scripts/make_phantoms.py) and hands them to
scripts/photos_to_release.py with weights in place of the trainings. A demo that was stopped goes on
when started again.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pandas as pd

from scripts import make_phantoms, photos_to_release
from stages.report import PAGE
from stages.runner import RECORD
from utils import cli
from utils.errors import UserError
from utils.logs import setup_logging

WEIGHTS = ROOT / 'pretrained_models' / 'demo'


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
    p.add_argument(
        '--out_dir', type=Path, default=Path('demo_output'), metavar='DIR', help='output folder'
    )
    p.add_argument(
        '--n_patients',
        type=cli.positive_int,
        default=80,
        metavar='N',
        help='patients to draw, two eyes each',
    )
    p.add_argument(
        '--same_k',
        '--k',
        type=cli.positive_int,
        default=5,
        metavar='K',
        help='fewest distinct patients in a group',
    )
    p.add_argument(
        '--num_steps',
        type=cli.nonnegative_int,
        default=0,
        metavar='STEPS',
        help='optimisation steps per group, with the guide',
    )
    return cli.add_common(p)


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    started = time.monotonic()
    data, run = opts.out_dir / 'phantoms', opts.out_dir / 'run'
    table = data / 'labels.csv'
    if table.exists():
        drawn = pd.read_csv(table).patient_id.nunique()
        if drawn != opts.n_patients:
            raise UserError(
                f'`out_dir` {opts.out_dir}: photographs of {drawn} patients were drawn there, not '
                f'of {opts.n_patients}; choose another folder'
            )
    else:
        # Seed 1128 drew the photographs the weights were trained on; these eyes are new.
        make_phantoms.main(
            [
                f'--out_dir={data}',
                f'--n_patients={opts.n_patients}',
                '--size=128',
                f'--seed={opts.seed + 2}',
            ]
        )
    code = photos_to_release.main(
        [
            f'--photos={data / "images"}',
            f'--labels={table}',
            f'--out={run}',
            '--size=128',
            f'--k={opts.same_k}',
            f'--release_steps={opts.num_steps}',
            f'--encoder_weights={WEIGHTS / "restyle128.pt"}',
            *([f'--guide={WEIGHTS / "guide.pt"}'] if opts.num_steps else []),
            f'--seed={opts.seed}',
            f'--device={opts.device}',
        ]
    )
    if code:
        return code
    # The newest: other flags make another one.
    place = max(run.glob('stages/*-release-*'), key=lambda p: (p / RECORD).stat().st_mtime)
    print(
        f'\nThe job took {(time.monotonic() - started) / 60:.1f} minutes.\n'
        f'  photographs (drawn):          {data / "contact_sheet.png"}\n'
        f'  report of the run (private):  {run / PAGE}\n'
        f'  contact sheet (private):      {place / "run/private/contact_sheet.png"}\n'
        f'  release, to be shared:        {place / "run/release"}\n'
        f'  its report:                   {place / "run/release/report.html"}'
    )
    return 0


if __name__ == '__main__':
    cli.run(main)
