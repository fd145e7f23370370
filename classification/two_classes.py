"""The published commands for two classes: main.py under another name, with other defaults."""

from collections.abc import Sequence

from classification.main import main
from utils.errors import UserError


def two_classes(
    defaults: Sequence[str], argv: Sequence[str], *, needs: str | None = None, what: str = ''
) -> int:
    """Runs main.py with eyepacs_2cls.yaml, `defaults`, and the flags that were given.

    needs: a flag without which the command would mean something else; UserError, which says
    `what` to give with it, when it is missing.
    """
    if (
        needs is not None
        and not any(a == needs or a.startswith(f'{needs}=') for a in argv)
        and not {'-h', '--help'} & set(argv)
    ):
        raise UserError(f'{needs} needed: {what}; see --help')
    return main(['-config', 'eyepacs_2cls.yaml', *defaults, *argv])
