"""ADA's transformations against the reference's percentile cases, and the strength heuristic."""

import pytest
import torch
from conftest import relative_error

from training.augment import PIPES, AugmentPipe, PercentileDraws
from training.resampling import (
    Margins,
    double_by_filters,
    double_by_matrices,
    halve_by_filters,
    halve_by_matrices,
)


def _percentile(x, names, q):
    return AugmentPipe(names, 'cpu')(x, 1.0, draws=PercentileDraws(x.shape[0], 'cpu', q))


@pytest.mark.parametrize('q', [20, 50, 80])
@pytest.mark.parametrize('name', sorted(set(PIPES['bgcfnc']) - {'noise'}))
def test_percentile_golden(golden, name, q):
    data = golden('ada_percentile')
    assert relative_error(_percentile(data['x'], (name,), q / 100), data[f'{name}_{q}']) < 1e-4


@pytest.mark.parametrize('q', [30, 60])
def test_percentile_golden_together(golden, q):
    data = golden('ada_percentile')
    assert relative_error(_percentile(data['x'], PIPES['bgc'], q / 100), data[f'bgc_{q}']) < 1e-4


def test_filters_resample_as_the_matrices_do() -> None:
    pipe = AugmentPipe(PIPES['geom'], 'cpu')
    x = torch.randn(2, 3, 20, 17, generator=torch.Generator().manual_seed(0))
    pairs = [
        (double_by_filters, double_by_matrices, Margins(3, 0, 11, 5)),
        (halve_by_filters, halve_by_matrices, None),
    ]
    for filters, matrices, margins in pairs:
        y, results = x.repeat_interleave(2, 2).repeat_interleave(2, 3), []
        for resample in (filters, matrices):
            leaf = (x if margins else y).clone().requires_grad_()
            out = resample(leaf, pipe._geom_taps, *([margins] if margins else []))
            results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
        for one, other in zip(*results):
            assert relative_error(one, other) < 1e-5
