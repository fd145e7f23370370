"""What every method and measure of an evaluation may use: people, pictures, networks, releases."""

import dataclasses
import functools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from classification.metrics import check_test_labels
from classification.settings import Config, find_config, load_config
from datasets.people import merge_identical
from datasets.phantoms.dataset import make_dataset
from datasets.pictures import load_pictures
from datasets.sides import as_right_eyes
from datasets.table import Table, read_table
from evaluation.attackers import (
    Attackers,
    attackers_among,
    check_strangers,
    draw_attackers,
    given_attackers,
)
from evaluation.attacks.identity import grid_features
from evaluation.attacks.metrics import MIN_PEOPLE
from evaluation.attacks.projection import attack_features, least_reference
from evaluation.cache import digest
from evaluation.judges import Judge, load_judges, networks_of
from evaluation.population import Population, people_of, populate, roles_of
from evaluation.releases import Release, make_release
from evaluation.settings import Settings
from evaluation.splits import split_table
from utils.errors import UserError
from utils.io import sha256_file, write_csv
from utils.options import free
from utils.runs import PROJECT_ROOT, run_record, start_run
from utils.seeds import derive

log = logging.getLogger(__name__)

_INVERSIONS = 'inversions'  # folder of those that the releases share


@dataclasses.dataclass(frozen=True)
class Study:
    """An evaluation under way. Pictures are uint8 [*, 3, S, S], S the grader's image_size."""

    settings: Settings
    grader: Config
    population: Population
    folder: Path
    device: torch.device
    seed: int

    def pictures(self, paths: list[Path]) -> UInt8[np.ndarray, 'n 3 S S']:
        """Picture files at the grader's size."""
        return load_pictures(paths, self.grader.settings.image_size)

    def photographs(self, table: Table | None) -> UInt8[np.ndarray, 'n 3 S S']:
        """Those of a table at the grader's size, with left eyes mirrored where releases show
        them so: attackers know the method."""
        found = self.pictures([] if table is None else table.paths)
        if table is None or self.settings.sides != 'mirror':
            return found
        return as_right_eyes(found, table.eyes)

    @functools.cached_property
    def members(self) -> UInt8[np.ndarray, 'n 3 S S']:
        """Photographs that the releases are made of."""
        return self.photographs(self.population.members)

    @functools.cached_property
    def others(self) -> UInt8[np.ndarray, 'n 3 S S']:
        """Photographs of people who are in no release."""
        return self.photographs(self.population.others)

    @functools.cached_property
    def again(self) -> UInt8[np.ndarray, 'n 3 S S']:
        """Later photographs of members' eyes; none where there are no visits."""
        return self.photographs(self.population.again)

    @functools.cached_property
    def others_again(self) -> UInt8[np.ndarray, 'n 3 S S']:
        """Later photographs of the others' eyes; none where there are no visits."""
        return self.photographs(self.population.others_again)

    @property
    def nonmembers(self) -> UInt8[np.ndarray, 'n 3 S S']:
        """Photographs of the half of the others that attacks must tell from members."""
        return self.others[self.population.nonmember]

    @property
    def reference(self) -> UInt8[np.ndarray, 'n 3 S S']:
        """Photographs of the other half, whom attackers know not to be members."""
        return self.others[~self.population.nonmember]

    @functools.cached_property
    def judges(self) -> list[Judge]:
        """The networks that look at releases; those that made one are marked, and come last."""
        return load_judges(
            self.settings.judging(),
            [networks_of(r.run / 'release') for r in self.releases.values()],
        )

    @functools.cached_property
    def _known(self) -> dict[tuple[str, ...], Any]:
        return {}

    def features(
        self, judge: Judge, pictures: UInt8[np.ndarray, 'n 3 S S']
    ) -> dict[str, Float[np.ndarray, 'n _']]:
        """`attack_features` of pictures ('pooled' [n, F] among them), computed once."""
        network = judge.network.to(self.device)
        return self.once(
            ('features', network.digest, digest(pictures)),
            lambda: attack_features(network, pictures),
        )

    def grids(
        self, judge: Judge, pictures: UInt8[np.ndarray, 'n 3 S S']
    ) -> Float[np.ndarray, 'n F']:
        """`grid_features` of pictures, computed once."""
        network = judge.network.to(self.device)
        return self.once(
            ('grids', network.digest, digest(pictures)), lambda: grid_features(network, pictures)
        )

    def once(self, key: tuple[str, ...], compute: Callable[[], Any]) -> Any:
        """What `compute` gives, computed for the first who asks for `key`."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    @functools.cached_property
    def attackers(self) -> Attackers:
        """The attackers' own people, or the reference people where they have none."""
        own = self.settings.attackers
        if own is None:
            return attackers_among(self.population)
        if not self.settings.attackers_given:
            return draw_attackers(self.folder / 'attackers', own, seed=self.seed)
        found = _given(self.settings, self.seed)
        check_strangers(found, self.population)
        return found

    @functools.cached_property
    def shadow(self) -> 'Study':
        """The attackers' own evaluation: their people are the members of its releases."""
        people = self.population._replace(
            members=self.attackers.released, again=None, again_of=np.empty(0, int)
        )
        return dataclasses.replace(
            self,
            population=people,
            folder=self.folder / 'shadow',
            seed=derive(self.seed, 'shadow') % 2**31,
        )

    @functools.cached_property
    def digest(self) -> str:
        """Changes with any photograph, grade, person or role."""
        p = self.population
        tables = [[people_of(t), t.grades.tolist()] for t in (p.members, p.others)]
        return digest(
            self.members,
            self.others,
            self.again,
            self.others_again,
            p.again_of,
            p.others_again_of,
            p.nonmember,
            tables,
            p.again and people_of(p.again),
            self._attackers_digest,
        )

    @property
    def _attackers_digest(self) -> str | None:
        """Changes with the attackers' photographs, where they have people of their own."""
        if self.settings.attackers is None:
            return None
        tables = self.attackers
        files = [[sha256_file(path) for path in table.paths] for table in tables]
        if not self.settings.attackers_given:
            return digest(files)
        return digest(files, [[people_of(t), t.grades.tolist(), t.eyes] for t in tables])

    @functools.cached_property
    def lever_releases(self) -> dict[str, Release]:
        """The k-SALSA release of the first k with each lever's settings."""
        return {
            name: make_release(
                self.settings,
                self.population.members,
                self.settings.first_k()[0],
                self.folder / 'levers' / name,
                device=str(self.device),
                seed=self.seed,
                lever=lever,
                inversions=self.folder / _INVERSIONS,
            )
            for name, lever in (self.settings.levers or {}).items()
        }

    @functools.cached_property
    def releases(self) -> dict[int, Release]:
        """The k-SALSA release of every k; the first is the one that methods without groups
        follow."""
        return {
            k: make_release(
                self.settings,
                self.population.members,
                k,
                self.folder,
                device=self.device,
                seed=self.seed,
                inversions=self.folder / _INVERSIONS,
            )
            for k in self.settings.first_k()
        }


def _given(settings: Settings, seed: int) -> Attackers:
    """The attackers' photographs; UserError for an unfit table, or too few people in it."""
    assert settings.attackers is not None
    table, images = (PROJECT_ROOT / settings.attackers[n] for n in ('table', 'image_dir'))
    least = 2 * max(settings.k)  # half of them make a release of every k
    return given_attackers(table, images, least=least, seed=seed)


def open_study(settings: Settings, folder: Path, *, device: torch.device, seed: int) -> Study:
    """Reads networks and photographs, splits the people (split.csv), and enters the run folder.

    UserError for unfit files, too few people, and a folder that holds another evaluation.
    """
    grader = load_config(find_config(settings.grader), seeds=tuple(settings.seeds))
    inputs = settings.weights()
    # Who may not judge alone is known before anything is drawn.
    load_judges(settings.judging(), [{n: sha256_file(f) for n, f in inputs.items()}])
    if settings.table is not None:
        inputs['table'] = settings.file('table')
    if settings.attackers_given:
        _given(settings, seed)
    start_run(
        folder,
        run_record(dataclasses.asdict(settings), inputs=inputs, seed=seed),
        resume=True,
        free_options=free(Settings),  # results keep their own account (cache.py),
    )
    table = merge_identical(_table(settings, folder))
    roles = roles_of(table, share=settings.members, column=settings.split_column, seed=seed)
    population = populate(table, roles, seed=seed)
    _check(population, grader, settings.measures)
    write_csv(folder / 'split.csv', split_table(table, roles))
    study = Study(settings, grader, population, folder, device, seed)
    if settings.attackers_given:
        _ = study.attackers  # whoever is unfit is found before a release is made
    return study


def _table(settings: Settings, folder: Path) -> Table:
    """The labelled photographs; phantoms are drawn where they are wanted and not there yet."""
    if settings.phantoms is None:
        return read_table(
            settings.file('table'),
            settings.image_dir and settings.file('image_dir'),
            require_label=True,
        )
    drawn = folder / 'phantoms'
    if not (drawn / 'labels.csv').exists():
        shutil.rmtree(drawn, ignore_errors=True)  # what a killed process had begun
        make_dataset(drawn, **settings.phantoms)
    return read_table(drawn / 'labels.csv', require_label=True)


def _check(population: Population, grader: Config, measures: list[str] | None) -> None:
    sides = {'members': people_of(population.members), 'others': people_of(population.others)}
    least = {'members': MIN_PEOPLE, 'others': 2 * MIN_PEOPLE}
    if few := [n for n, people in sides.items() if len(set(people)) < least[n]]:
        raise UserError(
            f'{len(set(sides[few[0]]))} people are too few {few[0]}; an evaluation '
            f'needs at least {least[few[0]]}'
        )
    n = int((~population.nonmember).sum())
    if n < least_reference() and 'projection' in (measures or ['projection']):
        raise UserError(
            f'{n} reference photographs of other people are too few for the '
            f'projection attack, which needs {least_reference()}; add people, or list '
            'the other measures'
        )
    check_test_labels(population.others.grades, positive_from=grader.settings.positive_from)
