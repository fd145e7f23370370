"""Photographs of members, as they are or inverted: yardstick and positive control."""

import numpy as np
from jaxtyping import Shaped

from classification.data import one_hot
from evaluation.registry import Candidate, method
from evaluation.releases import Release
from evaluation.study import Study
from utils.seeds import numpy_generator


@method('real', 'all member photographs (upper yardstick)')
def real(study: Study, release: Release) -> Candidate:
    """Every member's photograph stands for itself."""
    return _photographs(study, np.arange(len(study.members)))


@method('real_same_n', 'as many member photographs as there are groups')
def real_same_n(study: Study, release: Release) -> Candidate:
    """A draw of the photographs; members outside it are not in this release."""
    draw = numpy_generator(study.seed, 'real_same_n')
    return _photographs(
        study, np.sort(draw.choice(len(study.members), len(release.names), replace=False))
    )


@method('inverted', 'every member photograph inverted, k = 1 (leaks: positive control)')
def inverted(study: Study, release: Release) -> Candidate:
    """The encoder's reconstructions."""
    members = study.population.members
    return Candidate(
        study.pictures(release.reconstructions(members)),
        members.grades,
        one_hot(members.grades),
        np.arange(len(members)),
        people=members.patients,
    )


def _photographs(study: Study, rows: Shaped[np.ndarray, ' r']) -> Candidate:
    members = study.population.members.subset(rows)
    group_of = np.full(len(study.members), -1)
    group_of[rows] = np.arange(len(rows))
    return Candidate(
        study.members[rows],
        members.grades,
        one_hot(members.grades),
        group_of,
        people=members.patients,
        photographs=True,
    )
