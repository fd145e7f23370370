"""The project's one rule on reduced precision: none is used that was not asked for."""

import contextlib
from collections.abc import Iterator

import torch


def allow_tf32(allowed: bool) -> None:
    """Whether GPUs may round float32 to TF32 in matrix products and convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """`allow_tf32` within the block, and as it was afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def full_precision() -> None:
    """Computes float32 in float32, and sums half-precision products in float32.

    PyTorch lets convolutions on GPUs round float32 to TF32, and matrix products of halves be
    summed in halves. Command lines switch both off when they pick their device; where TF32 helps
    there is a flag (--precision=tf32, --allow-tf32), which switches it on for that work.
    """
    allow_tf32(False)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
