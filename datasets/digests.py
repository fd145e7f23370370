"""What tells photographs apart: their pixels, in whatever files they lie."""

import functools
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from utils.decoding import decode_rgb
from utils.errors import UserError, listing
from utils.images import decode_reason
from utils.logs import progress

_READERS = 4  # threads that read and decode


class Digests(NamedTuple):
    """What tells photographs apart.

    pixels: SHA-256 of the decoded picture [n], equal for one photograph in two files; files: one
    SHA-256 over those of all files.
    """

    pixels: list[str]
    files: str


def read_digests(paths: Sequence[Path]) -> Digests:
    """Reads and decodes every file once in a process; UserError that lists all unreadable ones."""

    def one(path: Path) -> tuple[str, str, str]:
        try:
            state = path.stat()
            return *_digests_of(path, state.st_size, state.st_mtime_ns), ''
        except (OSError, UserError) as error:
            return '', '', f'{path}: {decode_reason(error.__cause__ or error)}'

    with ThreadPoolExecutor(_READERS) as pool:
        found = list(progress(pool.map(one, paths), total=len(paths), desc='reading', unit='img'))
    if bad := [reason for *_, reason in found if reason]:
        raise UserError(
            listing(
                f'{len(bad)} of {len(found)} images cannot be read; replace them, or remove them '
                'and their rows',
                bad,
            )
        )
    joint = hashlib.sha256('\n'.join(file for file, *_ in found).encode()).hexdigest()
    return Digests([pixels for _, pixels, _ in found], joint)


@functools.lru_cache(maxsize=2**20)
def _digests_of(path: Path, size: int, time: int) -> tuple[str, str]:
    """SHA-256 of the file and of its pixels; size and time: of the file, which may be replaced."""
    data = path.read_bytes()
    pixels = decode_rgb(lambda: data, str(path)).pixels
    return hashlib.sha256(data).hexdigest(), picture_digest(pixels)


def picture_digest(pixels: UInt8[np.ndarray, 'H W 3']) -> str:
    """SHA-256 of the size and the pixels of a decoded picture."""
    height, width, _ = pixels.shape
    found = hashlib.sha256(repr((width, height)).encode())
    found.update(np.ascontiguousarray(pixels).data)
    return found.hexdigest()
