"""Measures that ask every judge: the networks that look at releases, makers beside others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Num

from evaluation.attacks.metrics import attack_metrics
from evaluation.judges import Judge
from evaluation.population import people_of
from evaluation.registry import Candidate, Cells, Measure, Run, interval, save_scores
from evaluation.study import Study

Opinion = Callable[[Candidate], Any]  # JSON-able
Found = tuple[np.ndarray, np.ndarray, dict]  # scores of people [m], [o], and more to record


def judged(
    name: str, title: str, cells: Callable[[str, Any], Cells], **details: Any
) -> Callable[[Callable[[Study, Judge], Opinion]], Measure]:
    """Makes a Measure of a function (study, judge) -> (candidate -> result).

    Its result is {judge's label: result}, independent judges first; cells(label, result) gives
    the columns of each.
    """

    def wrap(opinion_of: Callable[[Study, Judge], Opinion]) -> Measure:
        def prepare(study: Study) -> Run:
            opinions = {judge.label: opinion_of(study, judge) for judge in study.judges}
            return lambda candidate, folder: {
                label: opinion(candidate) for label, opinion in opinions.items()
            }

        def columns(result: dict) -> Cells:
            return {
                head: cell
                for label, own in result.items()
                for head, cell in cells(label, own).items()
            }

        return Measure(name, title, prepare, columns, _judges_of, **details)

    return wrap


def judged_attack(
    name: str, title: str, cells: Callable[[str, dict], Cells] = lambda *_: {}
) -> Callable[[Callable[[Study, Judge], Callable[[Candidate], Found]]], Measure]:
    """Makes a membership attack of a function (study, judge) -> (candidate -> Found).

    Each entry of Found is of one person. Its result is the metrics of the strongest judge, with
    `by_judge` {label: metrics}: an attacker may have the maker's network as well as any other.
    """

    def wrap(attack_of: Callable[[Study, Judge], Callable[[Candidate], Found]]) -> Measure:
        def prepare(study: Study) -> Run:
            attacks = {
                judge.label: attack_of(study, judge)
                for judge in sorted(study.judges, key=lambda j: not j.maker)
            }

            def run(candidate: Candidate, folder: Path) -> dict:
                found = {label: attack(candidate) for label, attack in attacks.items()}
                metrics = {
                    label: {**attack_metrics(member, other), **more}
                    for label, (member, other, more) in found.items()
                }
                best = max(metrics, key=lambda label: metrics[label]['auc']['value'])
                scores = found[best][:2]
                save_scores(folder, scores, [[str(i) for i in range(len(s))] for s in scores])
                return {**metrics[best], 'judge': best, 'by_judge': metrics}

            return run

        def columns(result: dict) -> Cells:
            found: Cells = {}
            for label, own in result['by_judge'].items():
                found[f'attack: {name} ({label})'] = interval(own['auc'], '.2f')
                found |= cells(label, own)
            return found

        return Measure(name, title, prepare, columns, _judges_of, attack=True)

    return wrap


def _judges_of(study: Study) -> dict[str, Any]:
    return {'judges': [[j.label, j.network.digest] for j in study.judges]}


def best_of_people(scores: Num[np.ndarray, ' n'], people: list[str]) -> Num[np.ndarray, ' p']:
    """The largest score of each person's photographs, in the order of their names."""
    unit = np.unique(np.asarray(people, dtype=str), return_inverse=True)[1]
    best = np.full(unit.max() + 1, -np.inf)
    np.maximum.at(best, unit, scores)
    return best


def sides(
    study: Study, candidate: Candidate
) -> tuple[Bool[np.ndarray, ' m'], list[str], list[str]]:
    """Which members count [m], the people of those, and the people of the non-members."""
    known, population = candidate.in_release, study.population
    people = np.array(people_of(population.members)), np.array(people_of(population.others))
    return known, list(people[0][known]), list(people[1][population.nonmember])
