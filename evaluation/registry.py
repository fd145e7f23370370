"""The methods that are compared and the measures they are compared by, each under a name.

A new one is a function in a file of its own under one of the decorators below, and a name in the
lists of catalogue.py. Shapes: m members, o non-members, n release pictures, uint8 [*, 3, S, S].
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Num

from evaluation.attacks.metrics import attack_metrics
from evaluation.bootstrap import unit_numbers
from evaluation.cache import digest
from evaluation.population import people_of
from evaluation.releases import Release
from evaluation.study import Study
from utils.errors import UserError
from utils.io import save_npy

Cells = dict[str, str]
SIDES = ('member', 'other')  # an attack leaves its scores as <side>.npy


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One release under evaluation.

    pictures: uint8 [n, 3, S, S]. labels [n]: grades. shares [n, 5]: of the grades behind each
    picture. group_of [m]: index of the picture a member stands behind, -1 for none. people [n]:
    whose photograph a picture is, None where it is nobody's own. photographs: whether the
    pictures are the members' photographs themselves. method, k: filled in by the run. shadow: the
    attackers' release of their own people by the same method, in whose terms group_of is then.
    asked [m]: members whom attacks ask after, where these are not those behind a picture.
    """

    pictures: np.ndarray
    labels: np.ndarray
    shares: np.ndarray
    group_of: np.ndarray
    people: list | None = None
    photographs: bool = False
    method: str = ''
    k: int = 0
    shadow: 'Candidate | None' = None
    asked: Bool[np.ndarray, ' m'] | None = None

    @property
    def in_release(self) -> Bool[np.ndarray, ' m']:
        """Members whom attacks can find [m]: who stand behind a picture; all, if none does."""
        if self.asked is not None:
            return self.asked
        known = self.group_of >= 0
        return known if known.any() else ~known

    @property
    def control(self) -> 'Candidate | None':
        """The shadow as a release in which none of the people under attack is."""
        if self.shadow is None:
            return None
        return dataclasses.replace(
            self.shadow,
            group_of=np.full(len(self.group_of), -1),
            asked=self.in_release,
            shadow=self.shadow,
        )

    @functools.cached_property
    def digest(self) -> str:
        """Changes with anything of it."""
        shadow = self.shadow and self.shadow.digest
        return digest(self.pictures, self.labels, self.shares, self.group_of, self.people, shadow)


@dataclasses.dataclass(frozen=True)
class Method:
    """make(study, release) -> Candidate; grouped: once for every k, by that k's release; levers:
    for every lever of the settings as well."""

    name: str
    title: str
    make: Callable[[Study, Release], Candidate]
    grouped: bool
    levers: bool = False


@dataclasses.dataclass(frozen=True)
class Measure:
    """How a candidate is measured.

    prepare(study) -> a function (candidate, folder) -> JSON-able result, made when first needed.
    depends(study): what the result depends on besides candidate, people and seed. cells(result):
    columns of the table. attack: whether it is a membership attack, whose scores lie in its
    folder. score(result) -> {value, low, high}: the utility that is plotted, for measures of
    utility.
    """

    name: str
    title: str
    prepare: Callable[[Study], 'Run']
    cells: Callable[[Any], Cells]
    depends: Callable[[Study], dict[str, Any]] = lambda study: {}
    attack: bool = False
    score: Callable[[Any], dict[str, float]] | None = None


Run = Callable[[Candidate, Path], Any]
Scorer = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Registry(dict):
    """Entries by name, in the order in which tables show them."""

    def __init__(self, what: str, entries: Iterable[Method | Measure]) -> None:
        super().__init__()
        self.what = what
        for entry in entries:
            if entry.name in self:
                raise ValueError(f'two {what} called {entry.name}')
            self[entry.name] = entry

    def choose(self, names: Sequence[str] | None) -> list:
        """The named entries (None: all) in the registry's order; UserError for unknown names."""
        if unknown := [n for n in names or () if n not in self]:
            raise UserError(
                f'unknown {self.what} {", ".join(map(str, unknown))}; choose from {", ".join(self)}'
            )
        return [entry for name, entry in self.items() if names is None or name in names]


def method(
    name: str, title: str, *, grouped: bool = False, levers: bool = False
) -> Callable[[Callable[[Study, Release], Candidate]], Method]:
    """Makes a Method of a function (study, release) -> Candidate."""
    return lambda make: Method(name, title, make, grouped, levers)


def measure(
    name: str, title: str, cells: Callable[[Any], Cells], **details: Any
) -> Callable[[Callable[[Study], Run]], Measure]:
    """Makes a Measure of a function study -> ((candidate, folder) -> result)."""
    return lambda prepare: Measure(name, title, prepare, cells, **details)


def attack(name: str, title: str, **details: Any) -> Callable[[Callable[[Study], Scorer]], Measure]:
    """Makes a membership attack, a Measure, of a function study -> scorer.

    scorer(pictures [n]) -> scores of `study.members` [m] and of `study.nonmembers` [o], higher
    meaning member.
    """

    def wrap(scorer_of: Callable[[Study], Scorer]) -> Measure:
        def prepare(study: Study) -> Run:
            scorer, population = scorer_of(study), study.population
            people = [np.array(people_of(t)) for t in (population.members, population.others)]

            def run(candidate: Candidate, folder: Path) -> dict:
                member, other = scorer(candidate.pictures)
                known = candidate.in_release
                who = people[0][known], people[1][population.nonmember]
                save_scores(folder, (member[known], other), who)
                return attack_metrics(
                    member[known], other, member_people=who[0], other_people=who[1]
                )

            return run

        return Measure(
            name,
            title,
            prepare,
            lambda r: {f'attack: {name}': interval(r['auc'], '.2f')},
            attack=True,
            **details,
        )

    return wrap


def save_scores(
    folder: Path, scores: Sequence[Float[np.ndarray, ' _']], people: Sequence[Sequence[str]]
) -> None:
    """Leaves an attack's scores of members and others, and the numbers of their people."""
    for side, values, who in zip(SIDES, scores, people, strict=True):
        save_npy(folder / f'{side}.npy', values)
        save_npy(folder / f'{side}_people.npy', unit_numbers(who, len(values)))


def load_scores(folder: Path) -> dict[str, Num[np.ndarray, ' _']]:
    """What `save_scores` left: {'member', 'other', 'member_people', 'other_people'}."""
    return {
        name: np.load(folder / f'{name}.npy') for side in SIDES for name in (side, f'{side}_people')
    }


def interval(value: dict, style: str) -> str:
    """'value (low to high)', each in a format such as '.2f'."""
    return f'{value["value"]:{style}} ({value["low"]:{style}} to {value["high"]:{style}})'


def spread(score: dict) -> str:
    """'mean ± standard deviation', without the latter after a single seed."""
    std = '' if score['std'] is None else f' ± {score["std"]:.3f}'
    return f'{score["mean"]:.3f}{std}'
