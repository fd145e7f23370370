"""Logging set-up, progress bars that stay silent in log files, and scalar records."""

import json
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.io import write_text


def setup_logging(log_file: str | Path | None = None, level: int = logging.INFO) -> None:
    """Sends log records to stderr and, when given, appends them to `log_file`."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log_file is not None:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, encoding='utf-8'))
    logging.basicConfig(
        level=level,
        format='%(asctime)s %(message)s',
        datefmt='%H:%M:%S',
        handlers=handlers,
        force=True,
    )


def progress(
    iterable: Iterable | None = None, *, total: int | None = None, desc: str = '', unit: str = 'it'
) -> tqdm:
    """A tqdm bar on stderr, shown only when stderr is a terminal."""
    return tqdm(
        iterable,
        total=total,
        desc=desc,
        unit=unit,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
        leave=False,
    )


class ScalarLog:
    """Appends one JSON line per call to `<run_dir>/stats.jsonl`, and mirrors it to TensorBoard.

    `resume_step`: records of later steps are dropped first, so that a resumed run leaves the
    same file as an uninterrupted one.
    """

    def __init__(
        self, run_dir: str | Path, *, resume_step: int | None = None, tensorboard: bool = True
    ) -> None:
        self.path = Path(run_dir) / 'stats.jsonl'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None and self.path.exists():
            kept = [r for r in read_jsonl(self.path) if r.get('step', 0) <= resume_step]
            write_text(self.path, ''.join(json.dumps(r) + '\n' for r in kept))
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if resume_step is None else resume_step + 1
            self._board = SummaryWriter(str(Path(run_dir) / 'logs'), purge_step=purge)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Records a dict of numbers (or JSON-able values) at integer `step`."""
        with open(self.path, 'a', encoding='utf-8') as file:
            file.write(json.dumps({'step': step, **values}) + '\n')
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All complete records of a JSON-lines file; a torn last line (a killed run) is ignored."""
    records = []
    for line in Path(path).read_text(encoding='utf-8').splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
