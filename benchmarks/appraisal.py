"""What pictures of groups tell a grader and an attacker: the columns of benchmarks/frontier.py.

Members are in the release; others are not. The first half of the others is what attacker and
graders know (the reference); the attacks have to tell the second half from the members.

Shapes: n photographs, G release pictures, S side of the pictures.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8

from classification.grader import GraderResult
from classification.settings import load_config
from classification.train import train_grader
from datasets.table import REFERABLE_FROM, Table
from evaluation.attacks.nearest import nearest_attack
from evaluation.attacks.projection import attack_features, projection_attack
from evaluation.bootstrap import draw_weights, percentiles
from evaluation.fidelity import feature_statistics, frechet_distance
from evaluation.probe import Probe, fit_probe, read_release
from evaluation.scores import auc, weighted_auc
from evaluation.spectra import high_frequency_ratio
from evaluation.vessel_amount import vessel_ratios
from models.features.pretrained import load_feature_network
from models.features.style import FILTERS, FilterBank
from utils.errors import UserError
from utils.images import from_uint8, load_rgb
from utils.io import atomic_path
from utils.seeds import numpy_generator

MAKER, JUDGE = 'lite0', 'lite1'
NETWORKS = (MAKER, JUDGE)
N_GRADES = 5
_BATCH = 16
_LESSONS = 20  # draws for the interval of what a release teaches
Features = dict[str, Float[np.ndarray, 'n F']]  # 'grams', 'pooled', or both


@dataclasses.dataclass
class Photographs:
    """Photographs uint8 [n, 3, S, S] with grades, people, and features by network."""

    pictures: UInt8[np.ndarray, 'n 3 S S']
    grades: Int[np.ndarray, ' n']
    people: Shaped[np.ndarray, ' n']
    features: dict[str, Features]

    def part(self, name: str, rows: Int[np.ndarray, ' r']) -> Features:
        """The features of some rows by one network."""
        return {kind: values[rows] for kind, values in self.features[name].items()}

    def shares(self, groups: list[Int[np.ndarray, ' _']]) -> Float[np.ndarray, 'G 5']:
        """Shares of the grades [G, 5] of groups of rows."""
        return np.stack([np.eye(N_GRADES)[self.grades[g]].mean(0) for g in groups])


def pictures_of(paths: list[Path]) -> UInt8[np.ndarray, 'n 3 S S']:
    """uint8 [n, 3, S, S]."""
    return np.stack([np.asarray(load_rgb(p)).transpose(2, 0, 1) for p in paths])


def described(
    table: Table, cache: Path, device: torch.device, *, mirror_left: bool = False
) -> Photographs:
    """The photographs of a table with their features, kept in files that begin like `cache`.

    mirror_left: turns left eyes into right ones.
    """
    pictures, features = pictures_of(table.paths), {}
    if mirror_left:
        left = np.array(table.eyes) == 'left'
        pictures[left] = pictures[left][..., ::-1]
    for name in (*NETWORKS, FILTERS):
        path = cache.with_name(f'{cache.name}_{name}.npz')
        if not path.exists():
            with atomic_path(path) as temp, open(temp, 'wb') as file:
                np.savez(file, allow_pickle=False, **features_of(name, pictures, device))
        with np.load(path) as data:
            features[name] = dict(data)
    return Photographs(pictures, table.grades, np.array(table.patients), features)


@torch.no_grad()
def features_of(
    name: str, pictures: UInt8[np.ndarray, 'n 3 S S'], device: torch.device
) -> Features:
    """Features of pictures uint8 [n, 3, S, S]: those of the attack, or of the filter bank.

    The filter bank's are means and standard deviations of its maps.
    """
    if name != FILTERS:
        return attack_features(load_feature_network(name).to(device), pictures)
    bank, found = FilterBank().to(device), []
    for part in torch.from_numpy(pictures).split(_BATCH):
        var, mean = torch.var_mean(bank.features(from_uint8(part).to(device)), (2, 3))
        found.append(torch.cat([mean, var.sqrt()], 1).cpu().numpy())
    return {'pooled': np.concatenate(found)}


def one_each(
    people: Shaped[np.ndarray, ' n'], rows: Int[np.ndarray, ' r'], rng: np.random.Generator
) -> Int[np.ndarray, ' p']:
    """One of the rows of every person, by chance."""
    rows = rng.permutation(rows)
    return rows[np.unique(people[rows], return_index=True)[1]]


def is_reference(others: Photographs) -> Bool[np.ndarray, ' n']:
    """Which rows show the first half of the people: reference of the attack, and the probe's."""
    people = list(dict.fromkeys(others.people))
    return np.isin(others.people, people[: len(people) // 2])


class Appraiser:
    """Measures releases of some members against `others`.

    cnn: a configuration of classification/configs; a network of it learns from the others'
    photographs (kept in the file `checkpoint`) and reads every release, too.
    """

    def __init__(
        self,
        members: Photographs,
        others: Photographs,
        *,
        seed: int,
        device: torch.device,
        cnn: str | None,
        checkpoint: Path,
    ) -> None:
        self.members, self.others, self.seed, self.device = members, others, seed, device
        self.known = is_reference(others)
        self.judge = self._probe(JUDGE)
        self.cnn = None if cnn is None else self._network(cnn, checkpoint)

    def _probe(self, name: str) -> Probe:
        """A ridge probe on photographs of the reference people."""
        return fit_probe(
            self.others.features[name]['pooled'][self.known],
            np.eye(N_GRADES)[self.others.grades[self.known]],
            people=list(self.others.people[self.known]),
            kind='ridge',
        )

    def _network(self, config: str, checkpoint: Path) -> GraderResult:
        settings = load_config(config, image_size=self.others.pictures.shape[-1]).settings
        trained = train_grader(
            self.others.pictures,
            self.others.grades,
            settings=settings,
            seed=self.seed,
            device=self.device,
            folder=checkpoint.with_suffix(''),
        )
        if trained is None:
            raise UserError('the training of the CNN was stopped; the same command goes on')
        return trained

    def measure(
        self, pictures: UInt8[np.ndarray, 'G 3 S S'], groups: list[Int[np.ndarray, ' _']]
    ) -> dict[str, Any]:
        """The columns of one release: pictures uint8 [G, 3, S, S] and their members' rows."""
        seen = {name: features_of(name, pictures, self.device) for name in (*NETWORKS, FILTERS)}
        shares = self.members.shares(groups)
        referable = shares[:, REFERABLE_FROM:].sum(1)
        sides = self._sides(groups)
        real = feature_statistics(self.members.features[MAKER]['pooled'])
        people = list(self.members.people)
        found: dict[str, Any] = {
            'n_groups': len(groups),
            'vessels': vessel_ratios(self.members.pictures, pictures, people=people),
            'frechet': frechet_distance(*real, *feature_statistics(seen[MAKER]['pooled'])),
            'high_frequencies': high_frequency_ratio(
                self.members.pictures, pictures, people=people
            ),
            'reading': read_release(self.judge.score(seen[JUDGE]['pooled']), referable)._asdict(),
            'lessons': {name: self._lesson(name, seen[name], shares) for name in seen},
            **{name: self._attacks(name, seen[name], sides) for name in NETWORKS},
        }
        if self.cnn is not None:
            truth = self.members.grades >= REFERABLE_FROM
            score = self.cnn.predict(self.members.pictures).score
            found['cnn'] = {
                'auc': auc(score[truth], score[~truth]),
                **read_release(self.cnn.predict(pictures).score, referable)._asdict(),
            }
        return found

    def _lesson(
        self, name: str, seen: Features, shares: Float[np.ndarray, 'G 5']
    ) -> dict[str, float] | None:
        """AUC on the reference photographs of a probe that learnt from the release alone.

        {value, low, high}; the interval, 90 %, draws groups for the training and people for the
        test. None where all groups have the same share.
        """
        n, truth = len(shares), self.others.grades[self.known] >= REFERABLE_FROM
        test = self.others.features[name]['pooled'][self.known]
        rng = numpy_generator(self.seed, 'lessons')
        people = self.others.people[self.known]
        weights = np.concatenate(list(draw_weights(people, len(test), _LESSONS, rng)))
        found: list[float] = []
        drawn = [np.arange(n), *rng.integers(n, size=(_LESSONS, n))]
        for rows, weight in zip(drawn, [np.ones(len(test)), *weights]):
            try:
                grader = fit_probe(
                    seen['pooled'][rows], shares[rows], people=rows.tolist(), kind='ridge'
                )
            except UserError:
                if not found:
                    return None
                continue
            found += weighted_auc(truth, grader.score(test), weight[None]).tolist()
        low, high = percentiles(np.array(found[1:] or found), 0.9)
        return {'value': found[0], 'low': low, 'high': high}

    def _sides(self, groups: list[Int[np.ndarray, ' _']]) -> 'Sides':
        rng = numpy_generator(self.seed, 'candidates')
        own = np.full(len(self.members.people), -1)
        for i, g in enumerate(groups):
            own[g] = i
        inside = one_each(self.members.people, np.flatnonzero(own >= 0), rng)
        reference = one_each(self.others.people, np.flatnonzero(self.known), rng)
        outside = one_each(self.others.people, np.flatnonzero(~self.known), rng)
        return Sides(inside, outside, reference, own[inside])

    def _attacks(self, name: str, seen: Features, sides: 'Sides') -> dict[str, Any]:
        """Membership by projection, and by the nearest picture in pooled features."""
        inside = self.members.part(name, sides.inside)
        outside, reference = (
            self.others.part(name, rows) for rows in (sides.outside, sides.reference)
        )
        attacked = projection_attack(
            inside,
            outside,
            seen,
            reference,
            member_people=list(self.members.people[sides.inside]),
            other_people=list(self.others.people[sides.outside]),
            group_of=sides.own.tolist(),
        )
        nearest = nearest_attack(
            inside['pooled'], outside['pooled'], reference['pooled'], lambda x: x
        )
        return {
            'auc': attacked.auc,
            'reading': str(attacked.reading),
            'rank_1': attacked.ranks['rank_1'],
            'rank_5': attacked.ranks['rank_5'],
            'nearest': auc(*nearest(seen['pooled'])),
        }


class Sides(NamedTuple):
    """Rows of one photograph of every person: of members and, from the others, of the rest.

    own: the index of the own group's picture, of each of `inside`.
    """

    inside: Int[np.ndarray, ' i']
    outside: Int[np.ndarray, ' o']
    reference: Int[np.ndarray, ' r']
    own: Int[np.ndarray, ' o']
