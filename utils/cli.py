"""Command-line plumbing shared by all scripts: parsers, argument types, devices, exit codes."""

import argparse
import errno
import functools
import logging
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

import torch

from utils import distributed
from utils.errors import PrivacyError, UserError
from utils.kinds import (
    auto_or,
    boolean,
    fraction,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_int,
    power_of_two,
)
from utils.precision import full_precision

# The types of flags, for scripts that need no more of them than this.
__all__ = [
    'add_common',
    'add_device',
    'auto_or',
    'boolean',
    'flags_of',
    'fraction',
    'full_precision',
    'names_flags',
    'nonnegative_float',
    'nonnegative_int',
    'parser',
    'positive_float',
    'positive_int',
    'power_of_two',
    'resolve_device',
    'run',
]

# What flags are added to: a parser, or a group of one.
Group = TypeVar('Group', bound=argparse._ActionsContainer)
P = ParamSpec('P')
R = TypeVar('R')

# Exit codes, beside 0 and 128 + the signal that stopped a run (130 for Ctrl-C, 143 for SIGTERM).
FAILED = 1  # a check that found something, a full disk, a lost process, a fault of this software
BAD_INPUT = 2
PROMISE_BROKEN = 3


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of the examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.required or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like all errors of users, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        text = message.removeprefix('argument ')
        self.exit(BAD_INPUT, f'error: {text}; --help explains the flags\n')


def parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """An ArgumentParser that shows defaults and takes no abbreviated flags."""
    return _Parser(
        description=description, epilog=epilog, allow_abbrev=False, formatter_class=_HelpFormatter
    )


def parser_of(doc: str) -> argparse.ArgumentParser:
    """The `parser` of a script with this docstring: its first line on top, the rest at the end."""
    first, _, rest = doc.partition('\n')
    return parser(first, rest)


def add_common(p: Group) -> Group:
    """Adds --device and --seed to a parser (or argument group) and returns it."""
    add_device(p)
    p.add_argument('--seed', type=nonnegative_int, default=0, metavar='INT', help='random seed')
    return p


def add_device(p: Group) -> None:
    """Adds --device to a parser (or argument group)."""
    p.add_argument(
        '--device',
        default='auto',
        metavar='DEVICE',
        help='cpu, cuda, cuda:N, or auto (a GPU when there is one)',
    )


def flags_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The flag of each parameter, under every spelling that the parser takes."""
    return {
        spelling.lstrip('-').replace('-', '_'): action.option_strings[0]
        for action in parser._actions
        for spelling in action.option_strings
    }


def names_flags(
    build_parser: Callable[[], argparse.ArgumentParser],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a script's `main`: errors of libraries name its flags, not their parameters."""

    def wrap(main: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(main)
        def named(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return main(*args, **kwargs)
            except UserError as error:
                error.name_flags(flags_of(build_parser()))
                raise

        return named

    return wrap


def resolve_device(name: str) -> torch.device:
    """Turns --device into a torch.device; UserError when it is not there.

    From here on float32 is float32 (`utils.precision`).
    """
    full_precision()
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'--device {name}: unknown device; use cpu, cuda or cuda:N') from None
    if device.type == 'cuda':
        if not torch.cuda.is_available():
            raise UserError(f'--device {name}: no CUDA device is available; use --device cpu')
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise UserError(f'--device {name}: only {torch.cuda.device_count()} GPU(s) here')
    return device


# What a wrong path looks like, as against a fault of this software.
_FILE_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ELOOP,
)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: a limit set for the process


def _terminate(number: int, frame: object) -> NoReturn:
    # As an exception, so that temporary files are removed on the way out.
    raise SystemExit(128 + number)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main()` and exits with its code; user errors become one line on stderr."""
    logging.captureWarnings(True)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        code = PROMISE_BROKEN if isinstance(error, PrivacyError) else BAD_INPUT
    except KeyboardInterrupt:
        print(
            'interrupted; run the same command again to resume where resuming is supported',
            file=sys.stderr,
        )
        code = 130
    except OSError as error:
        if error.errno in _FILE_ERRORS and error.filename:
            text, code = f'{error.filename}: {error.strerror}; choose another path', BAD_INPUT
        elif error.errno in _DISK_FULL:
            where = f' while writing {error.filename}' if error.filename else ''
            text = f'the disk is full{where}; free some space and run the same command again'
            code = FAILED
        else:
            raise
        print(f'error: {text}', file=sys.stderr)
    except RuntimeError as error:
        if not distributed.lost_peer(error):
            raise
        print(
            'error: another process of this run has ended (what it said stands above); start '
            'all of them again to go on from the last saved state',
            file=sys.stderr,
        )
        code = FAILED
    sys.exit(code)
