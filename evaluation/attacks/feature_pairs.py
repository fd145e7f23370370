"""The pair attack on frozen features: does this photograph belong to this picture's group?

A logistic regression on how two pictures agree, component by component, in features whitened by
other people. It is trained on groups whose members the attacker knows, and tested on others.

Shapes: n photographs and C release pictures with features [*, F]; group_of [n] is the index of a
photograph's release picture, -1 for none.
"""

import warnings

import numpy as np
from jaxtyping import Float, Float64, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold

from evaluation.bootstrap import unit_numbers
from utils.errors import UserError
from utils.seeds import numpy_generator

COMPONENTS = 64
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
_WRONG = 5  # pictures of other groups that each photograph is compared with
_SMALL = 1e-8


class FeaturePairs:
    """The attack; reference [r, F]: features of people the attacker knows not to be members.

    UserError with fewer than 8 reference pictures.
    """

    def __init__(self, reference: Float[np.ndarray, 'r F'], *, seed: int = 0) -> None:
        if len(reference) < 8:
            raise UserError(
                f'{len(reference)} reference pictures are too few for the pair '
                'attack; at least 8 are needed'
            )
        self.seed = seed
        self.mean = reference.mean(0)
        _, values, axes = np.linalg.svd(reference - self.mean, full_matrices=False)
        n = min(COMPONENTS, len(reference) // 2)
        self.axes = axes[:n] / (values[:n, None] / np.sqrt(len(reference)) + _SMALL)

    def _agreement(
        self, photographs: Float[np.ndarray, 'p F'], pictures: Float[np.ndarray, 'p F']
    ) -> Float[np.ndarray, 'p c']:
        """What the regression sees of pairs [p, F]: products and squared differences [p, 2 c]."""
        a, b = ((x - self.mean) @ self.axes.T for x in (photographs, pictures))
        return np.concatenate([a * b, (a - b) ** 2], 1)

    def fit(
        self,
        photographs: Float[np.ndarray, 'n F'],
        pictures: Float[np.ndarray, 'C F'],
        group_of: Int[np.ndarray, ' n'],
    ) -> 'FeaturePairs':
        """Trains on known groups; returns self. UserError with fewer than 4 of them."""
        groups = np.unique(group_of)
        if len(groups) < 4:
            raise UserError(
                f'{len(groups)} groups are too few to train the pair attack; at least 4 are needed'
            )
        rng = numpy_generator(self.seed, 'feature pairs')
        place = np.searchsorted(groups, group_of)
        n_wrong = min(_WRONG, len(groups) - 1)
        steps = np.stack([rng.permutation(len(groups) - 1)[:n_wrong] + 1 for _ in place])
        wrong = groups[(place[:, None] + steps) % len(groups)]
        shown = np.concatenate([group_of[:, None], wrong], 1).ravel()
        rows = np.repeat(np.arange(len(group_of)), 1 + n_wrong)
        same = np.tile(np.arange(1 + n_wrong) == 0, len(group_of))
        search = GridSearchCV(
            LogisticRegression(class_weight='balanced', max_iter=300),
            {'C': _STRENGTHS},
            scoring='neg_log_loss',
            cv=GroupKFold(min(4, len(groups))),
        )
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', ConvergenceWarning)
            search.fit(
                self._agreement(photographs[rows], pictures[shown]), same, groups=group_of[rows]
            )
        self.model = search.best_estimator_
        return self

    def scores(
        self, photographs: Float[np.ndarray, 'n F'], pictures: Float[np.ndarray, 'C F']
    ) -> Float64[np.ndarray, 'n C']:
        """Log odds float64 [n, C] that a photograph belongs to a picture."""
        return np.stack(
            [
                self.model.decision_function(
                    self._agreement(photographs, np.broadcast_to(p, photographs.shape))
                )
                for p in pictures
            ],
            1,
        )


def pair_membership(
    members: Float[np.ndarray, 'm F'],
    others: Float[np.ndarray, 'o F'],
    pictures: Float[np.ndarray, 'C F'],
    group_of: Int[np.ndarray, ' m'],
    reference: Float[np.ndarray, 'r F'],
    *,
    member_people: list,
    other_people: list,
    seed: int = 0,
) -> tuple[Float[np.ndarray, ' m'], Float[np.ndarray, ' o']]:
    """Scores of members [m] and others [o]: is a person behind any picture the attacker targets?

    Trained on half of the groups, without people who stand behind a target as well, and scored
    against the pictures of the other half, then the other way round; half of the others (whole
    people) count in each turn. Where nobody stands behind a picture (group_of all -1), members
    are dealt to pictures by chance, which leaves nothing to learn. NaN for members behind none.
    """
    rng = numpy_generator(seed, 'pair membership')
    own = np.asarray(group_of)
    if not (own >= 0).any():
        own = rng.permutation(len(members)) % len(pictures)
    person = unit_numbers(member_people, len(members))
    groups = rng.permutation(np.unique(own[own >= 0]))
    other = unit_numbers(other_people, len(others))
    other_half = (rng.permutation(other.max() + 1) % 2)[other]
    found = np.full(len(members), np.nan), np.full(len(others), np.nan)
    for half in (0, 1):
        target = np.isin(own, groups[half::2])
        known = (own >= 0) & ~target & ~np.isin(person, person[target])
        if len(np.unique(own[known])) < 4:  # few groups, or everybody is in both halves
            known = (own >= 0) & ~target
        attack = FeaturePairs(reference, seed=seed).fit(members[known], pictures, own[known])
        aims = pictures[np.sort(groups[half::2])]
        found[0][target] = attack.scores(members[target], aims).max(1)
        found[1][other_half == half] = attack.scores(others[other_half == half], aims).max(1)
    return found
