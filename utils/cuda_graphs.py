"""CUDA graphs: one launch in place of the hundreds of a step that is the same every time."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_WARM_UP = 3  # calls before the capture, in which libraries choose their algorithms
_SHIFT = 1e-2  # by which the input moves for the second comparison
# Relative; kernels that add in varying order, and choices among near equals, differ a little.
_TOLERANCE = 0.05

Step = Callable[[], tuple[Tensor, ...]]


def captured(step: Step, x: Tensor) -> Step:
    """`step`, which computes tensors from `x` and constants, as a CUDA graph that is replayed.

    x: the one input that changes between calls, in place. The graph's results are overwritten by
    the next call. `step` must not wait for the GPU, nor change anything. The graph has to give
    what `step` does, for x and for values beside it; if it does not, or cannot be captured, a
    warning is logged and `step` itself is returned.
    """
    try:
        replayed = _capture(step)
        difference = _difference(step, replayed, x)
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        log.warning('steps are not replayed as a CUDA graph: %s', reason)
        return step
    if difference <= _TOLERANCE:  # not where it is not a number
        return replayed
    log.warning('steps are not replayed as a CUDA graph: it differs by %.1e from them', difference)
    return step


def _capture(step: Step) -> Step:
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # captures are not allowed on the default stream
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replayed() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replayed


def _difference(step: Step, replayed: Step, x: Tensor) -> float:
    """The largest relative difference of the results, for x and for values beside it."""
    found, kept = [], x.detach().clone()
    for shift in (0.0, _SHIFT):
        with torch.no_grad():
            x.add_(shift)
        wanted = [v.clone() for v in step()]
        found += [
            (got - want).norm() / want.norm().clamp_min(1e-12)
            for got, want in zip(replayed(), wanted)
        ]
    with torch.no_grad():
        x.copy_(kept)
    return float(torch.stack([v.float() for v in found]).max())
