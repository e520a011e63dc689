"""When masks are updated, and numbers that change with the steps: all functions of the step."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from cerebras_jax import checks, schedules
from cerebras_jax.types import Scalar

Value: TypeAlias = Scalar | Sequence[Scalar] | Callable[[Any], Any]
"""A constant; a list, which gives its next value at every mask update; or a schedule."""


@dataclasses.dataclass(frozen=True)
class Every:
    """Mask updates at ``start``, ``start + freq``, ... before ``stop``.

    Step 0 is the time of ``init``; step t is the end of the t-th update.

    >>> [t for t in range(60) if Every(10, start=20, stop=50).due(t)]
    [20, 30, 40]
    """

    freq: int = 1
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        _check_whole("freq", self.freq, 1)
        _check_whole("start", self.start, 0)
        if self.stop is not None:
            _check_whole("stop", self.stop, 0)

    def due(self, step: Any) -> Any:
        """Whether masks are updated at ``step``: a bool, or an array if step is one."""
        due = ((step - self.start) % self.freq == 0) & (step >= self.start)
        return due if self.stop is None else due & (step < self.stop)

    def count(self, step: Any) -> Any:
        """How many updates are due before ``step``."""
        count = _positive(self.freq - 1 + step - self.start) // self.freq
        if self.stop is None:
            return count
        most = max(self.freq - 1 + self.stop - self.start, 0) // self.freq
        return most - _positive(most - count)


@dataclasses.dataclass(frozen=True)
class At:
    """Mask updates at the given steps.

    >>> At([8, 2]).steps, At([8, 2]).due(8), At([8, 2]).count(8)
    ((2, 8), True, 1)
    """

    steps: Sequence[int]

    def __post_init__(self) -> None:
        if not isinstance(self.steps, list | tuple) or not self.steps:
            raise ValueError(f"steps must be a list of steps, got {self.steps!r}")
        for i, step in enumerate(self.steps):
            _check_whole(f"steps[{i}]", step, 0)
        object.__setattr__(self, "steps", tuple(sorted({int(step) for step in self.steps})))

    def due(self, step: Any) -> Any:
        """Whether masks are updated at ``step``: a bool, or an array if step is one."""
        return sum(step == s for s in self.steps) > 0

    def count(self, step: Any) -> Any:
        """How many updates are due before ``step``."""
        return sum((step > s) * 1 for s in self.steps)


def _positive(x: Any) -> Any:
    return x * (x > 0)


def _check_whole(name: str, value: Any, least: int) -> None:
    is_number = checks.is_number(value) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value != int(value):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value!r}")


# --- values ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class linear(schedules.Schedule):
    r"""A straight line without end: :math:`init + slope \cdot t`.

    >>> linear(0.1, slope=0.05)(4)
    0.30000000000000004
    """

    init: Scalar
    slope: Scalar

    def __post_init__(self) -> None:
        checks.check("init", self.init, "finite")
        checks.check("slope", self.slope, "finite")

    def value(self, t: Any, xp: Any) -> Any:
        return self.init + xp.asarray(t, float) * self.slope


@dataclasses.dataclass(frozen=True)
class exponential(schedules.Schedule):
    r"""Approaches a final value: :math:`final + (init - final) \, e^{gamma \cdot t}`.

    >>> exponential(0.0, gamma=-0.5, final=0.9)(100)
    0.9
    """

    init: Scalar
    gamma: Scalar
    final: Scalar = 1.0

    def __post_init__(self) -> None:
        checks.check("init", self.init, "finite")
        checks.check("gamma", self.gamma, "finite")
        checks.check("final", self.final, "finite")

    def value(self, t: Any, xp: Any) -> Any:
        return self.final + (self.init - self.final) * xp.exp(xp.asarray(t, float) * self.gamma)


def frozen(value: Value) -> Any:
    """A list as a tuple, so that it can be hashed; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def check_value(name: str, value: Any) -> None:
    """Refuses what is not a fraction, a list of fractions or a schedule, which may leave [0, 1]."""
    if callable(value):
        return
    if not isinstance(value, tuple):
        checks.check(name, value, "in [0, 1]")
        return
    if not value:
        raise ValueError(f"{name} must be a number, a list of numbers or a schedule, got []")
    for i, x in enumerate(value):
        checks.check(f"{name}[{i}]", x, "in [0, 1]")


def value_at(value: Any, step: Any, used: Any) -> Any:
    """The value in force at ``step``.

    Args:
      value: a number, a tuple or a schedule.
      step: 0, 1, 2, ...
      used: how many values of a list were used up before.

    >>> value_at((0.1, 0.3), 7, used=3)
    0.3
    """
    if not isinstance(value, tuple):
        return value(step) if callable(value) else value
    return sum((used % len(value) == i) * x for i, x in enumerate(value))
