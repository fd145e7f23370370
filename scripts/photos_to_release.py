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
from stages.settings import Request
from stages.training import Commands
from stages.way import build_job
from utils import cli
from utils.errors import UserError
from utils.kinds import boolean, choice
from utils.logs import setup_logging
from utils.options import add_flags, build, option
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


@dataclasses.dataclass(frozen=True)
class Course:
    """Which of the stages are run."""

    first: str | None = option(
        None,
        choice(*NAMES),
        'the stages before it must be done: an error instead of running them again',
        group='course',
        flag='from',
        alone=True,
    )
    last: str | None = option(
        None, choice(*NAMES), 'the last stage to run', group='course', flag='until', alone=True
    )
    dry_run: bool = option(
        False,
        boolean,
        'only print the plan with estimated hours',
        group='course',
        also=['--dry-run'],
    )
    force: bool = option(
        False, boolean, 'go on beyond a line (not after a failed verification)', group='course'
    )


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
    add_flags(p, Request)
    cli.add_device(p)
    add_flags(p, Course)
    return p


def check_stages(course: Course, job: Job) -> None:
    """UserError for --from and --until that name stages this run does not have."""
    names = [stage.name for stage in job.stages]
    for flag, name in (('--from', course.first), ('--until', course.last)):
        if name is not None and name not in names:
            raise UserError(f'{flag} {name}: this run has the stages {", ".join(names)}')


def open_out_dir(request: Request) -> None:
    """Makes the private output folder and keeps other processes out of it."""
    check_outside_release(request.out_dir, '--out')
    place, photos = request.out_dir.resolve(), request.photos.resolve()
    if place == photos or photos in place.parents:
        raise UserError(
            f'--out {request.out_dir} lies in --photos {request.photos}: choose another'
        )
    request.out_dir.mkdir(parents=True, exist_ok=True)
    request.out_dir.chmod(0o700)
    hold_run(request.out_dir)


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = vars(build_parser().parse_args(argv))
    setup_logging()
    request, course = build(Request, opts), build(Course, opts)
    request = dataclasses.replace(request, device=cli.resolve_device(opts['device']))
    request.check()
    open_out_dir(request)
    job = build_job(request, commands(request.world))
    check_stages(course, job)
    if course.dry_run:
        plan = job.plan(course.last)
        for name, state, hours in plan:
            print(f'{name:14}{state:14}{hours:8.2f} hours')
        print(f'{"together":28}{sum(hours for *_, hours in plan):8.2f} hours, roughly')
        return 0
    try:
        done = job.run(
            first=course.first,
            last=course.last,
            force=course.force,
            after=lambda done: write_report(job, done),
        )
    except Stopped as stopped:
        log.info('stopped; the same command goes on')
        return stopped.code
    print(f'{verdict(job, done)}\nreport (private): {request.out_dir / PAGE}')
    return 0


if __name__ == '__main__':
    cli.run(main)
