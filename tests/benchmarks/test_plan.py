"""What a step costs is counted, not guessed; hours follow from it."""

import pytest
import torch
from conftest import load_script

plan = load_script('plan', 'benchmarks')


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_product_is_counted(dtype):
    x, w = torch.empty(8, 16, dtype=dtype), torch.empty(16, 4, dtype=dtype, requires_grad=True)
    forward = plan.count(lambda: x @ w)
    operations = 2 * 8 * 16 * 4
    half = dtype == torch.bfloat16
    assert (forward.half, forward.single) == ((operations, 0) if half else (0, operations))
    assert forward.bytes == (8 * 16 + 16 * 4 + 8 * 4) * x.element_size()
    assert forward.launches == 1 and forward.kept == 8 * 16 * x.element_size()
    both = plan.count(lambda: (x @ w).sum().backward())
    assert both.half + both.single >= 2 * operations and both.launches > forward.launches


def test_hours_are_those_of_what_takes_longest():
    work = plan.Work(half=1e15, single=0.0, bytes=0.0, launches=0.0, kept=5.0)
    card = plan.CARDS['H100']
    assert work.seconds(card) == pytest.approx(1e15 / (0.5 * card.half))
    assert work.times(3).seconds(card) == pytest.approx(3 * work.seconds(card))
    assert work.times(3).kept == 5
    launches = work._replace(half=0.0, launches=1e6)
    assert launches.seconds(card) == pytest.approx(5)
    assert work._replace(launches=1e9).seconds(card) > 100 * work.seconds(card)
