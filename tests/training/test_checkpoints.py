"""Checkpoints: pruning, order, and falling back past damaged files."""

import logging
from pathlib import Path

import pytest
import torch

from training.checkpoints import Checkpoints
from utils.errors import UserError
from utils.io import load_weights


def test_order_and_pruning(tmp_path: Path) -> None:
    exports, states = Checkpoints(tmp_path, 'iteration_'), Checkpoints(tmp_path, keep=2)
    assert exports.latest() is None
    for step in (900, 1000, 20):
        exports.save(step, {'step': step})
    states.save(5, {'step': 5})
    assert [p.name for p in exports.list()] == [f'iteration_{s}.pt' for s in (20, 900, 1000)]
    assert exports.latest() == ({'step': 1000}, exports.path(1000))
    for step in (6, 10):
        states.save(step, {'step': step})
    assert [p.name for p in states.list()] == ['state_6.pt', 'state_10.pt']
    assert len(exports.list()) == 3


def test_numbers_as_the_generator_writes_them(tmp_path: Path) -> None:
    snapshots = Checkpoints(tmp_path, 'snap-', number=lambda n: f'{n / 1000:09.3f}')
    for images in (123456789, 8, 2000):
        snapshots.save(images, {'images': images})
    (tmp_path / 'snap-other.pt').touch()
    names = ['snap-00000.008.pt', 'snap-00002.000.pt', 'snap-123456.789.pt']
    assert [p.name for p in snapshots.list()] == names
    assert snapshots.latest()[0] == {'images': 123456789}


@pytest.mark.parametrize('damage', ['truncated', 'flipped bit', 'empty'])
def test_damaged_files_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {'x': torch.zeros(1000)})
    path = checkpoints.save(2, {'x': torch.ones(1000)})
    data = bytearray(path.read_bytes())
    if damage == 'truncated':
        data = data[:-300]
    elif damage == 'empty':
        data = bytearray()
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match='state_2.pt'):
        load_weights(path)
    with caplog.at_level(logging.WARNING):
        payload, found = checkpoints.latest()
    assert found.name == 'state_1.pt' and payload['x'].sum() == 0
    assert 'state_2.pt' in caplog.text and 'falling back' in caplog.text


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    (tmp_path / 'state_3.pt').write_bytes(b'junk')
    with pytest.raises(UserError, match='none of the 1 files state_.*another folder'):
        Checkpoints(tmp_path).latest()
