"""Keeping Ctrl-C away from the moment in which buffers change hands."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Holds a Ctrl-C back until the block is done.

    Between a call that donates its arguments and the assignment of its results an interrupt
    would leave deleted arrays behind. Threads other than the main one are never interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[Any] = []
    try:
        previous = signal.signal(signal.SIGINT, lambda *arguments: received.append(arguments))
    except ValueError:  # the main thread of a sub-interpreter has no signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous if previous is not None else signal.SIG_DFL)
        if received and callable(previous):
            previous(*received[-1])
