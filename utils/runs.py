"""The record a run leaves beside its outputs, and the guard against mixing two runs."""

import json
import logging
import platform
import subprocess
from collections.abc import Container, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import torch

from utils.errors import UserError
from utils.io import sha256_file, write_json
from utils.leftovers import is_leftover, remove_leftovers

log = logging.getLogger(__name__)

PROJECT_ROOT = Path(__file__).resolve().parents[1]
RECORD_NAME = 'options.json'
_LOCK_NAME = '.lock'
_held: dict[Path, filelock.BaseFileLock] = {}  # the locks of this process, by path


def versions() -> dict[str, str | None]:
    """Versions of what shapes the numbers, and the commit of the code when it is a checkout."""
    found: dict[str, str | None] = {'python': platform.python_version()}
    for name in ('torch', 'torchvision', 'numpy', 'pillow', 'k-salsa'):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found['cuda'] = torch.version.cuda if torch.cuda.is_available() else None
    found['commit'] = _commit()
    return found


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ['git', '-C', str(PROJECT_ROOT), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        if Path(git('rev-parse', '--show-toplevel')).resolve() != PROJECT_ROOT:
            return None
        dirty = git('status', '--porcelain', '--untracked-files=no')
        return git('rev-parse', 'HEAD') + ('-dirty' if dirty else '')
    except (OSError, subprocess.SubprocessError):
        return None


def run_record(
    options: Mapping[str, Any],
    *,
    inputs: Mapping[str, str | Path | None] | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """A JSON-able record: options, seed, versions, and name -> SHA-256 of each input file."""
    hashes = {name: sha256_file(path) for name, path in (inputs or {}).items() if path is not None}
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    return {'options': plain, 'seed': seed, 'inputs': hashes, 'versions': versions()}


def start_run(
    run_dir: str | Path,
    record: dict[str, Any],
    *,
    resume: bool = False,
    free_options: Container[str] = (),
    resume_flag: str | None = None,
) -> bool:
    """Creates `run_dir` with the record, or checks that a resumed run means the same thing.

    A folder that already holds a record is only entered with `resume=True`, and only when
    options (but for `free_options`, such as the number of workers), seed and input hashes
    agree; otherwise UserError names the differences, or `resume_flag`, the script's own. Other
    processes are kept out from here on (`hold_run`). Returns True when resuming.
    """
    run_dir = Path(run_dir)
    path = run_dir / RECORD_NAME
    if path.exists():
        if not resume:
            raise UserError(
                f'{run_dir} already holds a run; '
                + (f'{resume_flag} goes on in it, or ' if resume_flag else '')
                + 'choose another folder'
            )
        hold_run(run_dir)
        old = read_record(run_dir)
        changes = _differences(old, record, free_options)
        if changes:
            raise UserError(
                f'{run_dir} holds a run with other settings, so it cannot be resumed '
                f'({"; ".join(changes)}); choose another folder or the same settings'
            )
        return True
    if run_dir.exists() and any(
        p.name not in ('log.txt', _LOCK_NAME) and not is_leftover(p.name) for p in run_dir.iterdir()
    ):
        raise UserError(
            f'{run_dir} is not empty and holds no run of this tool; choose a new '
            f'folder, or put its {RECORD_NAME} back'
        )
    hold_run(run_dir)
    write_json(path, record)
    return False


def hold_run(run_dir: str | Path) -> None:
    """Keeps other processes out of `run_dir` until this one ends; UserError if one is in it.

    The system frees the lock of a process that dies, however it dies. Temporary files that killed
    processes left in the folder are removed.
    """
    path = (Path(run_dir) / _LOCK_NAME).resolve()
    if path in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(
            f'another process is working in {run_dir}; wait for its end, or stop it'
        ) from None
    except NotImplementedError:
        log.warning(
            'the file system of %s knows no locks: do not start a second process in it', run_dir
        )
    _held[path] = lock
    remove_leftovers(Path(run_dir))


def add_continuation(
    run_dir: str | Path, flags: Mapping[str, Any] | Sequence[str], **details: Any
) -> None:
    """Adds flags, details and versions of a resumed run to the record in `run_dir`."""
    path = Path(run_dir) / RECORD_NAME
    record = read_record(run_dir)
    record.setdefault('continued', []).append({'flags': flags, **details, 'versions': versions()})
    write_json(path, record)


def read_record(run_dir: str | Path) -> dict:
    """The record of a run folder; UserError when it is damaged, or none."""
    path = Path(run_dir) / RECORD_NAME
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f'{path} is not a readable run record ({error}); choose another folder, '
            'or put the file back'
        ) from error
    if not isinstance(record, dict) or not all(
        isinstance(record.get(part), dict) for part in ('options', 'inputs')
    ):
        raise UserError(
            f'{path} is not the record of a run; choose another folder, or put the file back'
        )
    return record


def _differences(
    old: dict[str, Any], new: dict[str, Any], free_options: Container[str]
) -> list[str]:
    found = []
    for part in ('options', 'inputs'):
        before, after = old.get(part) or {}, json.loads(json.dumps(new.get(part) or {}))
        for name in sorted(before.keys() | after.keys()):
            if name not in free_options and before.get(name) != after.get(name):
                found.append(f'{name}: was {before.get(name)}, now {after.get(name)}')
    if old.get('seed') != new.get('seed'):
        found.append(f'seed: was {old.get("seed")}, now {new.get("seed")}')
    return found
