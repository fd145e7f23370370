"""The two errors a user can meet; everything else is a bug."""

from collections.abc import Iterable

MAX_LISTED = 20


class UserError(Exception):
    """Bad input or a missing file: the message names the flag, file or row and the remedy."""


class PrivacyError(UserError):
    """A privacy promise would be broken; the run stops instead of releasing anything."""


def listing(head: str, lines: Iterable[object]) -> str:
    """The text of an error over many files or rows: the head, then the first 20 of them."""
    more = [f'... and {len(lines) - MAX_LISTED} more'] if len(lines) > MAX_LISTED else []
    return '\n  '.join([f'{head}:', *map(str, lines[:MAX_LISTED]), *more])
