"""The checker of jaxtyping's import hook: shapes and dtypes of the arrays in signatures.

What is no array is the type checker's business, and tests may put stand-ins in its place.
"""

import contextlib
import typing
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_with_shapes = beartype(conf=BeartypeConf(is_pep484_tower=True))


def _has_shape(hint: object) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_has_shape(part) for part in typing.get_args(hint))


def check(function: Callable) -> Callable:
    """`function`, checked where its annotations hold shapes; the hook wraps every function."""
    if not isinstance(getattr(function, '__annotations__', None), dict):
        return function
    hints = function.__annotations__
    if not any(_has_shape(hint) for hint in hints.values()):
        return function
    function.__annotations__ = {k: v if _has_shape(v) else Any for k, v in hints.items()}
    return _with_shapes(function)


@contextlib.contextmanager
def checking(on: bool) -> Iterator[None]:
    """Whether calls are checked in the block."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update('jaxtyping_disable', not on)
    try:
        yield
    finally:
        jaxtyping.config.update('jaxtyping_disable', before)


def unchecked() -> contextlib.AbstractContextManager[None]:
    """For tests of what a function itself says to wrong shapes."""
    return checking(False)
