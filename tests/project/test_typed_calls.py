"""The checks of shapes at every call: that they are on, and can fail."""

import os

import pytest
import torch
from jaxtyping import TypeCheckError
from typed_calls import unchecked

from criteria.content import content_loss
from utils import images
from utils.images import grid, save_png, to_uint8

pytestmark = pytest.mark.skipif(
    os.environ.get('KSALSA_TYPED_CALLS') == '0', reason='turned off by KSALSA_TYPED_CALLS'
)


def test_wrong_shapes_are_refused():
    with pytest.raises(TypeCheckError, match='mean_targets'):
        content_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(TypeCheckError, match='imgs'):
        grid(torch.zeros(3, 8, 8), 2)
    assert content_loss(torch.eye(2, 3), torch.eye(2, 3)).tolist() == [0, 0]


def test_wrong_dtypes_are_refused():
    with pytest.raises(TypeCheckError, match='img'):
        to_uint8(torch.zeros(3, 8, 8, dtype=torch.uint8))


def test_wrong_results_are_refused(tmp_path, monkeypatch):
    save_png(torch.zeros(3, 8, 8), tmp_path / 'a.png')
    monkeypatch.setattr(images, 'resize', lambda image, size: image)
    assert images.load_tensor(tmp_path / 'a.png', 8).shape == (3, 8, 8)
    with pytest.raises(TypeCheckError, match='return value'):
        images.load_tensor(tmp_path / 'a.png', 16)


def test_checks_can_be_turned_off_for_a_while():
    with unchecked(), pytest.raises(RuntimeError):
        content_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(TypeCheckError):
        content_loss(torch.zeros(2, 3), torch.zeros(2, 4))
