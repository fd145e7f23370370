"""Checkpoints: pruning, order, and falling back past damaged files."""

import logging

import pytest
import torch

from training.checkpoints import latest_checkpoint, list_checkpoints, save_checkpoint
from utils.errors import UserError
from utils.io import load_weights


def test_order_and_pruning(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (900, 1000, 20):
        save_checkpoint(tmp_path, step, {'step': step})
    save_checkpoint(tmp_path, 5, {'step': 5}, prefix='state')
    assert [s for s, _ in list_checkpoints(tmp_path)] == [20, 900, 1000]
    payload, path = latest_checkpoint(tmp_path)
    assert payload == {'step': 1000} and path.name == 'iteration_1000.pt'
    save_checkpoint(tmp_path, 2000, {'step': 2000}, keep=2)
    assert [s for s, _ in list_checkpoints(tmp_path)] == [1000, 2000]
    assert [s for s, _ in list_checkpoints(tmp_path, 'state')] == [5]


@pytest.mark.parametrize('damage', ['truncated', 'flipped bit', 'empty'])
def test_damaged_files_are_passed_over(tmp_path, caplog, damage):
    save_checkpoint(tmp_path, 1, {'x': torch.zeros(1000)})
    path = save_checkpoint(tmp_path, 2, {'x': torch.ones(1000)})
    data = bytearray(path.read_bytes())
    if damage == 'truncated':
        data = data[:-300]
    elif damage == 'empty':
        data = b''
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match='iteration_2.pt'):
        load_weights(path)
    with caplog.at_level(logging.WARNING):
        payload, found = latest_checkpoint(tmp_path)
    assert found.name == 'iteration_1.pt' and payload['x'].sum() == 0
    assert 'iteration_2.pt' in caplog.text and 'falling back' in caplog.text


def test_all_damaged_is_an_error(tmp_path):
    (tmp_path / 'iteration_3.pt').write_bytes(b'junk')
    with pytest.raises(UserError, match='none of the 1 checkpoints'):
        latest_checkpoint(tmp_path)
