"""Command-line plumbing shared by all scripts: parsers, argument types, devices, exit codes."""

import argparse
import errno
import logging
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch

from utils import distributed
from utils.errors import UserError
from utils.precision import full_precision

# What flags are added to: a parser, or a group of one.
Group = TypeVar('Group', bound=argparse._ActionsContainer)
Number = TypeVar('Number', int, float)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of the examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.required or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


def parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """An ArgumentParser that shows defaults and takes no abbreviated flags."""
    return argparse.ArgumentParser(
        description=description, epilog=epilog, allow_abbrev=False, formatter_class=_HelpFormatter
    )


def add_common(p: Group) -> Group:
    """Adds --device and --seed to a parser (or argument group) and returns it."""
    p.add_argument(
        '--device',
        default='auto',
        metavar='DEVICE',
        help='cpu, cuda, cuda:N, or auto (a GPU when there is one)',
    )
    p.add_argument('--seed', type=nonnegative_int, default=0, metavar='INT', help='random seed')
    return p


def _number(
    convert: Callable[[str], Number], accept: Callable[[Number], bool], wanted: str
) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        try:
            value = convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f'{text!r} is not {wanted}') from None
        if not accept(value):
            raise argparse.ArgumentTypeError(f'{text} is not {wanted}')
        return value

    return parse


positive_int = _number(int, lambda v: v > 0, 'a whole number above 0')
nonnegative_int = _number(int, lambda v: v >= 0, 'a whole number, 0 or more')
_MOST = torch.finfo(torch.float32).max  # above it is infinity, where it is computed with
positive_float = _number(float, lambda v: 0 < v <= _MOST, 'a number above 0, below 3.4e38')
nonnegative_float = _number(float, lambda v: 0 <= v <= _MOST, 'a number, 0 or more, below 3.4e38')
fraction = _number(float, lambda v: 0 <= v <= 1, 'a number between 0 and 1')
power_of_two = _number(int, lambda v: v > 0 and v & (v - 1) == 0, 'a power of two')


def auto_or(convert: Callable[[str], float]) -> Callable[[str], float | str]:
    """The type of a flag that takes 'auto' beside numbers."""

    def parse(text: str) -> float | str:
        return text if text == 'auto' else convert(text)

    return parse


def boolean(text: str | bool) -> bool:
    """Reads true/false, yes/no, 1/0 (published flags such as `--mirror=1`)."""
    value = {
        '1': True,
        'true': True,
        'yes': True,
        'on': True,
        '0': False,
        'false': False,
        'no': False,
        'off': False,
    }.get(str(text).lower())
    if value is None:
        raise argparse.ArgumentTypeError(f'{text!r} is neither true nor false')
    return value


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
    """Runs `main()` and exits with its code; user errors become one line on stderr (exit 2)."""
    logging.captureWarnings(True)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(
            'interrupted; run the same command again to resume where resuming is supported',
            file=sys.stderr,
        )
        code = 130
    except OSError as error:
        if error.errno in _FILE_ERRORS and error.filename:
            text, code = f'{error.filename}: {error.strerror}; choose another path', 2
        elif error.errno in _DISK_FULL:
            where = f' while writing {error.filename}' if error.filename else ''
            text = f'the disk is full{where}; free some space and run the same command again'
            code = 1
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
        code = 1
    sys.exit(code)
