"""What all stages of a run share."""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anonymization.calibrated import Noise, most_groups, noise_of
from anonymization.grouping import check_groupable
from anonymization.networks import Loaded
from anonymization.photographs import Photographs, copies
from anonymization.settings import Settings
from datasets.groups import Groups
from datasets.people import merge_duplicates
from datasets.table import Table
from models.features.content import ContentNetwork
from utils.errors import UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Context:
    """A run under way in `private`: its inputs, as every stage sees them.

    threads: units of work at a time on a CPU. facts: what the manifest says besides settings and
    counts ('networks', 'versions', 'card'). inversions: private folder in which runs share theirs.
    """

    private: Path
    table: Table
    photographs: Photographs
    networks: Loaded
    settings: Settings
    device: torch.device
    threads: int
    facts: dict[str, Any]
    inversions: Path | None = None

    @property
    def work(self) -> Path:
        """Pieces of stages that are under way."""
        return self.private / 'work'

    @property
    def alone(self) -> bool:
        """Whether photographs and groups are computed one by one, for the same bytes always."""
        return self.device.type == 'cpu' or self.settings.deterministic

    @functools.cached_property
    def people(self) -> list[int]:
        """Person of each photograph, by patient and identical pictures."""
        return merge_duplicates(self.table.patients, self.photographs.contents)

    @functools.cached_property
    def copies(self) -> np.ndarray:
        """bool [n]: identical copies of other photographs."""
        return copies(self.photographs.contents, self.table.ids)

    @functools.cached_property
    def strata(self) -> list[str] | None:
        """Values [n] that groups never cross; UserError when the table lacks a column."""
        columns = []
        for name in self.settings.strata:
            values = getattr(self.table, name)
            if values is None:
                raise UserError(f'`strata` {name}: the table has no such column')
            columns.append([str(v) for v in values])
        if self.settings.sides == 'apart':
            columns.append(self.photographs.eyes)
        return ['/'.join(parts) for parts in zip(*columns)] if columns else None

    def noise(self, groups: Groups) -> Noise | None:
        """The calibrated noise of the groups; None without an epsilon."""
        s, people = self.settings, [[self.people[i] for i in rows] for rows in groups.members]
        return noise_of(
            s.noise, rank=s.optimize.latent_rank, k=s.k, groups_per_person=most_groups(people)
        )

    def check(self) -> None:
        """UserError for what cannot come to a release, before networks are run."""
        s, psp, content = self.settings, self.networks.psp, self.networks.content
        s.optimize.check_rank(psp.decoder.style_dim)
        if s.noise.epsilon is not None and not self.alone:
            raise UserError(
                '`epsilon` needs `deterministic` on a GPU, where photographs that are computed '
                "together change each other's last digits"
            )
        if self.copies.any():
            log.warning(
                '%d photographs are identical copies of others: they show the same '
                'person, and are left out',
                self.copies.sum(),
            )
        rows = np.flatnonzero(~self.copies)
        check_groupable(
            s.k,
            patients=[self.people[i] for i in rows],
            strata=self.strata and [self.strata[i] for i in rows],
            policy=s.policy,
            surplus=s.surplus,
        )
        if not (s.deterministic and self.device.type == 'cuda'):
            return
        sides = [psp.decoder.size, psp.input_size]
        if isinstance(content, ContentNetwork) and content.resize != 'nearest':
            sides.append(content.input_size)
        if any(large % small for large, small in zip(sides, sides[1:])):
            raise UserError(
                f'`deterministic`: the sides of pictures, encoder and content network ({sides}) '
                'must be multiples, each of the next; leave it out, or use `device` cpu'
            )
