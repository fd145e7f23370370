"""Batches are a function of the step, whoever asks for them, and from where on."""

import itertools
from typing import Any

import pytest
import torch

from training.batches import Batches, StepSampler
from utils.seeds import numpy_generator


def draw(n_passes: int, *, rank: int = 0, world: int = 1, **options: Any) -> list[list]:
    sampler = StepSampler(10, batch_size=4, seed=3, **options)
    sampler.rank, sampler.world = rank, world
    return list(itertools.islice(sampler, n_passes))


def test_whole_batches_go_on_where_they_were() -> None:
    whole = draw(9, mirror=True)
    assert whole[3:] == draw(6, mirror=True, start=3)
    first_epoch = [i for batch in whole[:2] for i, _ in batch]
    assert len(set(first_epoch)) == 8 and {m for b in whole for _, m in b} == {True, False}
    assert not any(m for b in draw(9, mirror=False) for _, m in b)


def test_an_epoch_by_hand() -> None:
    """Whether a picture is mirrored is the picture's, not its place's."""
    numbers = numpy_generator(3, 'epoch', 0)
    order, mirrored = numbers.permutation(10), numbers.random(10) < 0.5
    assert draw(1, mirror=True) == [[(int(i), bool(mirrored[i])) for i in order[:4]]]


def test_batches_across_epochs_leave_nothing_out() -> None:
    passes = draw(20, pass_size=2, whole_batches=False)
    items = list(itertools.chain.from_iterable(passes))
    for epoch in range(4):
        assert sorted(items[epoch * 10 : (epoch + 1) * 10]) == list(range(10))
    assert draw(6, pass_size=2, whole_batches=False, start=2) == passes[4:10]


@pytest.mark.parametrize('pass_size', [1, 2])
def test_processes_share_the_passes_of_a_step(pass_size: int) -> None:
    options: dict[str, Any] = {'pass_size': pass_size, 'mirror': True}
    alone = draw(12, **options)
    shares = [draw(6, rank=rank, world=2, **options) for rank in (0, 1)]
    assert alone == [part for pair in zip(*shares) for part in pair]


@pytest.mark.parametrize('workers', [0, 2])
def test_pictures_come_in_the_order_of_the_sampler(workers: int) -> None:
    pictures = [torch.full((3, 2, 2), i, dtype=torch.uint8) for i in range(10)]
    sampler = StepSampler(10, batch_size=4, seed=3)
    batches = Batches(pictures, sampler, device=torch.device('cpu'), workers=workers)
    for wanted in draw(3):
        found = next(batches)
        assert torch.equal(found[:, 0, 0, 0], torch.tensor(wanted) / 127.5 - 1)
