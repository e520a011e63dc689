"""What all schedules have in common: how they are called, checked, and calculated with."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cerebras_jax import checks, plots
from cerebras_jax.schedules.arithmetic import INT32_MAX
from cerebras_jax.schedules.fields import check_fields, check_function, check_whole, frozen
from cerebras_jax.types import Number, Scalar


class Schedule:
    """Base class. A schedule of one's own is a frozen dataclass that defines ``value``:

    >>> import dataclasses
    >>> @dataclasses.dataclass(frozen=True)
    ... class halving(Schedule):
    ...     initial: float
    ...     def value(self, t, xp):
    ...         return self.initial * 0.5 ** xp.asarray(t, float)
    >>> halving(8.0)(3)
    1.0

    With numbers, schedules and other functions of the step it is added, subtracted, multiplied
    and divided; the result is a schedule.

    >>> s = 2 * halving(8.0) + 1
    >>> s(0), s(1)
    (17.0, 9.0)
    """

    __array_ufunc__ = None  # so that a NumPy number times a schedule is a schedule

    def value(self, t: Any, xp: Any) -> Any:
        """The schedule at step(s) ``t``, with the functions of ``xp``: numpy or jax.numpy."""
        raise NotImplementedError

    def __call__(self, step: Any) -> Any:
        """The value at ``step``: a float for an int, else an array of step's shape."""
        if isinstance(step, jax.Array) or self._holds_arrays:
            return jnp.asarray(self.value(jnp.asarray(step), jnp), float)
        value = self.value(np.asarray(step), np)
        if checks.is_traced(value):  # of a user's function, made in a trace
            return value
        value = np.asarray(value, float)
        return float(value) if value.ndim == 0 else value

    @functools.cached_property
    def _holds_arrays(self) -> bool:
        """Whether a number of it, or of a schedule within it, is an array on the device."""
        return any(
            x._holds_arrays if isinstance(x, Schedule) else isinstance(x, jax.Array)
            for x in jax.tree.leaves(list(vars(self).values()))
        )

    # --- calculating with schedules ------------------------------------------------------------

    def __add__(self, other: Number) -> "combined":
        return _combine("+", self, other)

    def __radd__(self, other: Number) -> "combined":
        return _combine("+", other, self)

    def __sub__(self, other: Number) -> "combined":
        return _combine("-", self, other)

    def __rsub__(self, other: Number) -> "combined":
        return _combine("-", other, self)

    def __mul__(self, other: Number) -> "Schedule":
        return scaled(self, other) if checks.is_number(other) else _combine("*", self, other)

    def __rmul__(self, other: Number) -> "Schedule":
        return scaled(self, other) if checks.is_number(other) else _combine("*", other, self)

    def __truediv__(self, other: Number) -> "combined":
        return _combine("/", self, other)

    def __rtruediv__(self, other: Number) -> "combined":
        return _combine("/", other, self)

    def __neg__(self) -> "scaled":
        return scaled(self, -1)

    def clip(self, lower: Scalar | None = None, upper: Scalar | None = None) -> "clipped":
        """The schedule within bounds: `clipped`."""
        return clipped(self, lower, upper)

    def shift(self, steps: int) -> "shifted":
        """The schedule ``steps`` later, or earlier if negative: `shifted`."""
        return shifted(self, steps)

    # --- what others ask of it -----------------------------------------------------------------

    def probes(self) -> Sequence[tuple[int, Any]]:
        """The (step, value) pairs by which `checks.check` judges whether it is in range."""
        return [(0, self(0))]

    def plot(self, steps: int | None = None, ax: Any = None, label: str | None = None) -> Any:
        """Draws the schedule over ``range(steps)`` and returns the matplotlib axes.

        Args:
          steps: how many steps to draw; by default what the schedule spans, or 1000.
          ax: the axes to draw into; by default new ones.
          label: the curve's label; by default the schedule itself.
        """
        return plots.curve(self, steps or span(self) or 1000, ax, label)

    def _repr_html_(self) -> str:
        """A small curve for Jupyter; without matplotlib the text."""
        return plots.as_html(self, span(self) or 1000)


class KnownSchedule(Schedule):
    """A schedule of this package: it is known where it turns and how long it lasts."""

    def _parts(self) -> list[tuple[Any, int]]:
        """The functions that it is made of, each with the step at which it begins."""
        return []

    def _turns(self) -> list[Any]:
        """The steps at which its course changes."""
        periods = [getattr(self, name, None) for name in _PERIODS]
        return [x for x in [*periods, *getattr(self, "milestones", ())] if x is not None]

    def _span(self) -> int:
        parts = [start + (span(part) or 0) for part, start in self._parts()]
        own = [
            getattr(self, name) * periods
            for name, periods in _PERIODS.items()
            if isinstance(getattr(self, name, None), int | float)
        ]
        milestones = getattr(self, "milestones", None) or (0,)
        return int(max([*parts, *own, 1.25 * milestones[-1]], default=0))

    def _landmarks(self) -> set[int] | None:
        """Steps where it starts, turns, ends, and some far beyond; None if that is not known."""
        total = span(self) or 1
        near = [0, total // 2, total, *map(int, self._turns())]
        result = {step + d for step in near for d in (-1, 0, 1)}
        result |= {total << k for k in range(1, 31)} | {INT32_MAX}
        for part, start in self._parts():
            inner = part._landmarks() if isinstance(part, KnownSchedule) else None
            if inner is None:
                return None
            result |= {start + step for step in inner}
        return {step for step in result if 0 <= step <= INT32_MAX}

    def probes(self) -> Sequence[tuple[int, Any]]:
        landmarks = None if self._holds_arrays else self._landmarks()
        return super().probes() if landmarks is None else self._extremes

    @functools.cached_property
    def _extremes(self) -> list[tuple[int, float]]:
        """The lowest and the highest value at the landmarks.

        A value that float32 does not hold counts as both, except beyond the span, where
        exponential growth ends in infinity.
        """
        steps = np.array(sorted(self._landmarks() or (0,)))
        values = self(steps)
        finite = np.abs(values) <= np.finfo(np.float32).max
        worst = [int(np.argmin(finite))]
        if finite[worst[0]] or steps[worst[0]] > (span(self) or 1):
            steps, values = steps[finite], values[finite]
            worst = [int(np.argmin(values)), int(np.argmax(values))]
        return [(int(steps[i]), float(values[i])) for i in worst]


def span(schedule: Any) -> int | None:
    """How many steps a schedule takes before it repeats or stands still; None if it never does."""
    return (schedule._span() if isinstance(schedule, KnownSchedule) else 0) or None


# How many of its periods a schedule with such a field spans.
_PERIODS = {
    "total_iters": 1,
    "total_steps": 1,
    "T_max": 2,
    "T_0": 4,
    "step_size": 4,
    "warmup_steps": 10,
}


# --- schedules of schedules -----------------------------------------------------------------------


@frozen
class scaled(KnownSchedule):
    """A schedule times a number; what ``schedule * number`` makes.

    >>> from cerebras_jax.schedules import constant
    >>> (constant(0.1) * 0.5)(0)
    0.05
    """

    schedule: Callable[[Any], Any]
    factor: Scalar

    def __post_init__(self) -> None:
        check_function("schedule", self.schedule)
        check_fields(self, factor="finite")

    def value(self, t: Any, xp: Any) -> Any:
        return self.schedule(t) * self.factor

    def _parts(self) -> list[tuple[Any, int]]:
        return [(self.schedule, 0)]


_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


@frozen
class combined(KnownSchedule):
    """Sum, difference, product or quotient of two schedules, or of a schedule and a number.

    What ``a + b``, ``a - b``, ``a * b`` and ``a / b`` make.

    >>> from cerebras_jax.schedules import linear
    >>> s = linear(0.0, 1.0, 10) + 0.5
    >>> s
    combined(left=linear(initial_learning_rate=0.0, end_learning_rate=1.0, total_iters=10,
    cycle=False), operation='+', right=0.5)
    >>> s(5), (1 - s)(5), (s / s)(5)
    (1.0, 0.0, 1.0)
    """

    left: Number
    operation: str
    right: Number

    def __post_init__(self) -> None:
        check_fields(self, operation=tuple(_OPERATIONS))
        if not self._parts():
            raise TypeError(
                "left or right must be a schedule, got "
                f"{checks.shown(self.left)} and {checks.shown(self.right)}"
            )
        for name in ("left", "right"):
            if not callable(getattr(self, name)):
                check_fields(self, **{name: "finite"})
            else:
                check_function(name, getattr(self, name))
        if self.operation == "/" and isinstance(self.right, int | float) and self.right == 0:
            raise ValueError(f"right must not be 0 in a division, got {self.right!r}")

    def value(self, t: Any, xp: Any) -> Any:
        left, right = (x(t) if callable(x) else x for x in (self.left, self.right))
        return _OPERATIONS[self.operation](left, right)

    def _parts(self) -> list[tuple[Any, int]]:
        return [(x, 0) for x in (self.left, self.right) if callable(x)]


def _combine(operation: str, left: Any, right: Any) -> Any:
    for x in (left, right):
        if not (callable(x) or checks.is_number(x)):
            return NotImplemented
    return combined(left, operation, right)


@frozen
class clipped(KnownSchedule):
    """A schedule within bounds; what ``schedule.clip(lower, upper)`` makes.

    >>> from cerebras_jax.schedules import linear
    >>> s = linear(0.0, 1.0, 10).clip(0.2, 0.8)
    >>> s(0), s(5), s(10)
    (0.2, 0.5, 0.8)
    """

    schedule: Callable[[Any], Any]
    lower: Scalar | None = None
    upper: Scalar | None = None

    def __post_init__(self) -> None:
        check_function("schedule", self.schedule)
        bounds = [(n, getattr(self, n)) for n in ("lower", "upper") if getattr(self, n) is not None]
        for name, bound in bounds:
            checks.check_number(name, bound, "finite")
        known = [bound for _, bound in bounds if not checks.is_traced(bound)]
        if not bounds or known != sorted(known):
            raise ValueError(
                f"lower must be at most upper, and one of them given, got {self.lower!r} and "
                f"{self.upper!r}"
            )

    def value(self, t: Any, xp: Any) -> Any:
        return xp.clip(xp.asarray(self.schedule(t), float), self.lower, self.upper)

    def _parts(self) -> list[tuple[Any, int]]:
        return [(self.schedule, 0)]


@frozen
class shifted(KnownSchedule):
    """A schedule that begins ``steps`` later, or is that far ahead if ``steps`` is negative.

    Until it begins it has its first value. What ``schedule.shift(steps)`` makes.

    >>> from cerebras_jax.schedules import linear
    >>> s = linear(0.0, 1.0, 10)
    >>> s.shift(5)(3), s.shift(5)(10), s.shift(-5)(0)
    (0.0, 0.5, 0.5)
    """

    schedule: Callable[[Any], Any]
    steps: int

    def __post_init__(self) -> None:
        check_function("schedule", self.schedule)
        check_whole("steps", self.steps, "finite")

    def value(self, t: Any, xp: Any) -> Any:
        steps = int(self.steps)
        t = xp.maximum(t - steps, 0) if steps > 0 else xp.minimum(t, INT32_MAX + steps) - steps
        return self.schedule(t)

    def _parts(self) -> list[tuple[Any, int]]:
        return [(self.schedule, int(self.steps))]
