"""Group tables (id_code, centers, release_name) and the pictures that stand for the groups."""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from utils.errors import UserError, listing
from utils.images import IMAGE_SUFFIXES

_MAX_NUMBER = 10**9  # of a group


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """Who is grouped with whom: `n` photographs in `C` groups, each with a picture.

    of: int64 [n], the group of each photograph, 0 to C - 1, or -1 for one that was left out.
    names: [C], release names of the pictures. Files number the groups from 1, with 0 for left out
    (column `centers`); nothing else does.
    """

    of: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def members(self) -> list[np.ndarray]:
        """Rows of each group's photographs, ascending."""
        order = np.argsort(self.of, kind='stable')
        starts = np.searchsorted(self.of[order], np.arange(len(self) + 1))
        return [order[a:b] for a, b in zip(starts[:-1], starts[1:])]

    @property
    def n_left_out(self) -> int:
        """Photographs that are in no group."""
        return int((self.of < 0).sum())

    @classmethod
    def read(cls, path: str | Path, ids: Sequence[str]) -> 'Groups':
        """The groups of a run's private groups.csv; UserError when it is not one of these ids."""
        columns: dict[Hashable, type[str]] = {'id_code': str, 'release_name': str}
        table = pd.read_csv(path, dtype=columns, keep_default_na=False)
        if list(table['id_code']) != list(ids):
            raise UserError(f'{path} does not belong to the table of this run')
        of = table['centers'].to_numpy() - 1
        names = dict(zip(of.tolist(), table['release_name']))
        return cls(of, tuple(names[c] for c in range(int(of.max()) + 1)))


class Group(NamedTuple):
    """Number from 1, ids of the members in table order, release name if the table has one."""

    number: int
    members: list
    release_name: str | None


def find_group_table(path: str | Path, names: Sequence[str], *, parameter: str = 'df') -> Path:
    """`path` itself, or the first of `names` in the folder `path`; UserError when there is none."""
    path = Path(path)
    if path.is_file():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    raise UserError(f'`{parameter}` {path}: no group table there; looked for {", ".join(names)}')


def read_groups(path: str | Path, *, parameter: str = 'df') -> list[Group]:
    """The groups of a published cluster table or a run's private groups.csv.

    In ascending number; rows of group 0 (suppressed) are left out. UserError for a missing or
    damaged table, missing columns, numbers that are none, and a table without any group.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'`{parameter}` {path}: no such table')
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding='utf-8-sig')
    except Exception as error:  # random bytes make the reader fail in any way
        raise UserError(
            f'`{parameter}` {path} is not a readable CSV table ({str(error)[:200]})'
        ) from error
    if not {'id_code', 'centers'} <= set(frame.columns):
        raise UserError(
            f'`{parameter}` {path}: it needs the columns id_code and centers, and has '
            f'{", ".join(map(str, frame.columns))[:200]}'
        )
    centers = pd.to_numeric(frame['centers'], errors='coerce')
    good = centers.between(0, _MAX_NUMBER) & (centers == centers.round())
    if not good.all():
        raise UserError(
            listing(
                f'`{parameter}` {path}: centers must be numbers, of groups from 1, or 0',
                [f'row {i + 2}: {frame["centers"].iloc[i][:80]!r}' for i in np.flatnonzero(~good)],
            )
        )
    frame = frame.assign(centers=centers.astype(int))
    frame = frame[frame['centers'] != 0]
    if frame.empty:
        raise UserError(f'`{parameter}` {path} holds no group')
    return [
        Group(
            int(rows['centers'].iloc[0]),
            list(rows['id_code']),
            rows['release_name'].iloc[0] if 'release_name' in rows else None,
        )
        for _, rows in frame.groupby('centers', sort=True)
    ]


def group_pictures(
    groups: Sequence[Group],
    folder: str | Path,
    *,
    centroid: bool = False,
    parameter: str = 'images_path',
) -> list[Path]:
    """The file of every group in `folder`: by release name, or named after the first member.

    centroid: `<id>_centroids` files, the plain latent averages of published runs. UserError that
    lists all groups without a picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f'`{parameter}` {folder}: no such folder')
    files = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES}
    paths, missing = [], []
    for group in groups:
        first = group.members[0]
        # Published runs on .jpeg ids cut four characters off and left `<id>._centroids.png`.
        names = [f'{first}_centroids', f'{first}._centroids'] if centroid else [first]
        names += [group.release_name] if group.release_name else []
        found = next((files[n] for n in names if n in files), None)
        if found is None:
            missing.append(names[0])
        else:
            paths.append(found)
    if missing:
        raise UserError(
            listing(
                f'{len(missing)} of {len(groups)} groups have no picture in '
                f'`{parameter}` {folder}; check the folder, the group table and whether '
                'centroids are meant',
                missing,
            )
        )
    return paths
