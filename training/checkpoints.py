"""Numbered checkpoints of a run: whole or absent, verified when read, oldest pruned."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.io import load_weights, save_torch

log = logging.getLogger(__name__)


class Checkpoints:
    """The files `<prefix><number>.pt` of a folder.

    number: how progress is written in names; where it is always empty there is one file, which is
    replaced. keep: how many of the newest are kept (None: all).
    what, hint: the role of a file, and the remedy when none can be read, for messages.
    """

    def __init__(
        self,
        folder: str | Path,
        prefix: str = 'state_',
        *,
        number: Callable[[int], str] = str,
        keep: int | None = None,
        what: str = 'checkpoint',
        hint: str = 'Start a new run in another folder.',
    ) -> None:
        self.folder, self.prefix, self.number, self.keep = Path(folder), prefix, number, keep
        self.what, self.hint = what, hint

    def path(self, progress: int) -> Path:
        """The file of that progress, whether or not it is there."""
        return self.folder / f'{self.prefix}{self.number(progress)}.pt'

    def list(self) -> list[Path]:
        """The files that are there, oldest first."""
        pattern = re.compile(re.escape(self.prefix) + r'(\d*\.?\d*)\.pt')
        numbered = [
            (float(match[1] or 0), path)
            for path in self.folder.glob(f'{self.prefix}*.pt')
            if (match := pattern.fullmatch(path.name))
        ]
        return [path for _, path in sorted(numbered)]

    def save(self, progress: int, payload: dict) -> Path:
        """Writes `payload` as a whole, removes what is too old, and returns the path."""
        path = self.path(progress)
        save_torch(path, payload)
        if self.keep is not None:
            for old in self.list()[: -self.keep]:
                old.unlink()
        return path

    def latest(self) -> tuple[Any, Path] | None:
        """(payload, path) of the newest readable file, or None when there is none.

        Damaged files are passed over with a warning. UserError when every file is damaged.
        """
        found = self.list()
        for path in reversed(found):
            try:
                return load_weights(path, what=self.what), path
            except UserError as error:
                log.warning('%s; falling back to the one before it', error)
        if found:
            raise UserError(
                f'none of the {len(found)} files {self.prefix}*.pt in {self.folder} can be read. '
                f'{self.hint}'
            )
        return None
