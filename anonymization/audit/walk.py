"""Whether a folder of pictures on the way is what the run's records say, derived once more."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from anonymization.audit.checks import Check, Findings
from anonymization.audit.files import MAX_PICTURE, Fault, read_regular
from anonymization.audit.png import decode
from anonymization.optimize import ACTIVATIONS, matmul_precision
from models.psp import load_psp
from models.stylegan2.frozen import FrozenSynthesis
from utils.errors import UserError
from utils.images import to_uint8
from utils.io import sha256_file

_KEYS = [
    'format',
    'source_manifest',
    'k',
    'pictures_per_group',
    'least_people_per_picture',
    'way',
    'n_images',
    'files',
]


def check_walk(folder: Path, run: Path) -> list[Check]:
    """Files, people and pictures of a folder of scripts/walk_release.py, against its run.

    UserError where folder or records cannot be read.
    """
    try:
        manifest = json.loads((folder / 'manifest.json').read_text(encoding='utf-8'))
        record = json.loads((run / 'private/walk.json').read_text(encoding='utf-8'))
        order = list(json.loads((run / 'private/pictures.json').read_text(encoding='utf-8')))
        options = json.loads((run / 'private/options.json').read_text(encoding='utf-8'))['options']
        groups = pd.read_csv(run / 'private/groups.csv', dtype=str, keep_default_na=False)
        given = pd.read_csv(run / 'release/labels.csv', dtype={'image': str})
        labels = pd.read_csv(folder / 'labels.csv', dtype={'image': str})
        latents = np.load(run / 'private/group_latents.npy', allow_pickle=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f'{folder} or {run} is no folder of scripts/walk_release.py') from error
    return [
        _files(folder, run, manifest, record, labels),
        _people(manifest, record, order, groups, given, labels),
        _pictures(folder, record, options, latents),
    ]


def _files(folder: Path, run: Path, manifest: dict, record: dict, labels: pd.DataFrame) -> Check:
    found = Findings('files, hashes and the source are what the manifest says')
    there = {
        p.relative_to(folder).as_posix(): sha256_file(p)
        for p in folder.rglob('*')
        if p.is_file() and p != folder / 'manifest.json'
    }
    wanted = {'labels.csv', *(f'images/{name}.png' for name in record)}
    if list(manifest) != _KEYS or set(there) != wanted or manifest.get('files') != there:
        found.add('the files are not those of the manifest')
    if manifest.get('source_manifest') != sha256_file(run / 'release/manifest.json'):
        found.add('the manifest names another release')
    if list(labels['image']) != sorted(record) or manifest.get('n_images') != len(record):
        found.add('the table is not that of the pictures')
    return found.check(f'{len(record)} pictures')


def _people(
    manifest: dict,
    record: dict,
    order: list[str],
    groups: pd.DataFrame,
    given: pd.DataFrame,
    labels: pd.DataFrame,
) -> Check:
    found = Findings('every picture stands for the people of two groups of its grade, at least 2 k')
    grade = dict(zip(given['image'], given['label']))
    own = dict(zip(labels['image'], labels['label']))
    least = None
    for name, (one, other, position) in record.items():
        pair = order[one], order[other]
        people = [set(groups['patient_id'][groups['release_name'] == n]) for n in pair]
        both = len(people[0] | people[1])
        least = both if least is None else min(least, both)
        if people[0] & people[1] or both < 2 * int(manifest['k']):
            found.add('a picture stands for fewer people', [name])
        if {grade[n] for n in pair} != {own.get(name)}:
            found.add('a picture has another grade than its groups', [name])
        if not 0.25 <= position <= 0.75:
            found.add('a picture is near to one of its groups', [name])
    if manifest.get('least_people_per_picture') != least:
        found.add('the manifest counts other people')
    return found.check(f'at least {least} people')


def _pictures(folder: Path, record: dict, options: dict, latents: np.ndarray) -> Check:
    found = Findings('pictures synthesised anew from the latents of two groups are the same')
    psp = load_psp(options['checkpoint_path']).eval()
    synthesis = FrozenSynthesis(psp.decoder, dtype=ACTIVATIONS[options['precision']])
    for name, (one, other, position) in record.items():
        with torch.no_grad(), matmul_precision(options['precision']):
            ends = torch.from_numpy(latents[[one, other]])
            image = synthesis(torch.lerp(ends[0], ends[1], position)[None])
            image = psp.pool(image) if options.get('resize_outputs') else image
        wanted = to_uint8(image[0]).permute(1, 2, 0).numpy()
        try:
            data = read_regular(folder / 'images' / f'{name}.png', MAX_PICTURE)
            there = decode(data, len(wanted))
        except Fault as fault:
            found.add(f'a picture {fault}', [name])
            continue
        if not np.array_equal(there, wanted):
            found.add('a picture is not what its latents give', [name])
    return found.check(f'{len(record)} pictures')
