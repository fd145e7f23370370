"""From a table of photographs to a staged release: read, invert, group, optimise, write.

Every stage leaves its result in `private/` before the next begins, so a run that was killed goes
on where it stopped. With torchrun, blocks of photographs, inversion chunks and batches of groups
are handed out to the processes as they ask for them; process 0 groups and writes. No stage holds
more than a batch.

On a CPU every photograph and every group is computed alone by one thread (see workers), several
at a time, so the release does not depend on how many, nor on memory. On a GPU they are computed
in batches, whose size changes rounding; `deterministic` computes them alone there too.

Nothing here verifies or publishes: `anonymization.anonymize` does.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anonymization.calibrated import stated
from anonymization.context import Context
from anonymization.grouped import form_groups
from anonymization.inversion import invert_all
from anonymization.optimisation import optimise, results
from anonymization.records import Recorder, to_picture
from anonymization.release import GroupFacts, png_encoder, write_release
from anonymization.workers import deterministic_algorithms
from datasets.groups import Groups
from utils import distributed

N_GRADES = 5


def run_stages(run: Context, staging: Path) -> None:
    """All stages after the reading; process 0 leaves the release in `staging`.

    Raises UserError and PrivacyError as the stages do.
    """
    with deterministic_algorithms(run.settings.deterministic and run.device.type == 'cuda'):
        if distributed.is_main():
            run.work.mkdir(mode=0o700, parents=True, exist_ok=True)
        distributed.barrier()
        latents, content = invert_all(run)
        groups = form_groups(run, latents)
        n_batches = optimise(run, latents, content, groups)
        if distributed.is_main():
            shutil.rmtree(staging, ignore_errors=True)
            write(run, groups, n_batches, staging)


def write(run: Context, groups: Groups, n_batches: int, staging: Path) -> dict[str, Any]:
    """Writes the release into the new folder `staging`, and the private records; the manifest."""
    side = (
        run.networks.psp.input_size
        if run.settings.resize_outputs
        else run.networks.psp.decoder.size
    )
    facts = _manifest_facts(run, groups, side)
    recorder = Recorder(run.private, groups, run.photographs, centroids=run.settings.centroids)

    def pictures() -> Iterator[tuple[str, Image.Image]]:
        for name, result in zip(groups.names, results(run, n_batches), strict=True):
            recorder.add(name, result)
            yield name, to_picture(result.image)

    manifest = write_release(
        staging,
        [_facts(run, rows, name) for rows, name in zip(groups.members, groups.names)],
        pictures(),
        facts=facts,
        soft_labels=run.settings.soft_labels,
    )
    recorder.close(facts=facts, soft_labels=run.settings.soft_labels)
    return manifest


def _facts(run: Context, rows: np.ndarray, name: str) -> GroupFacts:
    grades = None
    if run.table.labels is not None:
        grades = tuple(np.bincount(run.table.labels[rows], minlength=N_GRADES).tolist())
    return GroupFacts(name, len(rows), len({run.people[i] for i in rows}), grades)


def _manifest_facts(run: Context, groups: Groups, side: int) -> dict[str, Any]:
    s = run.settings
    settings = {
        'n_iters': s.n_iters,
        **dataclasses.asdict(s.optimize),
        'precision': s.precision,
        'sides': s.sides,
    }
    return {
        'k': s.k,
        'unit': 'images' if run.table.patients is None else 'patients',
        'policy': s.policy,
        'clustering': s.clustering,
        'strata': list(s.strata),
        'n_suppressed': groups.n_left_out,
        'image_size': side,
        'settings': settings,
        'noise': stated(run.noise(groups)),
        **run.facts,
        'png_encoder': png_encoder(),
    }
