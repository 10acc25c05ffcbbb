"""Ending: what SIGTERM (SLURM, containers, ``kill``) and Ctrl-C turn into, and processes that end with another.

A signal becomes an exception rather than an exit, so that files are closed and folders let go; derived from
``SystemExit``, so that no ``except Exception`` on the way, Lightning's included, takes it for a failure or for a
success.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


class Stopped(SystemExit):
    """A signal asked this process to end. ``code`` is what a shell reports: 128 + the signal's number.

    ``line`` tells the user where the run stands; a rank that is not the first has none.
    """

    def __init__(self, number: int, line: str | None = "the same command resumes"):
        super().__init__(128 + number)
        by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self.line = line and f"stopped by {by}; {line}"


def raise_stopped(number: int, frame: FrameType | None = None) -> None:
    """A signal handler that ends the command where it is."""
    raise Stopped(number)


@contextmanager
def signals(*numbers: int, handler: Handler | None = None) -> Iterator[None]:
    """Signals go to ``handler`` (None: where they went before), and on leaving to where they went before.

    Python delivers signals to the main thread, and lets no other set handlers: there, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers if handler else ():
            signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            if previous is not None:  # set outside Python, where it cannot be set again from here
                signal.signal(number, previous)


def end_with_parent() -> None:
    """Have the system end this process with the one that started it, however that ends; so far on Linux alone."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended just before
            os.kill(os.getpid(), signal.SIGKILL)
