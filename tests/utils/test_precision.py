"""Float32 is float32, unless a flag asks for less."""

import re

import pytest
import torch
from conftest import ROOT

from utils.cli import resolve_device
from utils.precision import full_precision, tf32


def test_tf32_is_switched_back() -> None:
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    for before in (False, True):
        matmul.allow_tf32, conv.allow_tf32 = before, not before
        for allowed in (False, True):
            with pytest.raises(KeyError), tf32(allowed):
                assert matmul.allow_tf32 == conv.allow_tf32 == allowed
                raise KeyError
            assert (matmul.allow_tf32, conv.allow_tf32) == (before, not before)
    full_precision()


def test_tf32_is_switched_in_one_place() -> None:
    folders = ('anonymization', 'benchmarks', 'classification', 'evaluation', 'MIA', 'models')
    folders += ('scripts', 'stages', 'training', 'utils')
    files = [path for folder in folders for path in (ROOT / folder).rglob('*.py')]
    found = [p.name for p in files if re.search(r'\.allow_tf32 = ', p.read_text('utf-8'))]
    assert found == ['precision.py']


def test_command_lines_switch_tf32_off() -> None:
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_tf32 = conv.allow_tf32 = True
    matmul.allow_bf16_reduced_precision_reduction = True
    resolve_device('cpu')
    assert not matmul.allow_tf32 and not conv.allow_tf32
    assert not matmul.allow_bf16_reduced_precision_reduction
