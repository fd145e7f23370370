"""The one command in a process of its own, which is killed in the middle of a stage."""

import os
import signal
import threading
import time
from functools import partial

from fresh_process import start_fresh

from anonymization import optimisation
from anonymization.audit import recompute
from datasets.archive import ArchiveWriter
from scripts import photos_to_release
from stages import preparation, release


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(number, place, name):
    """Kills this process when the function is called for that time."""
    real, calls = getattr(place, name), []

    def counted(*args, **options):
        calls.append(name)
        if len(calls) == number:
            die()
        return real(*args, **options)

    setattr(place, name, counted)


def die_at_file(out, pattern):
    """Kills this process as soon as there is a file of that pattern."""

    def look():
        while not list(out.glob(pattern)):
            time.sleep(0.01)
        die()

    threading.Thread(target=look, daemon=True).start()


def killers(out):
    """What has to be called to be killed in the middle of each stage."""
    return {
        'check': partial(die_at_call, 1, preparation, 'write_csv'),
        'crop': partial(die_at_call, 9, ArchiveWriter, 'add'),
        'encoder': partial(die_at_file, out, 'stages/*-encoder-*/joint/checkpoints/state_*.pt'),
        'release': partial(die_at_call, 2, optimisation, '_save_batch'),
        'verification': partial(die_at_call, 2, recompute, '_picture'),
        'evaluation': partial(die_at_call, 1, release, 'nearest_attack'),
    }


def _run_and_die(name, out, arguments):
    killers(out)[name]()
    os._exit(photos_to_release.main(arguments))


def run_until_killed(name, out, arguments):
    """Runs the command until it is in the middle of the stage `name`; its exit code."""
    process = start_fresh(_run_and_die, name, out, arguments)
    process.join()
    return process.exitcode
