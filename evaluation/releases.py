"""k-SALSA runs on the members: the groups that the grouped methods share."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from datasets.groups import read_groups
from datasets.table import Table
from evaluation.cache import cached, digest
from evaluation.settings import Settings
from utils.errors import UserError
from utils.io import sha256_file, write_csv
from utils.runs import PROJECT_ROOT

log = logging.getLogger(__name__)

N_GRADES = 5


class Release(NamedTuple):
    """A finished run. names [n]: of the pictures. group_of [m]: index of a member's picture, -1
    for none. labels [n]: majority grades. shares [n, 5]: of the grades in each group."""

    run: Path
    k: int
    names: list[str]
    group_of: np.ndarray
    labels: np.ndarray
    shares: np.ndarray

    def pictures(self) -> list[Path]:
        """Files of the k-SALSA pictures."""
        return [self.run / f'release/images/{n}.png' for n in self.names]

    def centroids(self) -> list[Path]:
        """Files of the pictures of the mean latents."""
        return [self.run / f'private/centroids/{n}.png' for n in self.names]

    def reconstructions(self, members: Table) -> list[Path]:
        """Files of the inverted photographs of the members."""
        folder = self.run / 'private/reconstructions'
        files = [[folder / f'{p.name}.png', folder / f'{p.stem}.png'] for p in members.paths]
        return [next((f for f in names if f.exists()), names[0]) for names in files]


def call(name: str, *arguments: str) -> None:
    """Runs another script of this project; UserError when it fails."""
    log.info('%s %s', name, ' '.join(arguments))
    code = subprocess.run(
        [sys.executable, str(PROJECT_ROOT / 'scripts' / f'{name}.py'), *arguments], check=False
    ).returncode
    if code:
        raise UserError(f'scripts/{name}.py failed with exit code {code}')


def make_release(
    settings: Settings, members: Table, k: int, out_dir: Path, *, device: str, seed: int
) -> Release:
    """Makes the release of groups of k in out_dir/k<k>, or finds it finished.

    UserError where it is there and was made from other photographs or settings.
    """
    columns = {'id_code': [p.name for p in members.paths], 'diagnosis': members.grades}
    if members.patients:
        columns['patient_id'] = members.patients
    write_csv(out_dir / 'members.csv', pd.DataFrame(columns))
    run = out_dir / f'k{k}'
    shaping = {
        'same_k': k,
        'style_weight': settings.style_weight,
        'lr': settings.lr,
        'content_weight': settings.content_weight,
        'num_steps': settings.num_steps,
        'precision': settings.precision,
        'seed': seed,
    }
    flags = {
        'exp_dir': run,
        'checkpoint_path': settings.file('checkpoint'),
        'data_path': members.paths[0].parent,
        'df': out_dir / 'members.csv',
        'content_weights': settings.network('content_weights'),
        'style_weights': settings.network('style_weights'),
        'device': device,
        **shaping,
    }

    def make() -> dict:
        call(
            'k-SALSA',
            '--centroids',
            '--save_reconstructions',
            *(f'--{name}={value}' for name, value in flags.items()),
        )
        return {'run': run.name}

    stamp = out_dir / f'k{k}.json'
    if not (run / 'release' / 'manifest.json').exists():
        stamp.unlink(missing_ok=True)
    cached(
        stamp,
        {
            **shaping,
            'table': sha256_file(out_dir / 'members.csv'),
            'photographs': digest([sha256_file(p) for p in members.paths]),
            'weights': {n: sha256_file(f) for n, f in settings.weights().items()},
        },
        make,
    )
    return read_release(run, k, members)


def read_release(run: Path, k: int, members: Table) -> Release:
    """The groups of a finished run on `members`."""
    groups = sorted(read_groups(run / 'private' / 'groups.csv'), key=lambda g: g.release_name or '')
    index = {member: i for i, group in enumerate(groups) for member in group.members}
    group_of = np.array([index.get(p.name, -1) for p in members.paths])
    counts = np.zeros((len(groups), N_GRADES))
    np.add.at(counts, (group_of[group_of >= 0], members.grades[group_of >= 0]), 1)
    return Release(
        run,
        k,
        [g.release_name or '' for g in groups],
        group_of,
        counts.argmax(1),
        counts / counts.sum(1, keepdims=True),
    )
