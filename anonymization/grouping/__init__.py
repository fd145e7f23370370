"""Assigns images to groups of at least k distinct patients with a small within-group squared error.

Methods share one interface: the paper's greedy (section on same-size clustering), MDAV
(Domingo-Ferrer and Mateo-Sanz, 2002), the standard of microaggregation, and the default, which
starts from MDAV and then repeatedly ejects one member of every group and puts all of them back by
an optimal assignment. Nothing larger than the features is ever held: no n x n matrix.

A *unit* is what moves as a whole: an image under the policy 'distinct' (a patient's images then
land in different groups), all images of a patient under 'together'. Either way a group needs k
units, and never holds two units of one patient.
"""

from anonymization.grouping.assign import (
    METHODS,
    POLICIES,
    SURPLUS,
    Grouping,
    assign_groups,
    check_groupable,
)
from anonymization.grouping.features import squared_errors
from anonymization.grouping.methods import DEALT

__all__ = [
    'DEALT',
    'METHODS',
    'POLICIES',
    'SURPLUS',
    'Grouping',
    'assign_groups',
    'check_groupable',
    'squared_errors',
]
