"""Which values an option takes, whether it is given as a flag or in a YAML file."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_MOST = 3.4028234663852886e38  # of float32; above it is infinity, where it is computed with


@dataclasses.dataclass(frozen=True)
class Kind:
    """Which values an option takes.

    of(text): a flag's text as a value, ValueError when it is none. accepts(value): whether it is
    one. wanted: in words. choices: all of them, where they are few. item, length: kind of a list's
    members, and how many it has (None: any number). show(value): as text files hold it.
    """

    of: Callable[[Any], Any]
    accepts: Callable[[Any], bool]
    wanted: str
    choices: Sequence[str] | None = None
    item: 'Kind | None' = None
    length: int | None = None
    show: Callable[[Any], Any] = lambda value: value

    def __call__(self, text: str) -> Any:
        """The value of a flag, as argparse wants it."""
        try:
            value = self.of(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f'{text!r} is not {self.wanted}') from None
        if not self.accepts(value):
            raise argparse.ArgumentTypeError(f'{text} is not {self.wanted}')
        return value

    def value(self, entry: Any) -> Any:
        """The value of a YAML entry; ValueError when it is none."""
        if isinstance(entry, str) and not self.accepts(entry):
            entry = self.of(entry)
            if not isinstance(entry, float):  # YAML 1.1 reads 1e-3 as a word
                raise ValueError
        if not self.accepts(entry):
            raise ValueError
        return self.of(entry)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole(accepts: Callable[[int], bool], wanted: str) -> Kind:
    """Whole numbers of some range."""
    return Kind(int, lambda v: _whole(v) and accepts(v), wanted)


def number(accepts: Callable[[float], bool], wanted: str) -> Kind:
    """Numbers of some range, never infinite and never NaN."""
    return Kind(float, lambda v: _number(v) and abs(v) <= _MOST and accepts(v), wanted)


integer = whole(lambda v: True, 'a whole number')
positive_int = whole(lambda v: v > 0, 'a whole number above 0')
nonnegative_int = whole(lambda v: v >= 0, 'a whole number, 0 or more')
power_of_two = whole(lambda v: v > 0 and v & (v - 1) == 0, 'a power of two')
positive_float = number(lambda v: v > 0, 'a number above 0, below 3.4e38')
nonnegative_float = number(lambda v: v >= 0, 'a number, 0 or more, below 3.4e38')
fraction = number(lambda v: 0 <= v <= 1, 'a number between 0 and 1')
text = Kind(str, lambda v: isinstance(v, str), 'text')
path = Kind(Path, lambda v: isinstance(v, Path), 'a path', show=str)


def path_or(*words: str) -> Kind:
    """A path, or one of a few words."""
    return Kind(
        lambda v: v if v in words else Path(v),
        lambda v: v in words or isinstance(v, Path),
        f'a path, or one of {", ".join(words)}',
        show=str,
    )


def _boolean(value: Any) -> bool:
    words = {'1': True, 'true': True, 'yes': True, 'on': True}
    words |= {'0': False, 'false': False, 'no': False, 'off': False}
    if str(value).lower() not in words:
        raise ValueError
    return words[str(value).lower()]


boolean = Kind(_boolean, lambda v: isinstance(v, bool), 'true or false')


def choice(*names: str) -> Kind:
    """One of a few names."""
    return Kind(str, lambda v: v in names, f'one of {", ".join(names)}', choices=names)


def named(names: Mapping[str, str]) -> Kind:
    """Values that users know under other names: name -> value."""
    back = {value: name for name, value in names.items()}
    return Kind(
        lambda v: names.get(v, v),
        lambda v: v in back,
        f'one of {", ".join(back)}',
        choices=sorted(names),
        show=lambda v: back.get(v, v),
    )


def auto_or(kind: Kind) -> Kind:
    """A number, or the word 'auto'."""
    return Kind(
        lambda v: v if v == 'auto' else kind.of(v),
        lambda v: v == 'auto' or kind.accepts(v),
        f'{kind.wanted}, or auto',
    )


def list_of(kind: Kind, wanted: str, *, length: int | None = None, make: type = tuple) -> Kind:
    """Different values of one kind (or `length` values, equal or not)."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, (list, tuple)) or not all(map(kind.accepts, value)):
            return False
        if length is not None:
            return len(value) == length
        return bool(value) and len({str(v) for v in value}) == len(value)

    return Kind(
        lambda v: make(map(kind.of, v)),
        accepts,
        wanted,
        item=kind,
        length=length,
        show=lambda v: [kind.show(x) for x in v],
    )
