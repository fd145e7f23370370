"""Re-identification: which release picture does another photograph of a member lead to?"""
import numpy as np

from evaluation.attacks.metrics import reidentification_rates
from evaluation.attacks.nearest import reidentification_ranks
from evaluation.population import people_of
from evaluation.registry import measure
from evaluation.study import Study


def _cells(result: dict | None) -> dict[str, str]:
    return {'re-identified, rank 1': '-' if result is None else
            f'{result["rank_1"]:.3f} (chance {result["chance_rank_1"]:.3f})'}


@measure('reidentification', 'own picture nearest to a later photograph', _cells,
         depends=lambda study: {'content encoder': study.content_digest})
def reidentification(study: Study):
    """By content features; None without later photographs, and for photographs themselves."""
    def run(candidate, folder):
        group = candidate.group_of[study.population.again_of]
        known = group >= 0
        if candidate.photographs or not known.any():
            return None
        ranks = reidentification_ranks(study.again[known], group[known], candidate.pictures,
                                       study.content)
        people = np.array(people_of(study.population.again))[known]
        return reidentification_rates(ranks, len(candidate.pictures), people=people)
    return run
