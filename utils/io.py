"""Files that are either whole or absent: atomic writes, safe weight loading, hashes."""
import contextlib
import hashlib
import json
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError


@contextlib.contextmanager
def atomic_path(path):
    """Yields a temporary path beside `path`; on success it is synced and renamed into place.

    On any error the temporary file is removed and an existing `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.stem}.', suffix='.tmp')
    os.close(handle)
    temp = Path(name)
    try:
        yield temp
        with open(temp, 'rb+') as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temp.chmod(0o666 & ~umask)    # mkstemp made it 0600; the final file follows the umask
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise


def write_text(path, text):
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as temp:
        temp.write_text(text, encoding='utf-8', newline='\n')


def write_json(path, obj):
    """Writes indented JSON with a trailing newline, atomically."""
    write_text(path, json.dumps(obj, indent=2) + '\n')


def write_csv(path, frame):
    """Writes a pandas DataFrame without its index, `\\n` line ends, atomically."""
    write_text(path, frame.to_csv(index=False, lineterminator='\n'))


def save_torch(path, obj):
    """torch.save, atomically. Save plain containers of tensors, numbers and strings only."""
    # Through a handle: torch.save stores the name it is given, and the temporary one varies.
    with atomic_path(path) as temp, open(temp, 'wb') as file:
        torch.save(obj, file)


def save_npy(path, array):
    """np.save, atomically (the name is kept as given)."""
    with atomic_path(path) as temp, open(temp, 'wb') as file:
        np.save(file, array)


def load_weights(path, *, what='checkpoint', hint=''):
    """Loads a torch file of tensors and plain containers on the CPU; never executes a pickle.

    `what` names the file's role and `hint` the remedy in the UserError that is raised when the
    file is missing, is not a torch file, or holds anything but plain data.
    """
    path = Path(path)
    advice = f' {hint}' if hint else ''
    if path.is_dir():
        raise UserError(f'{path} is a folder, not a {what}.{advice}')
    if not path.is_file():
        raise UserError(f'{what} not found: {path}.{advice}')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f'{path} is not a {what} this tool will load: it is damaged, or holds '
                        f'objects other than tensors and plain data.{advice}') from error
    except OSError as error:
        raise UserError(f'{what} {path} cannot be read: {error}.{advice}') from error
    except Exception as error:    # random bytes make the reader fail in any way
        raise UserError(f'{path} does not hold a {what}, or is damaged or cut short.{advice}'
                        ) from error


def sha256_file(path):
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def sha256_bytes(data):
    """Hex SHA-256 of a bytes object."""
    return hashlib.sha256(data).hexdigest()
