"""Inversions that several runs share: of the same photographs, by the same networks.

Under a folder that is as private as private/, the first run leaves what it found in a folder named
by the digest of all that enters an inversion; `inversions.json`, written last, says what that is
and holds the SHA-256 of every file. A run that would find the same takes the files from there.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anonymization.context import Context
from utils.errors import UserError
from utils.images import png_names
from utils.io import atomic_path, sha256_bytes, sha256_file, write_json

log = logging.getLogger(__name__)

RECORD, RECONSTRUCTIONS = 'inversions.json', 'reconstructions'


def take(run: Context, arrays: Sequence[str]) -> bool:
    """Copies what another run found into private/; False where none has found anything.

    arrays: names of files in private/. UserError, and nothing is taken, when what is there is not
    what was left, or was found from anything else.
    """
    if run.inversions is None:
        return False
    depends = _depends(run)
    folder = _folder(run.inversions, depends)
    record = folder / RECORD
    if not record.exists():
        return False
    names = _names(run, arrays)
    if not _is_whole(folder, depends, names):
        raise UserError(
            f'{folder} does not hold the inversions that were left there; remove the folder and '
            'run the same command again: they are computed anew'
        )
    for name in names:
        _copy(folder / name, run.private / name)
    log.info('inversions of %d photographs: taken from %s', len(run.table), folder)
    return True


def give(run: Context, arrays: Sequence[str]) -> None:
    """Leaves what this run found to others, where its Context names a place for that."""
    if run.inversions is None:
        return
    depends, names = _depends(run), _names(run, arrays)
    folder = _folder(run.inversions, depends)
    if (folder / RECORD).exists():
        return
    run.inversions.mkdir(mode=0o700, parents=True, exist_ok=True)
    run.inversions.chmod(0o700)
    for name in names:
        _copy(run.private / name, folder / name)
    files = {name: sha256_file(folder / name) for name in names}
    write_json(folder / RECORD, {'depends': depends, 'files': files})


def _depends(run: Context) -> dict[str, Any]:
    """All that enters the bytes of an inversion, JSON-able."""
    settings, stored = run.settings, [r.stored for r in run.photographs.records]
    on_gpu = run.device.type == 'cuda'
    return {
        'photographs': sha256_bytes(json.dumps([run.table.ids, stored]).encode()),
        'size': run.photographs.size,
        'networks': {n: run.facts['networks'][n] for n in ('generator and encoder', 'content')},
        'n_iters': settings.n_iters,
        'precision': settings.precision,
        'device': torch.cuda.get_device_name(run.device)
        if on_gpu
        else f'{run.device.type} {torch.backends.cpu.get_cpu_capability()}',
        'deterministic': settings.deterministic,
        'together': 1 if run.alone else settings.batch_size,
        RECONSTRUCTIONS: settings.save_reconstructions,
        'versions': run.facts['versions'],
    }


def _folder(shared: Path, depends: dict[str, Any]) -> Path:
    return shared / sha256_bytes(json.dumps(depends, sort_keys=True).encode())[:16]


def _names(run: Context, arrays: Sequence[str]) -> list[str]:
    pictures = png_names(run.table.ids) if run.settings.save_reconstructions else []
    return [*arrays, *(f'{RECONSTRUCTIONS}/{name}' for name in pictures)]


def _is_whole(folder: Path, depends: dict[str, Any], names: Sequence[str]) -> bool:
    try:
        record = json.loads((folder / RECORD).read_text(encoding='utf-8'))
        hashes = record['files'] if record['depends'] == depends else {}
        return all(sha256_file(folder / name) == hashes.get(name) for name in names)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temp:
        shutil.copyfile(source, temp)
