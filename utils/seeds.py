"""Random streams as a function of (seed, keys), so that a resumed run draws the same numbers."""

import random
import zlib

import numpy as np
import torch


def derive(seed: int, *keys: int | str) -> int:
    """A 63-bit integer from a seed and any number of integer or string keys."""
    words = [int(seed)] + [zlib.crc32(k.encode()) if isinstance(k, str) else int(k) for k in keys]
    low, high = np.random.SeedSequence(words).generate_state(2, np.uint32)
    return (int(high) << 32 | int(low)) & (2**63 - 1)


def torch_generator(
    seed: int, *keys: int | str, device: str | torch.device = 'cpu'
) -> torch.Generator:
    """A torch.Generator for (seed, keys)."""
    return torch.Generator(device=device).manual_seed(derive(seed, *keys))


def numpy_generator(seed: int, *keys: int | str) -> np.random.Generator:
    """A numpy Generator for (seed, keys)."""
    return np.random.default_rng(derive(seed, *keys))


def seed_everything(seed: int, *keys: int | str) -> None:
    """Seeds the global generators of random, numpy and torch (CPU and GPU)."""
    value = derive(seed, *keys)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002, libraries draw from this global state
    torch.manual_seed(value)
