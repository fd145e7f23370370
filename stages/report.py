"""The private page that grows with the run: verdicts and pictures of every stage in one file."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import jinja2
from PIL import Image

from stages.release import FOLDER
from stages.runner import Done, Job
from utils.images import load_rgb
from utils.io import write_text

PAGE = 'report.html'
_TEMPLATES = Path(__file__).parent / 'templates'
_WIDTH = 1200  # pixels of a sheet on the page, at most


def write_report(job: Job, done: Sequence[Done]) -> Path:
    """Writes report.html in the output folder: it names no file elsewhere, and needs no network."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    page = templates.get_template(PAGE).render(
        done=done,
        pictures={
            entry.stage.name: {
                caption: embedded(entry.folder / name)
                for caption, name in entry.outcome.pictures.items()
            }
            for entry in done
        },
        to_come=[stage for stage in job.stages if stage.name not in {d.stage.name for d in done}],
        verdict=verdict(job, done),
    )
    write_text(job.out_dir / PAGE, page)
    return job.out_dir / PAGE


def verdict(job: Job, done: Sequence[Done]) -> str:
    """What may be shared at this point, in one sentence."""
    if len(done) < len(job.stages):
        return 'Nothing may be shared yet: the run is not at its end.'
    folder = job.folders['release'].relative_to(job.out_dir) / 'run' / FOLDER
    failed = [
        f'{entry.stage.name}: {f.name}'
        for entry in done
        for f in entry.outcome.findings
        if not f.passed
    ]
    if any(not f.passed and f.final for entry in done for f in entry.outcome.findings):
        return 'Nothing may be shared: the verification failed.'
    if failed:
        return (
            f'{folder} was verified, but these numbers are beyond their lines: '
            f'{"; ".join(failed)}. Read what they say before you share it.'
        )
    return f'{folder} was verified and may be shared. Nothing else may.'


def embedded(path: Path) -> str:
    """A picture as a data URI, JPEG, at most `_WIDTH` pixels wide."""
    image = load_rgb(path)
    if image.width > _WIDTH:
        height = max(1, round(image.height * _WIDTH / image.width))
        image = image.resize((_WIDTH, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format='JPEG', quality=88)
    return 'data:image/jpeg;base64,' + base64.b64encode(buffer.getvalue()).decode()
