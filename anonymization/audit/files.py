"""Files of a release folder, read without trusting any of them.

Only regular files are opened: a symbolic link, a pipe or a device is reported, never followed.
"""

import dataclasses
import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_PAGE = 64 << 20  # bytes of a manifest, table or page; the largest is 10 MB for 88,000
MAX_PICTURE = 256 << 20  # bytes of a picture
# Set by the system, not by whoever fills the folder.
_SYSTEM_ATTRIBUTES = ('security.', 'system.', 'trusted.')
_KINDS = (
    (stat.S_ISLNK, 'a symbolic link'),
    (stat.S_ISFIFO, 'a pipe'),
    (stat.S_ISSOCK, 'a socket'),
    (stat.S_ISCHR, 'a device'),
    (stat.S_ISBLK, 'a device'),
)


class Fault(ValueError):
    """A file is not what it should be: the reason, without any name from outside."""


@dataclasses.dataclass(frozen=True)
class Tree:
    """Everything below a folder. Names are POSIX paths relative to it.

    odd: name -> what it is, for all that is neither a regular file nor a folder. attributes:
    names (the folder itself is '.') that carry extended attributes.
    """

    files: frozenset[str]
    folders: frozenset[str]
    odd: dict[str, str]
    attributes: frozenset[str]


def scan(folder: Path) -> Tree:
    """Lists what is below `folder` without following links. OSError when it cannot be listed."""
    files, folders, odd, attributes = set(), set(), {}, set()
    waiting = [(folder, '')]
    if _has_attributes(folder):
        attributes.add('.')
    while waiting:
        place, prefix = waiting.pop()
        with os.scandir(place) as entries:
            for entry in entries:
                name = prefix + entry.name
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    folders.add(name)
                    waiting.append((Path(entry.path), f'{name}/'))
                elif stat.S_ISREG(mode):
                    files.add(name)
                else:
                    odd[name] = next(
                        (text for is_kind, text in _KINDS if is_kind(mode)), 'a special file'
                    )
                if _has_attributes(entry.path):
                    attributes.add(name)
    return Tree(frozenset(files), frozenset(folders), odd, frozenset(attributes))


def _has_attributes(path: str | Path) -> bool:
    if not hasattr(os, 'listxattr'):  # only Linux lists them
        return False
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError:  # the file system knows none
        return False
    return any(not n.startswith(_SYSTEM_ATTRIBUTES) for n in names)


def read_regular(path: Path, limit: int = MAX_PAGE) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; Fault for anything else."""
    flags = os.O_RDONLY | getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_NONBLOCK', 0)
    try:
        handle = os.open(path, flags)
    except OSError as error:
        reason = 'is missing' if isinstance(error, FileNotFoundError) else 'cannot be read'
        raise Fault(reason) from error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise Fault('is not a regular file')
    with os.fdopen(handle, 'rb') as file:
        if found.st_size > limit:
            raise Fault(f'is larger than {limit >> 20} MB')
        return file.read(limit)


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object in exactly the form that this tool writes; Fault for anything else.

    That leaves no room for doubled keys, other spacing, escapes or numbers written otherwise.
    """
    try:
        text = data.decode('utf-8')
        value = json.loads(text, parse_constant=_refuse)
        again = json.dumps(value, indent=2) + '\n'
    except (ValueError, RecursionError) as error:  # decoding errors are ValueErrors
        raise Fault('is not JSON that can be read') from error
    if not isinstance(value, dict):
        raise Fault('holds no JSON object')
    if again != text:
        raise Fault('is not in the form that this tool writes')
    return value


def _refuse(name: str) -> None:
    raise ValueError(f'{name} is not JSON')
