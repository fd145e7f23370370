"""Numbered checkpoints of a run: whole or absent, verified when read, oldest pruned."""

import logging
import re
from pathlib import Path

from utils.errors import UserError
from utils.io import load_weights, save_torch

log = logging.getLogger(__name__)


def list_checkpoints(directory, prefix='iteration'):
    """The files `<prefix>_<step>.pt` of a folder as [(step, path), ...], oldest first."""
    pattern = re.compile(re.escape(prefix) + r'_(\d+)\.pt')
    found = [
        (int(match[1]), path)
        for path in Path(directory).glob(f'{prefix}_*.pt')
        if (match := pattern.fullmatch(path.name))
    ]
    return sorted(found)


def save_checkpoint(directory, step, payload, *, prefix='iteration', keep=None):
    """Writes `payload` atomically as `<prefix>_<step>.pt` and returns the path.

    keep: delete all but the newest `keep` checkpoints of this prefix; None keeps all.
    """
    path = Path(directory) / f'{prefix}_{step}.pt'
    save_torch(path, payload)
    if keep is not None:
        for _, old in list_checkpoints(directory, prefix)[:-keep]:
            old.unlink()
    return path


def latest_checkpoint(directory, prefix='iteration'):
    """(payload, path) of the newest readable checkpoint, or None when there is none.

    Damaged files are passed over with a warning. UserError when every file is damaged.
    """
    found = list_checkpoints(directory, prefix)
    for _, path in reversed(found):
        try:
            return load_weights(path), path
        except UserError as error:
            log.warning('%s; falling back to the checkpoint before it', error)
    if found:
        raise UserError(
            f'none of the {len(found)} checkpoints in {directory} can be read; '
            'start a new run in another folder'
        )
    return None
