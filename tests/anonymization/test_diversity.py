"""L-diversity and t-closeness, worked out in two ways."""

import json
from fractions import Fraction

import numpy as np

from anonymization.audit import derive, records
from anonymization.release import GroupFacts, grade_diversity


def test_people_and_diversity():
    assert records.people_of(None, ['a', 'b', 'a']) == [0, 1, 0]
    joined = records.people_of(['p', 'q', 'r', 'p', 's'], ['a', 'b', 'b', 'c', 'd'])
    assert joined[0] == joined[3] != joined[1] == joined[2] and len(set(joined)) == 3
    found = derive.diversity([(5, 0, 0, 0, 0), (0, 0, 0, 0, 5), (3, 2, 0, 0, 0)])
    assert found['homogeneous'] == round(2 / 3, 6) and found['l_min'] == 1
    # Over all: 8, 2, 0, 0, 5 of 15. The second group differs by 8/15 + 3 * 10/15 in four steps.
    assert found['t_max'] == round(float(Fraction(38, 60)), 6)


def test_both_ways_to_work_out_diversity_agree():
    """To the last digit, since the manifest is compared byte for byte."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        counts = [
            tuple(map(int, rng.multinomial(rng.integers(2, 40), rng.dirichlet([0.5] * 5))))
            for _ in range(rng.integers(1, 9))
        ]
        groups = [GroupFacts(str(i), sum(c), sum(c), c) for i, c in enumerate(counts)]
        assert json.dumps(grade_diversity(groups)) == json.dumps(derive.diversity(counts))
