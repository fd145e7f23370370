"""Smooth pictures, and the random numbers of tests of content encoders."""

import torch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=8, size=32):
    """Smooth pictures within [-1, 1]."""
    coarse = torch.rand(n, 3, 4, 4, generator=generator(1)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=size, mode='bilinear')
