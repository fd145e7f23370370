"""k-SALSA runs on the members: the groups that the grouped methods share."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from anonymization import Networks, OptimizeConfig, anonymize
from anonymization import Settings as Shape
from datasets.groups import read_groups
from datasets.table import Table, read_table
from evaluation.settings import Settings
from utils.errors import UserError
from utils.io import write_csv

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


def make_release(
    settings: Settings,
    members: Table,
    k: int,
    out_dir: Path,
    *,
    device: torch.device | str,
    seed: int,
    lever: dict[str, Any] | None = None,
    inversions: Path | None = None,
) -> Release:
    """Makes the release of groups of k in out_dir/k<k>, or finds it finished.

    lever: settings that differ from those of the study, by flag of scripts/k-SALSA.py. inversions:
    folder in which releases share theirs. UserError where the release is there and was made from
    other photographs or settings.
    """
    columns = {'id_code': [p.name for p in members.paths], 'diagnosis': members.grades}
    if members.patients:
        columns['patient_id'] = members.patients
    if members.eyes:
        columns['eye'] = members.eyes
    write_csv(out_dir / 'members.csv', pd.DataFrame(columns))
    style = settings.network('style_weights') if settings.style_weight != 0 else None
    anonymize(
        read_table(out_dir / 'members.csv', members.paths[0].parent),
        Networks(
            settings.file('checkpoint'),
            settings.network('content_weights'),
            style,
            guide=settings.file('guide') if settings.guide else None,
        ),
        shaped(settings, k, seed, lever or {}),
        out_dir / f'k{k}',
        device=device,
        inversions=inversions,
    )
    return read_release(out_dir / f'k{k}', k, members)


def shaped(settings: Settings, k: int, seed: int, lever: dict[str, Any]) -> Shape:
    """What the main job is to do for groups of k, with the settings of a lever by flag."""
    shape = Shape(
        k=k,
        sides=settings.sides,
        precision=settings.precision,
        n_iters=settings.n_iters,
        centroids=True,
        save_reconstructions=True,
        seed=seed,
        optimize=OptimizeConfig(
            n_steps=settings.num_steps,
            content_weight=settings.content_weight,
            style_weight=settings.style_weight,
            lr=settings.lr,
            latent_rank=settings.latent_rank,
        ),
    )
    return Shape.from_options(shape.options() | lever)


def check_levers(settings: Settings) -> None:
    """UserError, that names it, for a lever whose settings do not go together."""
    for name, lever in (settings.levers or {}).items():
        try:
            shaped(settings, settings.k[0], 0, lever).check()
        except UserError as error:
            raise UserError(f'`config`: levers: {name}: {error}') from error


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
