"""What a grader learns from a release: trained on it, tested on photographs of other people."""

from pathlib import Path
from typing import Any

from classification.data import TrainingSet
from classification.experiment import run_seeds
from evaluation.cache import folder_of
from evaluation.registry import Candidate, Run, measure, spread
from evaluation.study import Study
from models.features.pretrained import weight_file
from utils.io import sha256_file


def _cells(result: dict) -> dict[str, str]:
    score = result['summary']
    return {'AUC referable': spread(score['auc_referable']), 'kappa': spread(score['kappa'])}


def _score(result: dict) -> dict[str, float]:
    """Mean over the seeds, and a standard deviation to both sides; of one seed its interval by
    people, since nothing is known of its spread."""
    score = result['summary']['auc_referable']
    mean, std = score['mean'], score['std']
    if std is None:
        low, high = result['seeds'][0]['test_best']['interval_95']['auc_referable']
        return {'value': mean, 'low': low, 'high': high}
    return {'value': mean, 'low': mean - std, 'high': mean + std}


@measure(
    'utility',
    'grader on real eyes, AUC of referable DR',
    _cells,
    score=_score,
    depends=lambda study: _configuration(study),
)
def utility(study: Study) -> Run:
    """Scores of graders trained on a candidate, over the seeds."""
    return lambda candidate, folder: train_graders(study, candidate)


def _configuration(study: Study) -> dict[str, Any]:
    """The grader's entries, and the digest of the weight file it starts from."""
    name = 'features' if study.grader.grader == 'probe' else 'initial_weights'
    weights = getattr(study.grader, name)
    return {**study.grader.to_dict(), name: weights and sha256_file(weight_file(weights))}


def _grader_folder(study: Study, candidate: Candidate) -> Path:
    """Where the graders of a candidate lie; not a matter of the seeds, which are folders there."""
    config = {k: v for k, v in _configuration(study).items() if k not in ('seeds', 'save_path')}
    return folder_of(
        study.folder / 'graders',
        'grader',
        {'candidate': candidate.digest, 'people': study.digest, 'grader': config},
    )


def train_graders(study: Study, candidate: Candidate) -> dict:
    """Trains and tests a grader per seed on a candidate; finished ones are read."""
    n = len(candidate.pictures)
    training = TrainingSet(
        [str(i) for i in range(n)],
        [[] for _ in range(n)],
        candidate.labels,
        candidate.shares,
        candidate.people,
    )
    found = run_seeds(
        training,
        candidate.pictures,
        study.population.others,
        study.others,
        config=study.grader,
        out_dir=_grader_folder(study, candidate),
        device=study.device,
    )
    assert found is not None, 'nothing asks these trainings to stop'
    return found
