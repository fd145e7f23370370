"""Processes that have computed nothing, started without importing everything again."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

# A test process has one server that such processes are forks of, so it imports for all of them.
_PRELOADED = ['toy_trainings', 'killed_stages']


def start_fresh(target: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Starts target(*arguments), both picklable, in a process of its own."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(_PRELOADED)
    method = multiprocessing.get_start_method()
    process = context.Process(target=_call, args=(method, target, *arguments))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join(sys.path))  # for what the server imports
        process.start()
    return process


def _call(method: str, target: Callable[..., Any], *arguments: Any) -> None:
    # Else loading processes would come from a server of their own and import everything again,
    # which those of a command from a shell do not.
    multiprocessing.set_start_method(method, force=True)
    target(*arguments)
