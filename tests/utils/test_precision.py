"""Float32 is float32, unless a flag asks for less."""

import torch

from utils.cli import resolve_device


def test_command_lines_switch_tf32_off() -> None:
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_tf32 = conv.allow_tf32 = True
    matmul.allow_bf16_reduced_precision_reduction = True
    resolve_device('cpu')
    assert not matmul.allow_tf32 and not conv.allow_tf32
    assert not matmul.allow_bf16_reduced_precision_reduction
