"""Groups that a card's memory does not hold together are optimised in halves, with one result."""

import pytest
import torch
from small_engine import small_engine, small_groups

from anonymization.workers import run_within_memory
from utils.errors import UserError


class Card:
    """An engine on a card that holds `most` groups."""

    def __init__(self, most):
        self.engine, self.most, self.sizes = small_engine(), most, []

    def run(self, groups, **options):
        self.sizes.append(len(groups))
        if len(groups) > self.most:
            raise torch.cuda.OutOfMemoryError('out of memory')
        return self.engine.run(groups, **options)


def test_halves_give_what_each_group_gives_alone():
    card, groups = Card(1), small_groups(None, (2, 3, 2))
    steps = []
    together = run_within_memory(card, groups, on_step=steps.append)
    assert card.sizes == [3, 1, 2, 1, 1]
    for i, group in enumerate(groups):
        alone = card.engine.run([group])
        for name in ('ws', 'image', 'centroid'):
            assert torch.equal(getattr(together, name)[i], getattr(alone, name)[0])
        assert torch.equal(together.losses[:, i], alone.losses[:, 0])
    assert sum(steps) == 3 * card.engine.config.n_steps


def test_one_group_that_does_not_fit_is_an_error_with_a_remedy():
    with pytest.raises(UserError, match='one group does not fit.*bf16'):
        run_within_memory(Card(0), small_groups(None, (2,)))
