"""Temporary files and folders: marked while their maker lives, removed once it was killed.

The mark is a lock of the operating system, which frees it however a process ends. Where a file
system knows no locks, nothing is ever removed.
"""

import contextlib
import logging
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

SUFFIX = '.tmp'
_NAME = r'\.[a-z0-9_]{8}\.tmp'  # what tempfile puts between prefix and suffix


@contextlib.contextmanager
def claimed(make: Callable[[], str]) -> Iterator[Path]:
    """Yields the new file or folder of `make()`; until the block ends `remove_leftovers` spares it.

    Whatever ends the block by an error removes it.

    make: names it as `.<what it becomes>.<8 random characters>.tmp` (tempfile with SUFFIX).
    """
    path, handle = None, None
    try:
        with _undisturbed():
            while True:
                path = Path(make())
                handle = _lock(path, wait=True)
                # It may have been removed as a leftover before the lock was there.
                if handle is None or path.exists():
                    break
                os.close(handle)
        yield path
    except BaseException:
        if path is not None:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise
    finally:
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Holds back SIGINT and SIGTERM, so that nothing is made that nobody knows of."""
    if not hasattr(signal, 'pthread_sigmask'):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_leftover(name: str, stem: str | None = None) -> bool:
    """Whether a file name is one of a temporary file (of what `stem` begins, if given)."""
    begin = r'\..+' if stem is None else rf'\.{re.escape(stem)}(\..+)?'
    return re.fullmatch(begin + _NAME, name) is not None


def remove_leftovers(folder: Path, stem: str | None = None) -> None:
    """Removes the temporary files and folders that killed processes left in `folder`.

    stem: only those of what is called so, in the folder itself; None: all, in folders below too.
    """
    for parent, folders, files in os.walk(folder):
        for name in [n for n in [*folders, *files] if is_leftover(n, stem)]:
            _remove(Path(parent, name))
        folders[:] = [] if stem is not None else [n for n in folders if not is_leftover(n)]


def _remove(path: Path) -> None:
    handle = None if path.is_symlink() else _lock(path, wait=False)
    if handle is None:
        return
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        log.warning('removed %s, left behind by a process that was killed', path)
    except OSError as error:
        log.warning(
            '%s was left behind by a process that was killed, and cannot be removed: %s',
            path,
            error,
        )
    finally:
        os.close(handle)


def _lock(path: Path, *, wait: bool) -> int | None:
    """An open, locked handle of a file or folder; None where there are no locks, or it is held."""
    if fcntl is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle
