"""What a step on the pretended GPU may cost: host waits and operations at toy size.

A number that is exceeded names the lines in the failure; who has a reason to raise it does so here.
"""

from pretended_device import PretendedGPU

BUDGETS = {  # (host waits, operations)
    'generator': (0, 1060),
    'generator, all penalties': (0, 2790),
    'generator bf16': (0, 1215),
    'generator bf16, all penalties': (0, 3070),
    'generator fp16': (0, 1330),
    'generator fp16, all penalties': (0, 3280),
    'projected': (0, 1965),
    'encoder': (0, 1095),
    'encoder bf16': (0, 1250),
    'encoder fp16': (1, 1820),
    'e4e': (0, 1160),
    'content': (0, 495),
    'content bf16': (0, 570),
    'grader': (0, 243),
    'grader bf16': (0, 291),
    'grader fp16': (1, 303),
    # One wait at the end of the epoch of three steps.
    'pairs': (1 / 3, 241),
    'pairs bf16': (1 / 3, 290),
    'groups': (0, 395),
    'groups bf16': (0, 445),
    'groups by group means': (0, 810),
    'inversion': (0, 290),
    'inversion bf16': (0, 320),
    'refinement': (0, 510),
}


def within_budget(gpu: PretendedGPU, name: str, steps: int = 1) -> None:
    """No fault, and no more waits and operations than BUDGETS allows for `steps` steps."""
    waits, operations = BUDGETS[name]
    found = gpu.report(name)
    assert not gpu.faults, found
    assert gpu.n_waits <= waits * steps, found
    assert operations * steps / 2 < gpu.n_operations <= operations * steps, found
    gpu.clear()


def more_within_budget(
    gpu: PretendedGPU, found: list[tuple[int, int]], name: str, steps: int = 1
) -> None:
    """The same for what `steps` more steps cost, without what is done once: [(waits, operations)]
    of the smaller and the larger run."""
    waits, operations = (more - less for less, more in zip(*found))
    assert waits <= BUDGETS[name][0] * steps, gpu.report(name)
    allowed = BUDGETS[name][1] * steps
    assert allowed / 2 < operations <= allowed, gpu.report(name)
