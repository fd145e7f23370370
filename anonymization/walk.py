"""More pictures than groups: half-way between the latents of two released groups of one grade.

What is made here follows from latents, names and grades of groups that are released already, the
generator, and which groups share nobody: no photograph is looked at again, and a picture on the
way stands for the people of two groups, at least 2 k. It says nothing that these two pictures and
their latents do not say.

Shapes: C groups, L styles, D style dimension, R side of the pictures.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float32, Int, UInt8
from PIL import Image

from anonymization.optimize import ACTIVATIONS, matmul_precision
from anonymization.records import LATENTS, PICTURES
from anonymization.release import LABELS, MANIFEST, check_outside_release, csv_text, release_names
from models.psp import load_psp
from models.stylegan2.frozen import FrozenSynthesis
from utils.errors import UserError
from utils.images import save_png, to_uint8
from utils.io import check_intact, sealing, sha256_file, write_json, write_text
from utils.seeds import numpy_generator

FORMAT = 'k-salsa-walk-1'
WAY = 0.25, 0.75  # how far from one latent to the other: not near either
RECORD = 'walk.json'
_ANEW = 'remove private/work and run scripts/k-SALSA.py again'


class Step(NamedTuple):
    """A picture on the way: between groups `one` and `other` (from 0), `position` of it done."""

    one: int
    other: int
    position: float


class Source(NamedTuple):
    """A finished run. latents [C, L, D]; labels [C]; people: of each group."""

    run: Path
    options: dict[str, Any]
    names: list[str]
    latents: Float32[np.ndarray, 'C L D']
    labels: Int[np.ndarray, ' C']
    people: list[frozenset[str]]


def read_source(run: Path) -> Source:
    """What the way is made of; UserError for a run that is not finished, or has no grades."""
    private, release = run / 'private', run / 'release'
    try:
        options = json.loads((private / 'options.json').read_text(encoding='utf-8'))['options']
        names = list(json.loads((private / PICTURES).read_text(encoding='utf-8')))
        labels = pd.read_csv(release / LABELS, dtype={'image': str}).set_index('image')
        groups = pd.read_csv(private / 'groups.csv', dtype=str, keep_default_na=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f'`run` {run}: not a finished run of scripts/k-SALSA.py') from error
    if 'label' not in labels:
        raise UserError(f'`run` {run}: its release has no grades, by which groups are joined')
    check_intact(private / LATENTS, remedy=_ANEW)
    people = groups.groupby('release_name')['patient_id'].agg(frozenset)
    return Source(
        run,
        options,
        names,
        np.load(private / LATENTS, allow_pickle=False),
        labels.loc[names, 'label'].to_numpy(),
        [people[name] for name in names],
    )


def plan(
    labels: Sequence[int],
    people: Sequence[frozenset[str]],
    pictures_per_group: int,
    *,
    seed: int = 0,
) -> list[Step]:
    """The steps to `pictures_per_group` pictures for each group, its own counted.

    Partners are drawn from the groups of the same label that share nobody with it, each way once;
    a group with too few of them gets fewer pictures.
    """
    rng = numpy_generator(seed, 'walk')
    taken: set[tuple[int, int]] = set()
    steps = []
    for _ in range(pictures_per_group - 1):
        for one in range(len(labels)):
            free = [
                other
                for other in range(len(labels))
                if other != one
                and labels[other] == labels[one]
                and not people[other] & people[one]
                and (min(one, other), max(one, other)) not in taken
            ]
            if free:
                other = int(rng.choice(free))
                taken.add((min(one, other), max(one, other)))
                steps.append(Step(one, other, round(float(rng.uniform(*WAY)), 6)))
    return steps


@torch.no_grad()
def synthesise(
    source: Source, steps: Sequence[Step], *, device: torch.device | str = 'cpu'
) -> UInt8[np.ndarray, 'n R R 3']:
    """The pictures of the steps, one at a time; UserError for another checkpoint than the run's."""
    path = Path(source.options['checkpoint_path'])
    psp = load_psp(path).to(device).eval()
    precision = source.options['precision']
    synthesis = FrozenSynthesis(psp.decoder, dtype=ACTIVATIONS[precision])
    found = []
    with matmul_precision(precision):
        for step in steps:
            one, other = (torch.from_numpy(source.latents[i]) for i in (step.one, step.other))
            latent = torch.lerp(one, other, step.position)
            image = synthesis(latent[None].to(device))
            if source.options.get('resize_outputs'):
                image = psp.pool(image)
            found.append(to_uint8(image[0]).permute(1, 2, 0).cpu().numpy())
    return np.stack(found)


def write_walk(
    source: Source,
    steps: Sequence[Step],
    folder: Path,
    *,
    pictures_per_group: int,
    seed: int = 0,
    device: torch.device | str = 'cpu',
) -> dict[str, Any]:
    """Writes images/, labels.csv and manifest.json into `folder`; returns the manifest.

    What was in `folder` is gone. Which picture lies between which groups stays in the run's
    private/walk.json. UserError where there is no step, or `folder` lies in a release.
    """
    check_outside_release(folder, '`out_dir`')
    if not steps:
        raise UserError('no two groups of one grade are without a common person; nothing to make')
    record = json.dumps([source.names, list(map(list, steps))]).encode()
    names = release_names(len(steps), record, seed)
    pictures = synthesise(source, steps, device=device)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / 'images').mkdir(parents=True)
    for name, picture in zip(names, pictures):
        save_png(Image.fromarray(picture), folder / 'images' / f'{name}.png')
    labels = [int(source.labels[step.one]) for step in steps]
    table = pd.DataFrame({'image': names, 'label': labels}).sort_values('image')
    write_text(folder / LABELS, csv_text(table))
    manifest = {
        'format': FORMAT,
        'source_manifest': sha256_file(source.run / 'release' / MANIFEST),
        'k': source.options['same_k'],
        'pictures_per_group': pictures_per_group,
        'least_people_per_picture': min(
            len(source.people[s.one] | source.people[s.other]) for s in steps
        ),
        'way': list(WAY),
        'n_images': len(steps),
        'files': {
            p.relative_to(folder).as_posix(): sha256_file(p)
            for p in sorted(folder.rglob('*'))
            if p.is_file()
        },
    }
    write_json(folder / MANIFEST, manifest)
    path = source.run / 'private' / RECORD
    with sealing(path):
        write_json(path, {name: list(step) for name, step in zip(names, steps)})
    return manifest
