"""Runs the main job on phantoms with the embedded weights: what `make demo` does.

    python scripts/demo.py --out_dir=demo_output

Draws photographs of eyes that never existed (scripts/make_phantoms.py), groups and averages them
(scripts/k-SALSA.py), verifies the release (scripts/verify_release.py) and says where all lies. A
demo that was stopped goes on when started again.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import argparse
from collections.abc import Sequence

from utils import cli
from utils.errors import UserError

WEIGHTS = ROOT / 'pretrained_models' / 'demo'


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__.splitlines()[0], '\n'.join(__doc__.splitlines()[1:]))
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
        type=cli.positive_int,
        default=5,
        metavar='K',
        help='fewest distinct patients in a group',
    )
    p.add_argument(
        '--num_steps',
        type=cli.nonnegative_int,
        default=60,
        metavar='STEPS',
        help='optimisation steps per group',
    )
    return cli.add_common(p)


def call(name, *arguments):
    """Runs a script of this folder and shows its command; UserError when it fails."""
    command = [f'scripts/{name}.py', *map(str, arguments)]
    print('\n$ python ' + ' '.join(command), flush=True)
    code = subprocess.run(
        [sys.executable, str(ROOT / command[0]), *command[1:]], check=False
    ).returncode
    if code:
        raise UserError(f'{command[0]} failed with exit code {code}')


def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    started = time.monotonic()
    data, run = opts.out_dir / 'phantoms', opts.out_dir / 'run'
    if not (data / 'labels.csv').exists():
        # Seed 1 drew the photographs the weights were trained on; these eyes are new.
        call(
            'make_phantoms',
            f'--out_dir={data}',
            f'--n_patients={opts.n_patients}',
            '--size=64',
            f'--seed={opts.seed + 2}',
        )
    call(
        'k-SALSA',
        f'--exp_dir={run}',
        f'--checkpoint_path={WEIGHTS / "restyle.pt"}',
        '--content_weights=lite0',
        '--style_weights=lite0',
        '--style_weight=auto',
        '--lr=auto',
        f'--data_path={data / "images"}',
        f'--df={data / "labels.csv"}',
        '--data=phantoms',
        f'--same_k={opts.same_k}',
        f'--num_steps={opts.num_steps}',
        f'--device={opts.device}',
        f'--seed={opts.seed}',
        '--centroids',
    )
    call('verify_release', run / 'release', '--private', run / 'private')
    print(
        f'\nThe job took {(time.monotonic() - started) / 60:.1f} minutes.\n'
        f'  photographs (drawn):     {data / "contact_sheet.png"}\n'
        f'  release, to be shared:   {run / "release"}\n'
        f'  report:                  {run / "release" / "report.html"}\n'
        f'  contact sheet (private): {run / "private" / "contact_sheet.png"}'
    )
    return 0


if __name__ == '__main__':
    cli.run(main)
