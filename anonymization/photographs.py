"""The photographs of a run, read once: everything after works on private/photographs.npy.

photographs.npy: uint8 [n, 3, S, S], row i of the table, resized to the encoder's side S; left eyes
mirrored where the settings say so. photographs.csv: a `Record` for each, written last and sealed.
Blocks of rows are shared out among processes, and a run that was killed goes on with the next
block. n photographs.
"""

import json
import logging
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image

from datasets.digests import picture_digest
from datasets.fov import UnusableFrame, check_frame
from datasets.pictures import OVERSAMPLING, decoding_scales
from datasets.sides import find_disc
from datasets.table import Table
from utils import distributed
from utils.decoding import decode_rgb
from utils.errors import UserError, listing
from utils.images import decode_reason, resize_pixels
from utils.io import (
    atomic_path,
    check_intact,
    has_seal,
    is_intact,
    remove_sealed,
    sealing,
    sha256_bytes,
    sha256_file,
    write_csv,
    write_json,
)
from utils.logs import progress

log = logging.getLogger(__name__)

PIXELS, RECORDS = 'photographs.npy', 'photographs.csv'
SIDES = ('mirror', 'apart', 'mixed')
_BLOCK = 64  # photographs read before their records are written
_ANEW = 'remove it and its .sha256 and run the same command again: the photographs are read anew'
_SAMPLED, _FEWEST, _LEAST = 200, 30, 0.25  # of left eyes whose pictures are looked at


class Record(NamedTuple):
    """What is known of a photograph since it was read.

    file: SHA-256 of its bytes. content: of its decoded pixels, the same for one picture in two
    files. stored: of its row of photographs.npy. bytes, mtime: size and time of the file, by
    which an untouched one is recognised. eye: 'left', 'right', or '' where nobody asked: by the
    table, or by where the optic disc lies.
    """

    file: str
    content: str
    stored: str
    bytes: int
    mtime: int
    eye: str


class Photographs:
    """The photographs of a run as they were read: `photographs[i]` is uint8 [3, S, S].

    records: one for each. UserError for a row that is not what was read.
    """

    def __init__(self, private: Path, records: Sequence[Record]) -> None:
        self.path, self.records = private / PIXELS, records
        array = np.load(self.path, mmap_mode='r')
        self.size, self._offset = int(array.shape[-1]), int(array.offset)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> torch.Tensor:
        n = 3 * self.size**2
        with open(self.path, 'rb') as file:  # no mapping, whose pages would count as memory
            file.seek(self._offset + i * n)
            data = file.read(n)
        if sha256_bytes(data) != self.records[i].stored:
            raise UserError(
                f'{self.path} is damaged or was replaced; remove it and {RECORDS} beside it and '
                'run the same command again: the photographs are read anew'
            )
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(3, self.size, self.size)

    @property
    def contents(self) -> list[str]:
        """`Record.content` of each."""
        return [r.content for r in self.records]

    @property
    def eyes(self) -> list[str]:
        """`Record.eye` of each."""
        return [r.eye for r in self.records]


def read_photographs(
    private: Path, table: Table, *, size: int, sides: str, threads: int
) -> Photographs:
    """Reads and decodes every photograph that has not been read yet, once, into `private`.

    size: S. sides: 'mirror' (left eyes are mirrored), 'apart' (eyes are only told apart) or
    'mixed'. threads: photographs decoded at a time. UserError that lists all photographs that
    cannot be read or show nothing, all that changed since they were read, and for eyes of the
    table that contradict the pictures.
    """
    done = has_seal(private / RECORDS)
    distributed.barrier()  # before process 0 can have made it
    if not done:
        _read_blocks(private, table, size, sides, threads)
    if distributed.is_main():
        if not done:
            _collect(private, len(table))
        check_intact(private / RECORDS, remedy=_ANEW)
    distributed.barrier()
    photographs = open_photographs(private)
    if distributed.is_main():
        if done:
            check_unchanged(private, table)
        elif sides == 'mirror' and table.eyes is not None:
            _check_eyes(photographs, table.eyes)
    return photographs


def open_photographs(private: Path) -> Photographs:
    """What a run has read, without a look at the files it came from."""
    return Photographs(private, _records(private / RECORDS))


def check_unchanged(private: Path, table: Table) -> None:
    """UserError that names the photographs whose files are not those that were read.

    Files of the same size and time are taken for the same; others are hashed. Says nothing when
    the photographs have not been read yet.
    """
    if not has_seal(private / RECORDS):
        return
    check_intact(private / RECORDS, remedy=_ANEW)
    _refuse_changed(_changed(_records(private / RECORDS), table.paths))


def _refuse_changed(names: list[str]) -> None:
    if names:
        raise UserError(
            listing(
                f'{len(names)} photographs have changed since this run read them; put them back, '
                'or choose another `exp_dir`',
                names,
            )
        )


def _changed(records: Iterable[Record], paths: Sequence[Path]) -> list[str]:
    found = []
    for record, path in zip(records, paths):
        try:
            stat = path.stat()
            same = (stat.st_size, stat.st_mtime_ns) == (record.bytes, record.mtime)
            if not same and sha256_file(path) != record.file:
                found.append(str(path))
        except OSError as error:
            found.append(f'{path}: {error.strerror}')
    return found


def _block_file(private: Path, i: int) -> Path:
    return private / 'work' / f'photographs_{i:06d}.json'


def _blocks(n: int) -> list[range]:
    return [range(i, min(i + _BLOCK, n)) for i in range(0, n, _BLOCK)]


def _read_blocks(private: Path, table: Table, size: int, sides: str, threads: int) -> None:
    """Reads the blocks without a record, each whoever asks first; UserError on all bad ones."""
    n = len(table)
    scales = distributed.from_main(
        lambda: decoding_scales(table.paths, OVERSAMPLING * size, threads=threads)
    )
    if distributed.is_main():
        _create(private / PIXELS, (n, 3, size, size))
    distributed.barrier()
    offset = int(np.load(private / PIXELS, mmap_mode='r').offset)
    bad: list[str] = []
    changed: list[str] = []

    def one(i: int) -> tuple[bytes, Record] | str:
        eye = table.eyes[i] if table.eyes is not None else ''
        try:
            return _read(table.paths[i], size, scales[i], sides, eye)
        except (OSError, UserError) as error:
            reason = str(error) if isinstance(error, UnusableFrame) else ''
            return f'{table.paths[i]}: {reason or decode_reason(error.__cause__ or error)}'

    blocks = _blocks(n)
    bar = progress(total=n, desc='reading', unit='img')
    with ThreadPoolExecutor(threads) as pool, open(private / PIXELS, 'rb+') as file:
        for b in distributed.handed_out(range(len(blocks))):
            rows, path = blocks[b], _block_file(private, b)
            if is_intact(path):
                changed += _changed(_records(path), [table.paths[i] for i in rows])
                bar.update(len(rows))
                continue
            found = list(pool.map(one, rows))
            bar.update(len(rows))
            bad += [f for f in found if isinstance(f, str)]
            good = [f for f in found if not isinstance(f, str)]
            if len(good) < len(found):
                continue
            file.seek(offset + rows[0] * 3 * size**2)
            for data, _ in good:
                file.write(data)
            file.flush()
            with sealing(path):
                write_json(path, [list(record) for _, record in good])
    bar.close()
    bad, changed = (
        [x for part in distributed.all_gather_object(v) for x in part] for v in (bad, changed)
    )
    _refuse_changed(changed)
    if bad:
        raise UserError(
            listing(
                f'{len(bad)} of {n} images cannot be read or show no retina; replace them or '
                'remove their rows',
                bad,
            )
        )


def _read(
    path: Path, size: int, at_least: int | None, sides: str, eye: str
) -> tuple[bytes, Record]:
    """One photograph as bytes [3, S, S] with its record; UserError, UnusableFrame, OSError."""
    stat = path.stat()
    data = path.read_bytes()
    picture, whole = decode_rgb(lambda: data, str(path), at_least)
    if 2 * min(whole) < size:
        raise UnusableFrame(f'{whole[0]} x {whole[1]} px are too few for an encoder of {size} px')
    pixels = resize_pixels(picture, size)
    check_frame(pixels.max(2))
    if not eye and sides != 'mixed':
        eye = 'left' if find_disc(Image.fromarray(picture)).x < 0 else 'right'
    if sides == 'mirror' and eye == 'left':
        pixels = pixels[:, ::-1]
    stored = np.ascontiguousarray(pixels.transpose(2, 0, 1)).tobytes()
    return stored, Record(
        sha256_bytes(data),
        picture_digest(picture),
        sha256_bytes(stored),
        stat.st_size,
        stat.st_mtime_ns,
        eye,
    )


def _create(path: Path, shape: tuple[int, ...]) -> None:
    """An array of the shape on disk, unless one is there already."""
    if path.exists() and np.load(path, mmap_mode='r').shape == shape:
        return
    with atomic_path(path) as temp:
        np.lib.format.open_memmap(temp, mode='w+', dtype=np.uint8, shape=shape).flush()


def _records(path: Path) -> list[Record]:
    """Those of a block, or of all photographs."""
    if path.suffix == '.json':
        return [Record(*row) for row in json.loads(path.read_text(encoding='utf-8'))]
    text: dict[Hashable, type[str]] = dict.fromkeys(('file', 'content', 'stored', 'eye'), str)
    frame = pd.read_csv(path, dtype=text, keep_default_na=False)
    return [Record(*row) for row in frame[list(Record._fields)].itertuples(index=False)]


def _collect(private: Path, n: int) -> None:
    files = [_block_file(private, b) for b in range(len(_blocks(n)))]
    records = [record for file in files for record in _records(file)]
    with sealing(private / RECORDS):
        write_csv(private / RECORDS, pd.DataFrame(records, columns=list(Record._fields)))
    for file in files:
        remove_sealed(file)


def _check_eyes(photographs: Photographs, eyes: Sequence[str]) -> None:
    """UserError when most left eyes do not look like left eyes: they may be mirrored already."""
    rows = [i for i, eye in enumerate(eyes) if eye == 'left']
    rows = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLED))]
    if len(rows) < _FEWEST:
        return
    pictures = (Image.fromarray(photographs[i].permute(1, 2, 0).numpy()) for i in rows)
    right = sum(find_disc(picture).x > 0 for picture in pictures)
    if right < _LEAST * len(rows):
        raise UserError(
            f'of {len(rows)} left eyes of the table, {len(rows) - right} show their optic disc on '
            'the right: were they mirrored before? `sides`=mixed takes them as they are'
        )


def copies(contents: Sequence[str], ids: Sequence[str]) -> np.ndarray:
    """bool [n]: photographs with the content of another one whose id comes first by alphabet."""
    kept: dict[str, str] = {}
    for content, name in zip(contents, ids):
        kept[content] = min(name, kept.get(content, name))
    return np.array([kept[content] != name for content, name in zip(contents, ids)])
