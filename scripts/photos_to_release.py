"""From photographs to an evaluated release: one command, in stages that are done once.

    python scripts/photos_to_release.py --photos=photos/ --labels=labels.csv --out_dir=runs/eyes \\
        --hours=8
    python scripts/photos_to_release.py --photos=photos/ --labels=labels.csv --out_dir=runs/eyes \\
        --dry-run

Stages: check, crop, (generator,) encoder, release, verification, evaluation. A stage whose
inputs and settings have not changed is not run again; one that has changed is, and all after it, in
new folders. Stopped, the same command goes on. Behind every stage numbers are held against lines;
beyond one the run stops and says what to do, and --force goes on. OUT_DIR/report.html shows all of
it and is private, like everything in OUT_DIR but stages/*-release-*/run/release.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from functools import partial

from anonymization.release import check_outside_release
from scripts import (
    dataset_tool,
    fit_mapping,
    new_generator,
    train_restyle_joint,
    train_restyle_psp,
    train_stylegan2_ada,
)
from stages.preparation import Command
from stages.report import PAGE, verdict, write_report
from stages.runner import Job, Stopped
from stages.settings import PRESETS, Request
from stages.training import Commands
from stages.way import build_job
from utils import cli
from utils.errors import UserError
from utils.logs import setup_logging
from utils.runs import hold_run
from utils.signals import start_processes

log = logging.getLogger(__name__)

NAMES = ('check', 'crop', 'generator', 'encoder', 'release', 'verification', 'evaluation')


def commands(world: int) -> Commands:
    """The commands of the stages; trainings and release with `world` processes."""

    def several(name: str) -> Command:
        return partial(start_processes, world, Path(__file__).with_name(name))

    alone = world == 1
    return Commands(
        dataset_tool.main,
        new_generator.main,
        train_restyle_joint.main if alone else several('train_restyle_joint.py'),
        fit_mapping.main,
        train_stylegan2_ada.main if alone else several('train_stylegan2_ada.py'),
        train_restyle_psp.main if alone else several('train_restyle_psp.py'),
        None if alone else several('k-SALSA.py'),
    )


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
    p.add_argument(
        '--photos', type=Path, required=True, metavar='DIR', help='folder of the photographs'
    )
    p.add_argument(
        '--labels',
        type=Path,
        required=True,
        metavar='CSV',
        help='their table: ids, grades, patients',
    )
    p.add_argument(
        '--out',
        '--out_dir',
        dest='out_dir',
        type=Path,
        required=True,
        metavar='DIR',
        help='private output folder',
    )
    p.add_argument(
        '--k', type=cli.positive_int, default=5, metavar='K', help='fewest people in a group'
    )
    p.add_argument(
        '--size',
        type=cli.power_of_two,
        metavar='PX',
        help="side of the pictures (default: preset's)",
    )
    p.add_argument(
        '--preset',
        choices=sorted(PRESETS),
        default='small',
        help='small: CPU, 128 px; gpu256, gpu512: StyleGAN2-ADA and ReStyle on one GPU',
    )
    p.add_argument(
        '--hours', type=cli.positive_float, default=8.0, metavar='H', help='for everything, roughly'
    )
    p.add_argument(
        '--held_out',
        type=cli.fraction,
        default=0.2,
        metavar='SHARE',
        help='of the people, to test networks and release; they are in neither',
    )
    _add_lengths(p.add_argument_group('lengths and weights'))
    _add_course(p.add_argument_group('course'))
    return cli.add_common(p)


def _add_lengths(g: argparse._ArgumentGroup) -> None:
    g.add_argument(
        '--steps',
        type=cli.positive_int,
        metavar='N',
        help='of each training (default: what --hours allow, from a short measurement)',
    )
    g.add_argument(
        '--release_steps', type=cli.positive_int, metavar='N', help="per group (default: preset's)"
    )
    g.add_argument(
        '--generator_weights', type=Path, metavar='FILE', help='in place of that training'
    )
    g.add_argument(
        '--encoder_weights',
        type=Path,
        metavar='FILE',
        help='ReStyle checkpoint, in place of all trainings',
    )
    g.add_argument(
        '--processes',
        type=cli.positive_int,
        metavar='N',
        help='of each training and of the release, at most, on this machine (default: one for each '
        'GPU)',
    )
    g.add_argument(
        '--guide', type=Path, metavar='FILE', help='of the content loss, for the release'
    )


def _add_course(g: argparse._ArgumentGroup) -> None:
    g.add_argument(
        '--from',
        dest='first',
        choices=NAMES,
        help='the stages before it must be done: an error instead of running them again',
    )
    g.add_argument('--until', dest='last', choices=NAMES, help='the last stage to run')
    g.add_argument(
        '--dry_run',
        '--dry-run',
        action='store_true',
        help='only print the plan with estimated hours',
    )
    g.add_argument(
        '--force', action='store_true', help='go on beyond a line (not after a failed verification)'
    )


def request_of(opts: argparse.Namespace) -> Request:
    """What the flags ask for."""
    names = {field.name for field in dataclasses.fields(Request)} - {'device'}
    given = {name: getattr(opts, name) for name in names}
    return Request(**given, device=cli.resolve_device(opts.device))


def check_stages(opts: argparse.Namespace, job: Job) -> None:
    """UserError for --from and --until that name stages this run does not have."""
    names = [stage.name for stage in job.stages]
    for flag, name in (('--from', opts.first), ('--until', opts.last)):
        if name is not None and name not in names:
            raise UserError(f'{flag} {name}: this run has the stages {", ".join(names)}')


def open_out_dir(opts: argparse.Namespace) -> None:
    """Makes the private output folder and keeps other processes out of it."""
    check_outside_release(opts.out_dir, '--out')
    place, photos = opts.out_dir.resolve(), opts.photos.resolve()
    if place == photos or photos in place.parents:
        raise UserError(f'--out {opts.out_dir} lies in --photos {opts.photos}: choose another')
    opts.out_dir.mkdir(parents=True, exist_ok=True)
    opts.out_dir.chmod(0o700)
    hold_run(opts.out_dir)


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    request = request_of(opts)
    request.check()
    open_out_dir(opts)
    job = build_job(request, commands(request.world))
    check_stages(opts, job)
    if opts.dry_run:
        plan = job.plan(opts.last)
        for name, state, hours in plan:
            print(f'{name:14}{state:8}{hours:8.2f} hours')
        print(f'{"together":22}{sum(hours for *_, hours in plan):8.2f} hours, roughly')
        return 0
    try:
        done = job.run(
            first=opts.first,
            last=opts.last,
            force=opts.force,
            after=lambda done: write_report(job, done),
        )
    except Stopped as stopped:
        log.info('stopped; the same command goes on')
        return stopped.code
    print(f'{verdict(job, done)}\nreport (private): {opts.out_dir / PAGE}')
    return 0


if __name__ == '__main__':
    cli.run(main)
