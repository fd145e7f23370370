"""Methods against measures: one row per release, every result kept beside what it depends on."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from evaluation.attacks.metrics import excess_over
from evaluation.cache import RESULT, cached, folder_of
from evaluation.registry import SIDES, Candidate, Measure, Method, load_scores
from evaluation.study import Study
from utils.images import from_uint8, grid, save_png

log = logging.getLogger(__name__)

_EXAMPLES = 8


class Row(NamedTuple):
    """What was measured on one release. results: by measure; scores: of members and others, by
    attack."""

    name: str
    method: Method
    k: int
    n: int
    results: dict[str, Any]
    scores: dict[str, tuple[np.ndarray, np.ndarray]]


def candidates(study: Study, methods: list[Method]) -> Iterator[tuple[str, Method, int, Candidate]]:
    """(name, method, k, release) of all that is compared; k is 0 where no group has a size.

    Each with its shadow, where the settings want controls.
    """
    first = next(iter(study.releases))
    for method in methods:
        for k in study.releases if method.grouped else [first]:
            candidate = _with_shadow(study, method, k)
            if method.grouped:
                yield f'{method.name}_k{k}', method, k, candidate
            else:
                yield method.name, method, int((candidate.group_of >= 0).any()), candidate
        for name in study.lever_releases if method.levers else ():
            candidate = _with_shadow(study, method, first, name)
            yield f'{method.name}_k{first}_{name}', method, first, candidate


def _with_shadow(study: Study, method: Method, k: int, lever: str | None = None) -> Candidate:
    """What a method makes of a release, and of the attackers' one where controls are wanted."""

    def make(whose: Study) -> Candidate:
        release = whose.releases[k] if lever is None else whose.lever_releases[lever]
        return method.make(whose, release)

    if not study.settings.controls:
        return make(study)
    return dataclasses.replace(make(study), shadow=make(study.shadow))


def compare(study: Study, methods: list[Method], measures: list[Measure]) -> list[Row]:
    """A row for every method (and k); results that are there and not stale are read."""
    prepared, rows = {}, []
    for name, method, k, candidate in candidates(study, methods):
        folder = study.folder / 'methods' / name
        save_png(
            grid(from_uint8(torch.from_numpy(candidate.pictures[:_EXAMPLES])), _EXAMPLES),
            folder / 'examples.png',
        )
        row = Row(name, method, k, len(candidate.pictures), {}, {})
        for m in measures:
            depends = {
                'candidate': candidate.digest,
                'people': study.digest,
                'seed': study.seed,
                **m.depends(study),
            }
            own = folder_of(folder, m.name, depends)

            def compute(
                m: Measure = m, own: Path = own, name: str = name, candidate: Candidate = candidate
            ) -> dict[str, Any]:
                log.info('%s: %s', name, m.title)
                if m.name not in prepared:  # when first needed, not when all is cached
                    prepared[m.name] = m.prepare(study)
                found = prepared[m.name](candidate, own)
                if m.attack and candidate.control is not None:
                    control = prepared[m.name](candidate.control, own / 'control')
                    scores = load_scores(own), load_scores(own / 'control')
                    found['control'] = {n: control[n] for n in ('auc', 'tpr_at_1pct_fpr')}
                    found['excess'] = excess_over(*scores, seed=study.seed)
                return {'value': found}

            row.results[m.name] = cached(own / RESULT, depends, compute)['value']
            if m.attack:
                row.scores[m.name] = tuple(np.load(own / f'{side}.npy') for side in SIDES)
        rows.append(row)
    return rows
