"""The project's one rule on reduced precision: none is used that was not asked for."""

import torch


def full_precision() -> None:
    """Computes float32 in float32, and sums half-precision products in float32.

    PyTorch lets convolutions on GPUs round float32 to TF32, and matrix products of halves be
    summed in halves. Command lines switch both off when they pick their device; where TF32 helps
    there is a flag (--precision=tf32, --allow-tf32), which switches it on for that work.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
