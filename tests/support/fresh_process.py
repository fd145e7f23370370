"""Processes that have computed nothing, started without importing everything again."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

# A test process has one server that such processes are forks of, so it imports for all of them.
_PRELOADED = ['toy_trainings', 'killed_stages']


def start_fresh(target: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Starts target(*arguments), both picklable, in a process of its own."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=target, args=arguments)
    process.start()
    return process
