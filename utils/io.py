"""Files that are either whole or absent: atomic writes, safe weight loading, hashes."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from utils.errors import UserError
from utils.leftovers import SUFFIX, claimed
from utils.torch_files import BrokenFile, read_torch_bytes

_MAX_WEIGHTS = 2**34
# Files of torchvision and pytorch-fid carry the first digits of their SHA-256.
_PUBLISHED_HASH = re.compile(
    r'(?:vgg\d+|alexnet-owt|resnet\d+|(?:pt_|weights-)inception-2015-12-05)-([0-9a-f]{8})\.pth'
)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed into place.

    On any error the temporary file is removed and an existing `path` stays as it was; what a
    killed process leaves is found by `utils.leftovers`. Nobody may read or write the file who may
    not do so with its folder: below a folder of mode 0700 files are 0600.
    """
    path = Path(path)
    _make_folder(path.parent)

    def make() -> str:
        # As open as umask and folder are; tempfile would make it 0600, whatever the umask is.
        mode = 0o666 & path.parent.stat().st_mode
        while True:
            name = path.parent / f'.{path.stem}.{secrets.token_hex(4)}{SUFFIX}'
            with contextlib.suppress(FileExistsError):
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
                return str(name)

    with claimed(make) as temp:
        try:
            yield temp
            with open(temp, 'rb+') as file:
                os.fsync(file.fileno())
            os.replace(temp, path)
        except OSError as error:
            if error.filename is None:
                error.filename = str(path)  # a full disk does not say which file was written
            raise


def _make_folder(folder: Path) -> None:
    """Makes a folder and those above it, none more open than the one it lies in."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(mode=0o777 & folder.parent.stat().st_mode, exist_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as temp:
        temp.write_text(text, encoding='utf-8', newline='\n')


def write_json(path: str | Path, obj: object) -> None:
    """Writes indented JSON with a trailing newline, atomically."""
    write_text(path, json.dumps(obj, indent=2) + '\n')


def write_csv(path: str | Path, frame: pd.DataFrame) -> None:
    """Writes a pandas DataFrame without its index, `\\n` line ends, atomically."""
    write_text(path, frame.to_csv(index=False, lineterminator='\n'))


def save_torch(path: str | Path, obj: object) -> None:
    """torch.save, atomically. Save plain containers of tensors, numbers and strings only."""
    # In memory first: torch's writer turns a full disk or a signal amid its calls into errors of
    # its own, and it would store the temporary file's name.
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    with atomic_path(path) as temp:
        temp.write_bytes(buffer.getbuffer())


def save_npy(path: str | Path, array: np.ndarray) -> None:
    """np.save, atomically (the name is kept as given)."""
    with atomic_path(path) as temp, open(temp, 'wb') as file:
        np.save(file, array)


@contextlib.contextmanager
def append_npy(path: str | Path, n: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Writes a .npy file of `n` rows part by part, atomically; yields what takes the next rows.

    The first part says type and shape. ValueError when there are more or fewer rows in the end.
    """
    count = 0
    with atomic_path(path) as temp, open(temp, 'wb') as file:

        def add(rows: np.ndarray) -> None:
            nonlocal count
            if not count:
                header = np.lib.format.header_data_from_array_1_0(rows)
                header |= {'shape': (n, *rows.shape[1:]), 'fortran_order': False}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(rows).data)
            count += len(rows)

        yield add
        if count != n:
            raise ValueError(f'{count} rows for an array of {n}')


def load_weights(path: str | Path, *, what: str = 'checkpoint', hint: str = '') -> Any:
    """Loads a torch file of tensors and plain containers on the CPU; never executes a pickle.

    `what` names the file's role and `hint` the remedy in the UserError that is raised when the
    file is missing, is not a torch file, is damaged (its checksums are verified), or holds
    anything but plain data. Published files whose name ends in their hash must have it.
    """
    path = Path(path)
    advice = f' {hint}' if hint else ''
    if path.is_dir():
        raise UserError(f'{path} is a folder, not a {what}.{advice}')
    if not path.is_file():
        raise UserError(f'{what} not found: {path}.{advice}')
    try:
        if path.stat().st_size > _MAX_WEIGHTS:
            raise UserError(f'{path} is larger than any {what} ({_MAX_WEIGHTS >> 30} GiB).{advice}')
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f'{what} {path} cannot be read: {error}.{advice}') from error
    published = _PUBLISHED_HASH.fullmatch(path.name)
    if published and not sha256_bytes(data).startswith(published[1]):
        raise UserError(
            f'{path} is not the published file of that name: its SHA-256 does not '
            f'begin with {published[1]}. Copy or download it again.'
        )
    try:
        return read_torch_bytes(data)
    except pickle.UnpicklingError as error:
        reason, cause = 'damaged, or holds objects other than tensors and plain data', error
    except Exception as error:  # random bytes make the reader fail in any way
        detail = f' ({error})' if isinstance(error, BrokenFile) else ''
        reason, cause = f'damaged, cut short or none at all{detail}', error
    raise UserError(
        f'{path} is not a {what} this tool will load: it is {reason}.{advice}'
    ) from cause


def _seal_path(path: Path) -> Path:
    return path.with_name(f'{path.name}.sha256')


def _seal_text(path: Path, context: str) -> str:
    return f'{sha256_file(path)}  {path.name}\n' + (f'# made from {context}\n' if context else '')


@contextlib.contextmanager
def sealing(path: str | Path, context: str = '') -> Iterator[None]:
    """Seals `path` when the block that writes it ends well: `<name>.sha256` beside it.

    The seal holds the file's SHA-256, its name and `context`, which names what the file was
    computed from. A kill in between leaves a file without a seal, which counts as not written.
    """
    path = Path(path)
    _seal_path(path).unlink(missing_ok=True)
    yield
    write_text(_seal_path(path), _seal_text(path, context))


def has_seal(path: str | Path) -> bool:
    """Whether `path` was once written to its end; says nothing of its bytes of today."""
    return _seal_path(Path(path)).is_file()


def is_intact(path: str | Path, context: str = '') -> bool:
    """Whether `path` holds the bytes that were sealed, under that name and that context."""
    path = Path(path)
    try:
        return _seal_path(path).read_bytes() == _seal_text(path, context).encode()
    except OSError:
        return False


def check_intact(path: str | Path, *, remedy: str) -> None:
    """UserError with the remedy when `path` is not the file that was sealed."""
    if not is_intact(path):
        what = 'is damaged or was replaced' if Path(path).exists() else 'is missing'
        raise UserError(
            f'{path} {what} (its SHA-256 is not that of {_seal_path(Path(path)).name}); {remedy}'
        )


def load_intact(path: str | Path, *, what: str, context: str = '') -> Any:
    """`load_weights` of a file that was sealed; UserError when it is not as it was."""
    if not is_intact(path, context):
        raise UserError(f'{path} is damaged; run the same command again: it is computed anew')
    return load_weights(path, what=what)


def remove_sealed(path: str | Path) -> None:
    """Removes a file and its seal, the seal first."""
    for part in (_seal_path(Path(path)), Path(path)):
        part.unlink(missing_ok=True)


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def digest_files(names: Sequence[str], paths: Sequence[Path]) -> str:
    """16 hex digits that change with the names given to files, their order and their contents."""
    with ThreadPoolExecutor(4) as pool:
        hashes = pool.map(sha256_file, paths)
        rows = [f'{name} {content}' for name, content in zip(names, hashes)]
    return sha256_bytes('\n'.join(rows).encode())[:16]


def sha256_bytes(data: bytes | memoryview) -> str:
    """Hex SHA-256 of a bytes object."""
    return hashlib.sha256(data).hexdigest()
