"""The probe as a grader: linear models on frozen features, fitted and tested once per seed."""

import logging
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8

from classification.data import TrainingSet, one_hot
from classification.metrics import bootstrap_intervals, grading_metrics
from classification.settings import Config
from datasets.table import Table
from evaluation.judges import Judge, made
from evaluation.probe import fit_probe, pooled_features
from models.features.guide import save_guide
from models.features.pretrained import load_feature_network

log = logging.getLogger(__name__)


class ProbeGrader:
    """Probes on one training set; features are computed when first needed.

    pictures: uint8 [n, 3, S, S] of `data`; test_pictures [m, 3, S, S] of `test`. A network that
    a release was made with is called its maker in the records, and a warning says so.
    """

    def __init__(
        self,
        data: TrainingSet,
        pictures: UInt8[np.ndarray, 'n 3 S S'],
        test: Table,
        test_pictures: UInt8[np.ndarray, 'm 3 T T'],
        *,
        config: Config,
        device: torch.device,
    ) -> None:
        self.data, self.test, self.config, self.device = data, test, config, device
        self._pictures = pictures, test_pictures

    @cached_property
    def _judge(self) -> Judge:
        network = load_feature_network(self.config.features, arch=self.config.features_arch or None)
        judge = Judge(network, made(network, self.data.networks))
        if judge.maker:
            log.warning(
                'the release was made with %s: these figures flatter; set --features to '
                'another network, and read them beside its figures',
                network.name,
            )
        return judge

    @cached_property
    def _features(self) -> list[np.ndarray]:
        return [pooled_features(self._judge.network, p, device=self.device) for p in self._pictures]

    def record(self, seed: int, rows: Int[np.ndarray, ' r'], guide: Path) -> dict:
        """Scores of a probe on the training pictures `rows`, like a network's record.

        The seed divides the people for the cross-validation. What the probe reads is written to
        the file `guide` (models.features.guide).
        """
        data, (train, test) = self.data, self._features
        soft = data.targets(self.config.labels)
        shares = one_hot(soft) if soft.ndim == 1 else soft
        people = None if data.groups is None else [data.groups[i] for i in rows]
        probe = fit_probe(
            train[rows], shares[rows], people=people, kind=self.config.probe, seed=seed
        )
        network = self._judge.network
        save_guide(
            guide,
            torch.from_numpy(probe.directions(train[rows])),
            network=network.name,
            digest=network.digest,
        )
        grades, score = probe.grades(test), probe.score(test)
        found = grading_metrics(self.test.grades, grades, score)
        found['interval_95'] = bootstrap_intervals(
            self.test.grades, grades, score, groups=self.test.patients
        )
        return {
            'seed': seed,
            'n_train': len(rows),
            'features': self._judge.label,
            'features_sha256': network.digest,
            'strength': probe.strength,
            'grade_strength': probe.grade_strength,
            'test_best': found,
            'test_score': score.tolist(),
        }
