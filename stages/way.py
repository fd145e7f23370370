"""The stages of a request, in their order."""

import logging
from typing import Any

from datasets.table import read_table, without_patients
from evaluation.cache import digest
from evaluation.population import people_of
from stages import preparation, release, training
from stages.runner import Job, Stage
from stages.settings import GROUP_PASSES, READ_SECONDS, Request, pace
from stages.training import Commands
from utils.io import sha256_file

log = logging.getLogger(__name__)


def build_job(request: Request, commands: Commands) -> Job:
    """All stages with what they depend on, and hours estimated from a short measurement.

    request: checked (`Request.check`). UserError for a bad table and photographs that are not
    there.
    """
    table = read_table(request.labels, request.photos)
    if not table.patients:
        log.warning(without_patients(table))
    preparation.hold_out(request, table, people_of(table))
    hashes = preparation.file_hashes(table.paths, request.out_dir / 'photographs.json')
    speed = pace(request)
    reading = len(table) * READ_SECONDS / 3600
    groups = len(table) * (1 - request.held_out) / request.k
    drawing = groups * (request.how.release_steps + 1) * GROUP_PASSES * speed.seconds / 3600
    seeded = {'seed': request.seed}
    guided = {} if request.guide is None else {'guide': sha256_file(request.guide)}
    inputs = {'photographs': digest(hashes), 'table': sha256_file(request.labels), **seeded}
    stages = [
        Stage(
            'check',
            f'Counting {table.unit}',
            {**inputs, 'k': request.k, 'held_out': request.held_out},
            reading / 3,
            preparation.check_photographs(request, table),
        ),
        Stage(
            'crop',
            'Cropping to the field of view',
            {'size': request.how.size},
            reading,
            preparation.crop_photographs(request, commands.dataset_tool),
        ),
        *_trainings(request, speed.steps, speed.seconds, commands),
        Stage(
            'release',
            'Making the release',
            {'k': request.k, **request.told, **guided, **seeded},
            drawing,
            release.make_release(request, commands.make_release),
        ),
        Stage(
            'verification',
            'Verifying the release',
            {},
            drawing / 20,
            release.verify_release(request),
        ),
        Stage(
            'evaluation',
            'Holding the release against photographs, attacking it',
            seeded,
            reading,
            release.evaluate_release(request),
        ),
    ]
    return Job(request.out_dir, stages)


def _trainings(
    request: Request, steps: int, pass_seconds: float, commands: Commands
) -> list[Stage]:
    """The stages that make the file of generator and encoder."""
    how = request.how
    hours = steps * how.batch * how.image_passes * pass_seconds / 3600
    settings: dict[str, Any] = {'preset': request.preset, 'steps': steps, 'seed': request.seed}

    if request.encoder_weights is not None:
        given = {'encoder': sha256_file(request.encoder_weights)}
        title = 'Looking at the given encoder'
        return [Stage('encoder', title, given, 0.01, training.take_encoder(request))]
    if how.joint:
        if request.start is not None:
            settings['start'] = sha256_file(request.start)
        work = training.train_jointly(request, steps, commands)
        return [Stage('encoder', 'Training encoder and generator', settings, hours, work)]
    encoder = training.train_encoder(request, steps, commands)
    if request.generator_weights is not None:
        given = settings | {'generator': sha256_file(request.generator_weights)}
        return [Stage('encoder', 'Training the encoder', given, hours, encoder)]
    generator = training.train_generator(request, steps, commands)
    return [
        Stage('generator', 'Training the generator', settings, hours, generator),
        Stage('encoder', 'Training the encoder', settings, hours, encoder),
    ]
