"""Ctrl-C and SIGTERM: a run stops between two steps, and keeps what it has reached."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from jax.experimental import multihost_utils


class Interrupts:
    """Counts Ctrl-C and SIGTERM instead of ending, so that a run stops between two steps.

    The second one does raise, in case the first is not noticed, until `held` is set.
    """

    signals: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    count = 0
    held = False

    def __call__(self, *signal_and_frame: Any) -> None:
        self.count += 1
        if self.count > 1 and not self.held:
            raise KeyboardInterrupt

    def end_before(self, step: int) -> bool:
        """Whether a run ends before this step."""
        return self.count > 0

    def in_a_step(self) -> None:
        """Takes note of a second signal, which was raised in a step."""
        self.count += 1

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Receives the signals meanwhile, unless they are ignored, as in a background job."""
        is_main = threading.current_thread() is threading.main_thread()
        previous = {
            number: handler
            for number in self.signals
            if (handler := signal.getsignal(number)) not in (None, signal.SIG_IGN) and is_main
        }
        for number in previous:
            signal.signal(number, self)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class SharedInterrupts(Interrupts):
    """Those of several processes, which all stop before the same step.

    JAX hears a SIGTERM to any of them, and finds a step that none has reached. Ctrl-C is passed
    on as one. A second Ctrl-C ends this process, of which the others are told as of an error.
    """

    signals = (signal.SIGINT,)
    presses = 0

    def __call__(self, *signal_and_frame: Any) -> None:
        self.presses += 1
        if self.presses > 1 and not self.held:
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)

    def end_before(self, step: int) -> bool:
        self.count += multihost_utils.reached_preemption_sync_point(step)
        return self.count > 0

    def in_a_step(self) -> None:
        raise KeyboardInterrupt
