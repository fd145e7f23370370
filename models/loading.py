"""Networks from weight files that nobody vouches for: what they hold, and filling a network."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from utils.errors import UserError
from utils.io import load_weights

_MAX_REASON = 300
Network = TypeVar('Network', bound=nn.Module)


def named_tensors(
    value: object, *, source: str | Path, what: str = 'weights', remedy: str = ''
) -> dict[str, torch.Tensor]:
    """`value` when it is a state dict; else a UserError: `source` holds no `what`, `remedy`."""
    if (
        not isinstance(value, dict)
        or not value
        or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
    ):
        raise UserError(
            f'{source} holds no {what} (tensors by name).' + (f' {remedy}' if remedy else '')
        )
    return value


def load_state(path: str | Path, *, what: str, hint: str = '') -> dict[str, torch.Tensor]:
    """The state dict of a weight file, also of one that has it as its entry `state_dict`.

    UserError as of `load_weights`, and when there is none.
    """
    content = load_weights(path, what=what, hint=hint)
    if isinstance(content, dict):
        content = content.get('state_dict', content)
    return named_tensors(content, source=path, remedy=hint)


def fill(
    build: Callable[[], Network], state: dict[str, torch.Tensor], *, optional: str | None = None
) -> Network:
    """The module that `build()` makes, with the weights of `state`; RuntimeError if they differ.

    All shapes are compared before memory is taken for the module, which a few wide tensors of a
    file could otherwise make enormous. optional: when no name begins so, the module's own stay.
    """
    own = '' if optional is None or any(k.startswith(optional) for k in state) else optional
    for meta in (True, False):
        with torch.device('meta') if meta else contextlib.nullcontext():
            net = build()
        kept = {k: v for k, v in net.state_dict().items() if own and k.startswith(own)}
        net.load_state_dict({**state, **kept}, assign=meta)
    return net


def mismatch(error: Exception) -> str:
    """Why a state dict does not fit, in a few words, from the error of torch or of a look-up."""
    if isinstance(error, KeyError):
        return f'it lacks {error}'[:_MAX_REASON]
    # torch's first line only says that there was an error; the keys stand on the next.
    text = ' '.join(line.strip() for line in str(error).splitlines()[:2])
    return (text or type(error).__name__)[:_MAX_REASON]
