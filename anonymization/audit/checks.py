"""The verdict: questions, answers and the numbers beside them."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

_MAX_LISTED = 10


@dataclasses.dataclass(frozen=True)
class Check:
    """One question, whether it was answered well, and the reasons or numbers.

    detail may be shown to anyone; private holds names and ids, for private/audit.json only.
    """

    name: str
    passed: bool
    detail: str
    private: tuple[str, ...] = ()


@dataclasses.dataclass
class Audit:
    """All checks of one release, numbers for the report, and nearest-source distances."""

    checks: list[Check] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    distances: np.ndarray | None = None  # [n release pictures] to the nearest source
    yardstick: np.ndarray | None = None  # [n sources] to the nearest other person's source

    @property
    def passed(self) -> bool:
        """Whether every question was answered well."""
        return all(c.passed for c in self.checks)


class Findings:
    """Collects the faults that a check finds, each with a public and perhaps a private text."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.public: list[str] = []
        self.private: list[str] = []

    def add(self, fault: str, names: Iterable[object] = ()) -> None:
        """fault: says nothing of a source. names: what it is about, kept private."""
        self.public.append(fault)
        words = [str(n) for n in names]
        if words:
            self.private.append(f'{fault}: {", ".join(words)}')

    def check(self, good: str) -> Check:
        """The Check: passed, with the text `good`, when nothing was found."""
        return Check(self.name, not self.public, listed(self.public) or good, tuple(self.private))


def listed(items: Iterable[object]) -> str:
    """At most ten items, and how many more there are."""
    items = list(items)
    more = f'; and {len(items) - _MAX_LISTED} more' if len(items) > _MAX_LISTED else ''
    return '; '.join(str(i) for i in items[:_MAX_LISTED]) + more


def report_text(audit: Audit) -> str:
    """The verdict as lines of text, without a source or patient id."""
    lines = [f'{"ok  " if c.passed else "FAIL"}  {c.name}: {c.detail}' for c in audit.checks]
    return '\n'.join(lines + [f'note  {note}' for note in audit.notes])


def report_dict(audit: Audit, *, private: bool = False) -> dict[str, Any]:
    """The verdict as a JSON-able dict. private: with names and ids, for private/ only."""
    checks = []
    for check in audit.checks:
        entry = dataclasses.asdict(check)
        entry['private'] = list(check.private)
        if not private:
            del entry['private']
        checks.append(entry)
    return {'passed': audit.passed, 'checks': checks, 'facts': audit.facts, 'notes': audit.notes}


def audit_from_dict(found: dict[str, Any]) -> Audit:
    """The verdict that `report_dict` wrote with its private part, without the distances."""
    checks = [
        Check(c['name'], c['passed'], c['detail'], tuple(c['private'])) for c in found['checks']
    ]
    return Audit(checks, found['facts'], found['notes'])
