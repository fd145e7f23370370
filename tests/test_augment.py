"""ADA's transformations against the reference's percentile cases, and the strength heuristic."""
import pytest
from conftest import relative_error

from training.augment import (
    PIPES,
    AugmentPipe,
    PercentileDraws,
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
