"""Weights of convolutions in a low type, cast once a step instead of at every call.

Autocast casts a frozen weight at every call, and the gradient of a trained one back by itself at
every backward pass: hundreds of small operations. What is computed is the same.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class KeptCasts:
    """Copies of the weights and biases of all Conv2d below `nets`, in `dtype`.

    Trained ones follow theirs when `refresh` is called; frozen ones never change.
    """

    def __init__(self, nets: Iterable[nn.Module], dtype: torch.dtype) -> None:
        convs = {m: None for net in nets for m in net.modules() if isinstance(m, nn.Conv2d)}
        self._places = [
            (conv, name, full, full.detach().to(dtype).requires_grad_(full.requires_grad))
            for conv in convs
            for name, full in conv.named_parameters(recurse=False)
        ]
        self._trained = [(full, low) for *_, full, low in self._places if full.requires_grad]
        self._low = {id(full): low for full, low in self._trained}

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over what the trained weights have become."""
        torch._foreach_copy_([low for _, low in self._trained], [full for full, _ in self._trained])

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """The convolutions compute with the copies."""
        for conv, name, _, low in self._places:
            conv._parameters[name] = low  # type: ignore[assignment]
        try:
            yield
        finally:
            for conv, name, full, _ in self._places:
                conv._parameters[name] = full

    def stand_ins(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """What gradients are to be taken of in place of `parameters`."""
        return [self._low.get(id(p), p) for p in parameters]


def add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Adds to .grad, in the type of each parameter, by one operation for all of them.

    gradients: one for each parameter, or None; of the parameter's type or a lower one.
    """
    pairs: list[tuple[Any, Any]] = [(p, g) for p, g in zip(parameters, gradients) if g is not None]
    low = [i for i, (p, g) in enumerate(pairs) if g.dtype != p.dtype]
    if low:
        wide = [torch.empty_like(pairs[i][1], dtype=pairs[i][0].dtype) for i in low]
        torch._foreach_copy_(wide, [pairs[i][1] for i in low])
        for i, gradient in zip(low, wide):
            pairs[i] = pairs[i][0], gradient
    again = [(p, g) for p, g in pairs if p.grad is not None]
    for p, g in pairs:
        p.grad = g if p.grad is None else p.grad
    if again:
        sums = torch._foreach_add([p.grad for p, _ in again], [g for _, g in again])
        for (p, _), summed in zip(again, sums):
            p.grad = summed
