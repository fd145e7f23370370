"""The two errors a user can meet; everything else is a bug."""

import re
from collections.abc import Mapping, Sequence

MAX_LISTED = 20


class UserError(Exception):
    """Bad input or a missing file: the message names the parameter, file or row and the remedy.

    Library code writes a parameter in backticks (lower `k`); a script puts its flag there.
    """

    def name_flags(self, flags: Mapping[str, str]) -> None:
        """Puts flags in the place of the parameters that they set; others stay as they are."""
        text = re.sub(r'`(\w+)`', lambda found: flags.get(found[1], found[0]), str(self))
        self.args = (text, *self.args[1:])


class PrivacyError(UserError):
    """A privacy promise would be broken; the run stops instead of releasing anything."""


def listing(head: str, lines: Sequence[object]) -> str:
    """The text of an error over many files or rows: the head, then the first 20 of them."""
    more = [f'... and {len(lines) - MAX_LISTED} more'] if len(lines) > MAX_LISTED else []
    return '\n  '.join([f'{head}:', *map(str, lines[:MAX_LISTED]), *more])
