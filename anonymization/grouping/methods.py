"""The clustering methods by name."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from anonymization.grouping.greedy import mdav, mdav_in_cells, published
from anonymization.grouping.refine import Refinement
from anonymization.grouping.units import Units
from utils.errors import UserError
from utils.seeds import numpy_generator

DEALT = 'random'
METHODS = ('default', 'published', 'mdav', 'kmeans-constrained', DEALT)


class Effort(NamedTuple):
    """Of the default method: refinement rounds, groups per assignment problem, starts (None:
    several below 2000 units), and the gain at which refinement ends."""

    rounds: int
    block: int
    restarts: int | None
    tolerance: float


def solve(units: Units, k: int, method: str, seed: int, effort: Effort) -> Int[np.ndarray, ' u']:
    """Group numbers 0..C-1 of the units, which are centred in place."""
    if method == 'published':
        return published(units, k)
    if method == DEALT:
        return _dealt(units, k, numpy_generator(seed, 'dealing'))
    # Differences of large sums lose float32 digits; a shift moves no distance.
    units.x -= units.x.mean(0)
    if method == 'kmeans-constrained':
        return kmeans_constrained(units, k, seed)
    if method == 'mdav':
        return mdav(units, k)
    start = mdav_in_cells(units, k)
    if len(units) < 2 * k:
        return start
    restarts = effort.restarts or int(np.clip(2000 // len(units), 1, 8))
    best, best_value = start, -np.inf
    for attempt in range(restarts):
        rng = numpy_generator(seed, 'grouping', attempt)
        groups = Refinement(units, start if attempt == 0 else _deal(units, k, rng), k)
        groups.refine(rng, effort.rounds, effort.block, effort.tolerance)
        value = groups.between()
        if value > best_value * (1 + 1e-9):
            best, best_value = groups.assignment(), value
    return _numbered(best)


def _numbered(assignment: Int[np.ndarray, ' u']) -> Int[np.ndarray, ' u']:
    """Group numbers in the order in which the units first meet them."""
    _, first, inverse = np.unique(assignment, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _deal(units: Units, k: int, rng: np.random.Generator) -> Int[np.ndarray, ' u']:
    """A random assignment that keeps the promises: units are dealt out person by person."""
    order = rng.permutation(len(units))
    if units.person is not None:
        order = order[np.argsort(units.person[order], kind='stable')]
    assignment = np.empty(len(units), int)
    assignment[order] = np.arange(len(units)) % (len(units) // k)
    return assignment


def _dealt(units: Units, k: int, rng: np.random.Generator) -> Int[np.ndarray, ' u']:
    """The same with people in an order of chance, too."""
    if units.person is None:
        return _deal(units, k, rng)
    shuffled = rng.permutation(units.person.max() + 1)[units.person]
    return _deal(dataclasses.replace(units, person=shuffled), k, rng)


def kmeans_constrained(units: Units, k: int, seed: int) -> Int[np.ndarray, ' u']:
    """Size-constrained k-means of the k-means-constrained package, for comparison."""
    if units.person is not None or units.weight.max() > 1:
        raise UserError(
            'kmeans-constrained cannot keep the images of a patient apart or '
            'together; choose another clustering'
        )
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError as error:
        raise UserError(
            'the clustering kmeans-constrained needs the package of that name: '
            'pip install k-means-constrained'
        ) from error
    count = len(units) // k
    if count == 1:
        return np.zeros(len(units), int)
    model = KMeansConstrained(count, size_min=k, n_init=1, random_state=seed % 2**32)
    return _numbered(model.fit_predict(units.x.cpu().double().numpy()))
