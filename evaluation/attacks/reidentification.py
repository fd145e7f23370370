"""Re-identification: which release picture does another photograph of a member lead to?"""

from collections.abc import Callable

import numpy as np

from evaluation.attacks.metrics import reidentification_rates
from evaluation.attacks.nearest import reidentification_ranks
from evaluation.judges import Judge
from evaluation.judging import judged
from evaluation.population import people_of
from evaluation.registry import Candidate, Cells
from evaluation.study import Study


def _cells(label: str, result: dict | None) -> Cells:
    return {
        f're-identified, rank 1 ({label})': '-'
        if result is None
        else f'{result["rank_1"]:.3f} (chance {result["chance_rank_1"]:.3f})'
    }


@judged('reidentification', 'own picture nearest to a later photograph', _cells)
def reidentification(study: Study, judge: Judge) -> Callable[[Candidate], dict | None]:
    """By pooled features; None without later photographs, and for photographs themselves."""

    def run(candidate: Candidate) -> dict | None:
        later = study.population.again
        group = candidate.group_of[study.population.again_of]
        known = group >= 0
        if later is None or candidate.photographs or not known.any():
            return None
        ranks = reidentification_ranks(
            study.again[known],
            group[known],
            candidate.pictures,
            lambda pictures: study.features(judge, pictures)['pooled'],
        )
        people = np.array(people_of(later))[known]
        return reidentification_rates(ranks, len(candidate.pictures), people=people)

    return run
