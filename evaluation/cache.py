"""Results on disk, each beside what it depends on, so that a stale one is never shown."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from utils.io import write_json

RESULT = 'result.json'


def digest(*parts: Any) -> str:
    """Hex SHA-256 over arrays (shape, type and bytes) and JSON-able values."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            total.update(f'{part.shape} {part.dtype}'.encode())
            total.update(np.ascontiguousarray(part).data)
        else:
            total.update(json.dumps(part, sort_keys=True).encode())
    return total.hexdigest()


def folder_of(parent: Path, name: str, depends: dict[str, Any]) -> Path:
    """The folder of a result: its name holds the digest of all that it depends on."""
    return parent / f'{name}-{digest(depends)[:12]}'


def cached(path: Path, depends: dict[str, Any], compute: Callable[[], dict]) -> dict:
    """The result in the file `path`, or a new one, which is written there beside `depends`."""
    if path.exists():
        found = json.loads(path.read_text(encoding='utf-8'))
        if found['depends'] == json.loads(json.dumps(depends)):
            return found['result']
    result = compute()
    write_json(path, {'depends': depends, 'result': result})
    return json.loads(json.dumps(result))
