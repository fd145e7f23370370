"""Photographs for encoder training: any folder or archive, resized to one side.

Shapes: n images, S side. Pictures are uint8 [3, S, S].
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from datasets.archive import FileStore
from utils.errors import UserError, listing
from utils.images import decode_reason, resize
from utils.logs import progress

log = logging.getLogger(__name__)

_CACHE_LIMIT = 2 << 30  # bytes of decoded pictures kept in memory


class ImagesDataset(torch.utils.data.Dataset):
    """The images of a folder (searched recursively) or ZIP archive in the order of their names.

    `dataset[i]` is the picture, `dataset[i, True]` its mirror image. Resizing does not keep the
    aspect ratio (published). Sets that fit 2 GB are decoded at once, others when asked for.

    Raises UserError when there are no images, or, listing them all, when some cannot be decoded
    (of large sets only the headers are checked here).
    """

    def __init__(self, path: str | Path, size: int, *, threads: int = 4) -> None:
        self.path, self.size = path, size
        self._store = FileStore(path)
        self.names = self._store.image_names()
        if not self.names:
            raise UserError(f'no images in {path}')
        self.cached = len(self.names) * 3 * size**2 <= _CACHE_LIMIT
        self._pixels = torch.empty(
            (len(self.names) if self.cached else 0, 3, size, size), dtype=torch.uint8
        )
        self._read_all(threads)

    def _read_all(self, threads: int) -> None:
        # A ZIP handle cannot be read from several threads at once.
        threads = 1 if self._store.is_zip else threads
        with ThreadPoolExecutor(threads) as pool:
            results = list(
                progress(
                    pool.map(self._read_one, range(len(self.names))),
                    total=len(self.names),
                    desc='reading images',
                    unit='img',
                )
            )
        bad = [r for r in results if r is not None]
        if bad:
            raise UserError(
                listing(
                    f'{len(bad)} of {len(results)} images cannot be read; replace or remove them',
                    bad,
                )
            )

    def _read_one(self, i: int) -> str | None:
        """Caches picture i, or opens its header; returns a complaint or None."""
        try:
            if self.cached:
                self._pixels[i] = self._decode(i)
            else:
                self._store.size(self.names[i])
        except UserError as error:
            return f'  {self.names[i]}: {decode_reason(error.__cause__ or error)}'
        return None

    def _decode(self, i: int) -> UInt8[Tensor, '3 S S']:
        picture = resize(self._store.image(self.names[i]), self.size)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def digest(self) -> str:
        """Hex digest that changes with the pictures' files (names and contents)."""
        return self._store.digest(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: int | tuple[int, bool]) -> UInt8[Tensor, '3 S S']:
        i, mirrored = item if isinstance(item, tuple) else (item, False)
        img = self._pixels[i] if self.cached else self._decode(i)
        return img.flip(2) if mirrored else img
