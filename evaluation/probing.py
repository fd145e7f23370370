"""What probes say: of photographs after a release taught them, of a release after photographs."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int, UInt8

from classification.data import one_hot
from classification.metrics import bootstrap_intervals, grading_metrics
from datasets.table import REFERABLE_FROM
from evaluation.judges import Judge
from evaluation.judging import judged
from evaluation.population import people_of
from evaluation.probe import Probe, fit_probe, read_release
from evaluation.registry import Candidate, Cells, interval
from evaluation.study import Study
from utils.errors import UserError

_SCORES = ('auc_referable', 'kappa')


def _cells(label: str, result: dict) -> Cells:
    heads = {'auc_referable': f'probe: AUC ({label})', 'kappa': f'probe: kappa ({label})'}
    return {
        head: interval(result[name], '.2f') if name in result else '-'
        for name, head in heads.items()
    }


def _score(result: dict) -> dict[str, float]:
    """Of the first judge, who made none of the releases."""
    first = next(iter(result.values()))
    return first.get('auc_referable', dict.fromkeys(('value', 'low', 'high'), float('nan')))


@judged('probe', 'probe on real eyes, AUC of referable DR', _cells, score=_score)
def probe(study: Study, judge: Judge) -> Callable[[Candidate], dict]:
    """A logistic probe learns from a release with the groups' shares, and grades photographs of
    other people. {'unfit': reason} where there is nothing to learn."""
    others = study.population.others
    photographs = study.features(judge, study.others)['pooled']

    def run(candidate: Candidate) -> dict:
        try:
            grader = fit_probe(
                study.features(judge, candidate.pictures)['pooled'],
                candidate.shares,
                people=candidate.people,
                seed=study.seed,
            )
        except UserError as error:
            return {'unfit': str(error)}
        answers = others.grades, grader.grades(photographs), grader.score(photographs)
        value = grading_metrics(*answers)
        between = bootstrap_intervals(*answers, groups=people_of(others))
        return {
            'strength': grader.strength,
            **{
                name: {'value': value[name], 'low': between[name][0], 'high': between[name][1]}
                for name in _SCORES
            },
        }

    return run


@judged(
    'reading',
    'how a probe trained on photographs reads the release',
    lambda label, r: {f'reading ({label})': interval(r['correlation'], '.2f')},
)
def reading(study: Study, judge: Judge) -> Callable[[Candidate], dict]:
    """A ridge probe on photographs of other people, against the groups' referable shares."""
    grader = photograph_probe(study, judge)

    def run(candidate: Candidate) -> dict:
        score = grader.score(study.features(judge, candidate.pictures)['pooled'])
        share = candidate.shares[:, REFERABLE_FROM:].sum(1)
        return read_release(score, share, seed=study.seed)._asdict()

    return run


def photograph_probe(study: Study, judge: Judge) -> Probe:
    """A ridge probe that learnt from the photographs of people who are in no release."""
    others = study.population.others
    return fit_probe(
        study.features(judge, study.others)['pooled'],
        one_hot(others.grades),
        people=people_of(others),
        kind='ridge',
        seed=study.seed,
    )


def graded(study: Study, pictures: UInt8[np.ndarray, 'n 3 S S']) -> Int[np.ndarray, ' n']:
    """Grades [n] of pictures by the `photograph_probe` of the first judge."""
    judge = study.judges[0]
    return photograph_probe(study, judge).grades(study.features(judge, pictures)['pooled'])
