"""Reading many pictures into one array."""

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from utils.errors import UserError, listing
from utils.images import load_rgb, resize
from utils.logs import progress

_IN_MEMORY = 4 << 30  # bytes of pictures kept in memory; larger sets live in a temporary file


def load_pictures(
    sources: Sequence[Sequence[Path]], size: int, *, threads: int = 4
) -> UInt8[np.ndarray, 'n 3 {size} {size}']:
    """Reads (and averages, where a picture has several files) pictures: uint8 [n, 3, S, S].

    Antialiased, aspect ratio not kept (published). Sets above 4 GB are kept in a temporary file
    instead of memory. UserError that lists all unreadable files.
    """
    shape = (len(sources), 3, size, size)
    if np.prod(shape) > _IN_MEMORY:
        with tempfile.TemporaryFile() as file:  # the mapping keeps the deleted file alive
            pictures = np.memmap(file, dtype=np.uint8, mode='w+', shape=shape)
    else:
        pictures = np.empty(shape, np.uint8)

    def read(i: int) -> str | None:
        try:
            total = sum(
                np.asarray(resize(load_rgb(path), size), dtype=np.float64) for path in sources[i]
            )
        except UserError as error:
            return str(error)
        pictures[i] = np.rint(total / len(sources[i])).transpose(2, 0, 1)
        return None

    with ThreadPoolExecutor(threads) as pool:
        answers = list(
            progress(
                pool.map(read, range(len(sources))),
                total=len(sources),
                desc='reading pictures',
                unit='img',
            )
        )
    bad = [a for a in answers if a is not None]
    if bad:
        raise UserError(listing(f'{len(bad)} pictures cannot be read', bad))
    return pictures
