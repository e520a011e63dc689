"""Losses on their way from the device: read when they are there, while further steps run."""

import collections
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

_MOST = 4


class Loss(NamedTuple):
    """One step's loss, and when the device had it."""

    step: int
    value: float
    seconds: float  # that the device took for the step
    time: float  # of `time.perf_counter`
    more: dict[str, float] = {}  # what else was seen in the step


class LateLosses:
    """Reads losses in a thread of its own, so that who dispatches steps waits for none of them.

    At most four steps are under way: `put` waits for the oldest before it takes a fifth. Leaving
    the ``with`` block flushes, also after an error.

    Args:
      report: called with every `Loss`, in order, by the thread that calls `put` and `flush`.
      in_step: report each loss four steps later, also if it is there before: in several processes
        an error of ``report`` then comes before the same step.
    """

    def __init__(self, report: Callable[[Loss], None], in_step: bool = False):
        self._report = report
        self._in_step = in_step
        self._reader = ThreadPoolExecutor(1, "losses")
        self._pending: collections.deque[tuple[int, float, Future]] = collections.deque()
        self._last = 0.0

    def __enter__(self) -> "LateLosses":
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self.flush()
        finally:
            self._reader.shutdown(cancel_futures=True)

    def put(self, step: int, started: float, loss: Any, more: Mapping[str, Any] = {}) -> None:
        """Takes the loss of a step that was dispatched at ``started``, and other scalars of it."""
        self._pending.append((step, started, self._reader.submit(_read, loss, more)))
        self._drain(_MOST)

    def flush(self) -> None:
        """Waits for all losses and reports them."""
        self._drain(0)

    def _drain(self, most: int) -> None:
        while self._pending and (len(self._pending) > most or self._is_there()):
            step, started, future = self._pending[0]
            try:
                value, more, now = future.result()
                self._pending.popleft()
                self._report(Loss(step, value, now - max(started, self._last), now, more))
            except Exception:
                self._pending.clear()  # one error is told, not those that follow from it
                raise
            self._last = now

    def _is_there(self) -> bool:
        return self._pending[0][2].done() and not self._in_step


def _read(loss: Any, more: Mapping[str, Any]) -> tuple[float, dict[str, float], float]:
    value = float(loss)
    now = time.perf_counter()
    return value, {name: float(x) for name, x in more.items()}, now
