"""The photographs of a run as the encoder sees them, and what tells them apart."""

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from datasets.table import Table
from utils.errors import UserError, listing
from utils.images import as_rgb, decode_reason, load_rgb, open_image, resize
from utils.logs import progress

_READERS = 4  # threads that read and decode


class Photographs(Dataset):
    """uint8 [3, S, S] per row of a table; left eyes mirrored on request."""

    def __init__(self, table: Table, size: int, mirror_left: bool) -> None:
        self.table, self.size, self.mirror_left = table, size, mirror_left

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> UInt8[Tensor, '3 S S']:
        picture = resize(load_rgb(self.table.paths[i]), self.size)
        u8 = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        if self.mirror_left and self.table.eyes[i] == 'left':
            u8 = u8.flip(2)
        return u8


def copies(digests: Sequence[str], ids: Sequence[str]) -> Bool[np.ndarray, ' n']:
    """bool [n]: photographs with the digest of another one whose id comes first by alphabet."""
    kept: dict[str, str] = {}
    for digest, name in zip(digests, ids):
        kept[digest] = min(name, kept.get(digest, name))
    return np.array([kept[digest] != name for digest, name in zip(digests, ids)])


class Digests(NamedTuple):
    """What tells photographs apart.

    pixels: SHA-256 of the decoded picture [n], equal for one photograph in two files; files: one
    SHA-256 over those of all files.
    """

    pixels: list[str]
    files: str


def read_digests(paths: Sequence[Path]) -> Digests:
    """Reads and decodes every file once; UserError that lists all unreadable ones."""

    def one(path: Path) -> tuple[str, str, str]:
        try:
            data = Path(path).read_bytes()
            with open_image(lambda: io.BytesIO(data), str(path)) as image:
                picture = as_rgb(image)
        except (OSError, UserError) as error:
            return '', '', f'{path}: {decode_reason(error.__cause__ or error)}'
        pixels = hashlib.sha256(repr(picture.size).encode() + picture.tobytes())
        return hashlib.sha256(data).hexdigest(), pixels.hexdigest(), ''

    with ThreadPoolExecutor(_READERS) as pool:
        found = list(progress(pool.map(one, paths), total=len(paths), desc='reading', unit='img'))
    if bad := [reason for *_, reason in found if reason]:
        raise UserError(
            listing(
                f'{len(bad)} of {len(found)} images cannot be read; replace them '
                'or remove their rows',
                bad,
            )
        )
    joint = hashlib.sha256('\n'.join(file for file, *_ in found).encode()).hexdigest()
    return Digests([pixels for _, pixels, _ in found], joint)
