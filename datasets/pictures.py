"""Pictures of one size from any source: the only way this project reads many of them.

Decoding goes on in parallel, JPEGs at a smaller scale where that leaves twice the wanted side, and
all that cannot be read are named together. Shapes: n pictures, S side.
"""

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets.archive import FileStore
from datasets.dicom import find_dicom
from datasets.sources import SourceImage, list_files, list_source, list_table
from datasets.table import Table, read_table
from utils.errors import UserError, listing
from utils.images import decode_reason, open_image, resize_pixels
from utils.io import digest_files
from utils.logs import progress

_CACHE_LIMIT = 2 << 30  # bytes of decoded pictures kept in memory
_IN_MEMORY = 4 << 30  # bytes of an array in memory; larger ones live in a temporary file
_THREADS = 4
# Sides, in those wanted, that scaled decoding leaves at least: so much detail that the antialiased
# resize gives what it gives of the whole picture, up to a few grey levels (test_pictures.py).
OVERSAMPLING = 2

Item = SourceImage | Sequence[SourceImage]
Source = str | Path | Table | Sequence[str | Path] | Sequence[Sequence[Path]]


class Pictures(torch.utils.data.Dataset):
    """The pictures of `source`, each resized to S x S (aspect ratio not kept: published).

    source: a folder (searched recursively; of DICOM files, too), ZIP or CSV table; a Table; a list
    of files, or of lists of files, whose pictures are averaged. Its order is kept; folders and
    ZIPs are in the order of their names. `pictures[i]` is uint8 [3, S, S], `pictures[i, True]` its
    mirror image. Sets that fit 2 GB are kept once decoded, others are decoded when asked for.

    Every picture is decoded once here. UserError when there are none, or that lists all that
    cannot be decoded.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        *,
        resample: Image.Resampling = Image.Resampling.BILINEAR,
        threads: int = _THREADS,
    ) -> None:
        self.size, self._resample = size, resample
        self.names, self._items, self._digest = _resolve(source)
        self.cached = len(self._items) * 3 * size**2 <= _CACHE_LIMIT
        n = len(self._items) if self.cached else 0
        self._pixels = torch.empty((n, 3, size, size), dtype=torch.uint8)
        keep = self._pixels.numpy() if self.cached else None
        read_into(keep, self._items, size, resample=resample, threads=threads)

    def digest(self) -> str:
        """Hex digest that changes with the names and the contents of the files."""
        return self._digest()

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, item: int | tuple[int, bool]) -> torch.Tensor:
        i, mirrored = item if isinstance(item, tuple) else (item, False)
        if self.cached:
            img = self._pixels[i]
        else:
            img = torch.from_numpy(_read(self._items[i], self.size, self._resample))
        return img.flip(2) if mirrored else img


def load_pictures(
    source: Source,
    size: int,
    *,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
    threads: int = _THREADS,
) -> np.ndarray:
    """The pictures of a source of `Pictures` as one array, uint8 [n, 3, S, S].

    Sets above 4 GB are kept in a temporary file instead of memory. UserError that lists all
    unreadable files.
    """
    items = _resolve(source)[1]
    shape = (len(items), 3, size, size)
    if np.prod(shape) > _IN_MEMORY:
        with tempfile.TemporaryFile() as file:  # the mapping keeps the deleted file alive
            pictures: np.ndarray = np.memmap(file, dtype=np.uint8, mode='w+', shape=shape)
    else:
        pictures = np.empty(shape, np.uint8)
    read_into(pictures, items, size, resample=resample, threads=threads)
    return pictures


def decoding_scales(
    paths: Sequence[Path], at_least: int, *, threads: int = _THREADS
) -> list[int | None]:
    """What `as_rgb` is to be told for each photograph: `at_least`, or None to decode it whole.

    None where one in another format has the same size: whether the two show the same picture
    only their whole pixels tell. Reads headers only.
    """

    def header(path: Path) -> tuple[tuple[int, ...], bool]:
        try:
            with open_image(path) as image:
                return tuple(sorted(image.size)), image.format in ('JPEG', 'MPO')
        except UserError:
            return (), True  # said when it is read

    with ThreadPoolExecutor(threads) as pool:
        headers = list(pool.map(header, paths))
    formats: dict[tuple[int, ...], set[bool]] = {}
    for side, scalable in headers:
        formats.setdefault(side, set()).add(scalable)
    return [None if len(formats[side]) > 1 else at_least for side, _ in headers]


def read_into(
    pictures: np.ndarray | None,
    items: Sequence[Item],
    size: int,
    *,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
    threads: int = _THREADS,
) -> None:
    """Decodes `items` into uint8 [n, 3, S, S], or only looks whether they can be decoded."""

    def read(i: int) -> str | None:
        try:
            found = _read(items[i], size, resample)
        except UserError as error:
            one = items[i]
            name = one.name if isinstance(one, SourceImage) else one[0].name
            return f'{name}: {decode_reason(error.__cause__ or error)}'
        if pictures is not None:
            pictures[i] = found
        return None

    with ThreadPoolExecutor(threads) as pool:
        answers = pool.map(read, range(len(items)))
        bad = [a for a in progress(answers, total=len(items), desc='reading', unit='img') if a]
    if bad:
        raise UserError(
            listing(
                f'{len(bad)} of {len(items)} images cannot be read; replace or remove them', bad
            )
        )


def _read(item: Item, size: int, resample: Image.Resampling) -> np.ndarray:
    """One picture, or the mean of several, uint8 [3, S, S]."""
    several = [item] if isinstance(item, SourceImage) else item
    parts = [resize_pixels(one.load(OVERSAMPLING * size), size, resample) for one in several]
    if len(parts) == 1:
        return parts[0].transpose(2, 0, 1)
    total = np.sum(parts, 0, dtype=np.float64)
    return np.rint(total / len(parts)).astype(np.uint8).transpose(2, 0, 1)


def _digest_dicom(names: Sequence[str], folder: Path) -> str:
    return digest_files(names, find_dicom(folder))


def _digest_store(names: Sequence[str], path: Path) -> str:
    return FileStore(path).digest(names)


def _resolve(source: Source) -> tuple[list[str], Sequence[Item], Callable[[], str]]:
    """Names, pictures, and what computes their digest (can be pickled, for loading processes)."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.suffix.lower() == '.csv':
            return _resolve(read_table(path))
        items = list_source(path)
        names = [item.name for item in items]
        if any(item.dicom for item in items):
            return names, items, partial(_digest_dicom, names, path)
        return names, items, partial(_digest_store, names, path)
    if isinstance(source, Table):
        table = source
        return table.ids, list_table(table), partial(digest_files, table.ids, table.paths)
    lists = [[Path(p) for p in ([one] if isinstance(one, (str, Path)) else one)] for one in source]
    flat = [p for files in lists for p in files]
    pictures: list[Item] = [list_files(files) for files in lists]
    return (
        [files[0].stem for files in lists],
        pictures,
        partial(digest_files, [p.name for p in flat], flat),
    )
