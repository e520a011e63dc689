"""Keeping signal handlers away from the moment in which buffers change hands."""

# What `signal` wraps; that makes an enum of every answer, which takes 90 us of each step.
import _signal  # pyright: ignore[reportMissingImports]
import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_handler_of, _set_handler = _signal.getsignal, _signal.signal
_SIGNALS = sorted(map(int, signal.valid_signals()))


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Holds every handled signal back until the block is done: Ctrl-C, SIGTERM, SIGUSR1, ...

    Between a call that donates its arguments and the assignment of its results a handler that
    reads them, or an exception that it raises, would meet deleted arrays. Handlers that Python
    did not install are left alone. Threads other than the main one are never interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)

    replaced: list[tuple[int, Any]] = []
    try:
        for number in _SIGNALS:
            handler = _handler_of(number)
            if callable(handler):
                _set_handler(number, note)
                replaced.append((number, handler))
    except ValueError:  # the main thread of a sub-interpreter has no signals
        pass
    try:
        yield
    finally:
        for number, handler in replaced:
            _set_handler(number, handler)
        for number in received:
            signal.raise_signal(number)
