"""The photographs of a run as the encoder sees them, and what tells them apart."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from datasets.table import Table
from utils.images import load_rgb, resize


class Photographs(Dataset):
    """uint8 [3, S, S] per row of a table; left eyes mirrored on request."""

    def __init__(self, table: Table, size: int, mirror_left: bool) -> None:
        self.table, self.size, self.mirror_left = table, size, mirror_left

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> UInt8[Tensor, '3 S S']:
        picture = resize(load_rgb(self.table.paths[i]), self.size)
        u8 = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        if self.mirror_left and self.table.eyes and self.table.eyes[i] == 'left':
            u8 = u8.flip(2)
        return u8


def copies(digests: Sequence[str], ids: Sequence[str]) -> Bool[np.ndarray, ' n']:
    """bool [n]: photographs with the digest of another one whose id comes first by alphabet."""
    kept: dict[str, str] = {}
    for digest, name in zip(digests, ids):
        kept[digest] = min(name, kept.get(digest, name))
    return np.array([kept[digest] != name for digest, name in zip(digests, ids)])
