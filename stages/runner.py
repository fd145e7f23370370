"""Runs stages one after the other, each once for the same inputs and settings.

The folder of a stage carries a digest of its settings and of everything before it, so a stage
whose inputs and settings have not changed is found done, and one that has changed begins in a
folder of its own, as do all after it. Nothing is overwritten. `stage.json` in the folder says that
a stage is done, what was found, and the SHA-256 of what later stages read.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.cache import digest
from utils.errors import PrivacyError, UserError
from utils.io import sha256_file, write_json
from utils.runs import versions

log = logging.getLogger(__name__)

RECORD = 'stage.json'


class Stopped(Exception):
    """A command stopped in good order when it was asked to; code: its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f'stopped with code {code}')
        self.code = code


class Finding(NamedTuple):
    """A number behind a stage, and the line it has to keep.

    at_least: whether the line is the least value, or else the most. sentence: what it is, in plain
    words. remedy: what to do beyond the line. final: --force does not pass it. binding: the run
    stops beyond the line; else it only says so.
    """

    name: str
    value: float
    line: float
    at_least: bool
    sentence: str
    remedy: str
    final: bool = False
    binding: bool = True

    @property
    def passed(self) -> bool:
        """Whether the number keeps its line; one that is no number does not."""
        return self.value >= self.line if self.at_least else self.value <= self.line

    def text(self) -> str:
        """One line for logs and errors."""
        side = 'at least' if self.at_least else 'at most'
        return f'{self.name}: {self.value:.3g} (line: {side} {self.line:g}). {self.sentence}'


class Outcome(NamedTuple):
    """What a stage leaves. pictures: caption -> PNG file; outputs: files that later stages read.

    Files count from the stage's folder.
    """

    findings: list[Finding]
    pictures: dict[str, str]
    outputs: list[str]

    @property
    def failed(self) -> list[Finding]:
        """The findings beyond their lines at which the run stops."""
        return [f for f in self.findings if f.binding and not f.passed]


# The folders of the earlier stages, by name.
Places = Mapping[str, Path]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the way. settings: what its result depends on, beside the stages before it.

    hours: estimate. work: called with the stage's folder and those before it; goes on with what
    an earlier call left there, and gives the same outcome.
    """

    name: str
    title: str
    settings: Mapping[str, Any]
    hours: float
    work: Callable[[Path, Places], Outcome]


class Done(NamedTuple):
    """A stage that has run: its folder, seconds of its last run, and its outcome."""

    stage: Stage
    folder: Path
    seconds: float
    outcome: Outcome


class Job:
    """The stages of one output folder, in their order."""

    def __init__(self, out_dir: Path, stages: Sequence[Stage]) -> None:
        self.out_dir, self.stages = out_dir, list(stages)
        self.folders: dict[str, Path] = {}
        key = ''
        for number, stage in enumerate(self.stages, 1):
            key = digest(stage.name, dict(stage.settings), key)
            self.folders[stage.name] = out_dir / 'stages' / f'{number}-{stage.name}-{key[:12]}'

    def find(self, stage: Stage) -> Done | None:
        """The stage as it was done, or None: not yet, or what it left has changed since."""
        folder = self.folders[stage.name]
        if not (folder / RECORD).exists():
            return None
        record = json.loads((folder / RECORD).read_text(encoding='utf-8'))
        for name, known in record['outputs'].items():
            if not (folder / name).is_file() or sha256_file(folder / name) != known:
                log.warning('%s: %s is not as the stage left it', folder, name)
                return None
        if record['commit'] != versions()['commit']:
            log.warning(
                '%s was made by the code of commit %s; remove the folder to make it anew',
                folder,
                record['commit'],
            )
        findings = [Finding(**finding) for finding in record['findings']]
        outcome = Outcome(findings, record['pictures'], list(record['outputs']))
        return Done(stage, folder, record['seconds'], outcome)

    def run(
        self,
        *,
        first: str | None = None,
        last: str | None = None,
        force: bool = False,
        after: Callable[[list[Done]], object] = lambda done: None,
    ) -> list[Done]:
        """Runs what is not done. first: the stages before it must be done. last: ends behind it.

        force: goes on below a line, final ones excepted. after: called with all that is done
        behind every stage. Raises UserError where a finding does not keep its line, PrivacyError
        where it is final.
        """
        names = [stage.name for stage in self.stages]
        begin = names.index(first) if first else 0
        end = names.index(last) + 1 if last else len(names)
        done: list[Done] = []
        for number, stage in enumerate(self.stages[:end]):
            found = self.find(stage)
            if found is None and number < begin:
                raise UserError(
                    f'`from` {first}: the stage {stage.name} before it is not done with these '
                    'photographs and settings; leave the flag out'
                )
            if found is None:
                found = self._work(stage)
            else:
                log.info('%s: done before', stage.title)
            done.append(found)
            after(done)
            check(found, force)
        return done

    def _work(self, stage: Stage) -> Done:
        folder, started = self.folders[stage.name], time.monotonic()
        log.info('%s, about %.1f hours', stage.title, stage.hours)
        folder.mkdir(parents=True, exist_ok=True)
        outcome = stage.work(folder, self.folders)
        seconds = time.monotonic() - started
        record = {
            'settings': stage.settings,
            'commit': versions()['commit'],
            'seconds': seconds,
            'findings': [finding._asdict() for finding in outcome.findings],
            'pictures': outcome.pictures,
            'outputs': {name: sha256_file(folder / name) for name in outcome.outputs},
        }
        write_json(folder / RECORD, record)
        return Done(stage, folder, seconds, outcome)

    def plan(self, last: str | None = None) -> list[tuple[str, str, float]]:
        """(stage, 'done', 'beyond a line' or 'to do', estimated hours to come), up to `last`."""
        lines = []
        for stage in self.stages:
            done = self.find(stage)
            state = 'to do'
            if done is not None:
                state = 'beyond a line' if done.outcome.failed else 'done'
            lines.append((stage.name, state, stage.hours if done is None else 0.0))
            if stage.name == last:
                break
        return lines


def check(done: Done, force: bool) -> None:
    """Logs the findings of a stage; UserError for those that do not keep their line."""
    for finding in done.outcome.findings:
        level = logging.INFO if finding.passed else logging.WARNING
        log.log(level, '%s: %s', done.stage.name, finding.text())
    failed = done.outcome.failed
    if final := [finding for finding in failed if finding.final]:
        raise PrivacyError(_complaint(done.stage, final))
    if failed and not force:
        raise UserError(_complaint(done.stage, failed) + '; `force` goes on all the same')


def _complaint(stage: Stage, findings: Iterable[Finding]) -> str:
    return f'{stage.name}: ' + '; '.join(f'{f.text()} To do: {f.remedy}' for f in findings)
