"""The photographs of a table (see datasets.table) as uint8 tensors of one size."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from datasets.table import Table
from utils.errors import UserError, listing
from utils.images import load_rgb, resize
from utils.io import digest_files
from utils.logs import progress

_CACHE_LIMIT = 2 << 30  # bytes of decoded pictures kept in memory


class TableImages(torch.utils.data.Dataset):
    """Pictures in the order of the table's rows, resized to a square (aspect ratio not kept).

    `dataset[i]` is uint8 [3, S, S], `dataset[i, True]` its mirror image. Every file is decoded
    once here, and kept when the set fits 2 GB; UserError lists all that cannot be read.
    """

    def __init__(self, table: Table, size: int, *, threads: int = 4) -> None:
        self.names, self.paths, self.size = table.ids, table.paths, size
        self.cached = len(self.paths) * 3 * size**2 <= _CACHE_LIMIT
        self._pixels = torch.empty(
            (len(self.paths) if self.cached else 0, 3, size, size), dtype=torch.uint8
        )
        with ThreadPoolExecutor(threads) as pool:
            bad = [
                r
                for r in progress(
                    pool.map(self._read_one, range(len(self.paths))),
                    total=len(self.paths),
                    desc='reading images',
                    unit='img',
                )
                if r is not None
            ]
        if bad:
            raise UserError(listing(f'{len(bad)} of {len(self.paths)} images cannot be read', bad))

    def _read_one(self, i: int) -> str | None:
        """Decodes (and caches) picture i; returns a complaint or None."""
        try:
            img = self._decode(i)
        except UserError as error:
            return str(error)
        if self.cached:
            self._pixels[i] = img
        return None

    def _decode(self, i: int) -> UInt8[Tensor, '3 S S']:
        picture = resize(load_rgb(self.paths[i]), self.size)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def digest(self) -> str:
        """Hex digest that changes with the ids of the rows and the contents of their files."""
        return digest_files(self.names, self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int | tuple[int, bool]) -> UInt8[Tensor, '3 S S']:
        i, mirrored = item if isinstance(item, tuple) else (item, False)
        img = self._pixels[i] if self.cached else self._decode(i)
        return img.flip(2) if mirrored else img
