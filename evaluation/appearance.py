"""How real a release looks beside photographs of other people: distances, vessels, sharpness."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from evaluation.fidelity import fidelity, scaled
from evaluation.judges import Judge
from evaluation.judging import judged
from evaluation.population import people_of
from evaluation.registry import Candidate, Cells, Run, interval, measure
from evaluation.spectra import high_frequency_ratio, sharpness
from evaluation.study import Study
from evaluation.vessel_amount import vessel_ratios


@judged(
    'fidelity',
    'Fréchet and kernel distance, precision, coverage on pooled features',
    lambda label, r: {
        f'FD ({label})': interval(r['fd'], '.0f'),
        f'KID ({label})': interval(r['kid'], '.3f'),
    },
)
def distances(study: Study, judge: Judge) -> Callable[[Candidate], dict]:
    """Against photographs of other people."""

    def features(pictures: UInt8[np.ndarray, 'n 3 S S']) -> Float[np.ndarray, 'n F']:
        return scaled(study.features(judge, pictures)['pooled'])

    real, people = features(study.others), people_of(study.population.others)
    return lambda candidate: fidelity(
        real, features(candidate.pictures), real_people=people, seed=study.seed
    )


def _ratios(r: dict) -> Cells:
    heads = {'area': 'vessel area', 'length': 'vessel length', 'high_frequencies': 'fine texture'}
    return {head: interval(r[name], '.2f') for name, head in heads.items()}


@measure('detail', "vessels and power at high frequencies, of the photographs'", _ratios)
def detail(study: Study) -> Run:
    """What a retina needs and distances do not see, as ratios to photographs of other people."""
    people = people_of(study.population.others)

    def run(candidate: Candidate, folder: Path) -> dict[str, Any]:
        pictures = study.others, candidate.pictures
        return {
            **vessel_ratios(*pictures, people=people, seed=study.seed),
            'high_frequencies': high_frequency_ratio(*pictures, people=people, seed=study.seed),
        }

    return run


@measure('sharpness', 'radial power spectra', lambda r: {})
def spectra(study: Study) -> Run:
    """Not in the table; in results.json."""
    return lambda candidate, folder: sharpness(study.others, candidate.pictures)
