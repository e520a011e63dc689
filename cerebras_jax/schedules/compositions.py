"""Schedules made of other functions of the step."""

from collections.abc import Callable, Sequence
from typing import Any

from cerebras_jax import checks
from cerebras_jax.schedules.arithmetic import as_float, whole
from cerebras_jax.schedules.base import KnownSchedule, span
from cerebras_jax.schedules.family import linear
from cerebras_jax.schedules.fields import (
    check_fields,
    check_function,
    check_functions,
    check_lengths,
    check_milestones,
    frozen,
)
from cerebras_jax.types import Scalar


def _thirtieth(t: Any) -> Any:
    return t / 30


def _decay_95(t: Any) -> Any:
    return 0.95**t


@frozen
class product_of_lambdas(KnownSchedule):
    r"""An initial value times functions of the step: :math:`initial \cdot \prod_i f_i(t)`.

    The initial value enters once. The default functions are the documented pair of the
    original: t / 30 and 0.95^t.

    >>> product_of_lambdas(2.0, [lambda t: t / 10])(5)
    1.0
    """

    initial_learning_rate: Scalar
    lambdas: Sequence[Callable[[Any], Any]] = (_thirtieth, _decay_95)

    def __post_init__(self) -> None:
        check_fields(self, initial_learning_rate="finite")
        if callable(self.lambdas):
            object.__setattr__(self, "lambdas", (self.lambdas,))
        check_functions("lambdas", self.lambdas)

    def _parts(self) -> list[tuple[Any, int]]:
        return [(f, 0) for f in self.lambdas]

    def value(self, t: Any, xp: Any) -> Any:
        value = self.initial_learning_rate + xp.zeros(xp.shape(t))
        for f in self.lambdas:
            value = value * f(as_float(t, xp))
        return value


@frozen
class chained(KnownSchedule):
    r"""The first schedule times the others, each relative to its own initial value.

    .. math:: s_0(t) \prod_{i \ge 1} s_i(t) / s_i^{initial}

    The initial value is the schedule's ``initial_learning_rate``, or its value at step 0.

    >>> from cerebras_jax.schedules import exponential
    >>> s = chained([linear(1.0, 0.5, 10), exponential(0.1, 10, 0.5)])
    >>> s(10)
    0.25
    """

    schedules: Sequence[Callable[[Any], Any]]

    def __post_init__(self) -> None:
        check_functions("schedules", self.schedules)
        for i, schedule in enumerate(self.schedules[1:], start=1):
            checks.check_start(f"schedules[{i}]", schedule, "finite")
            initial = initial_value(schedule)
            if checks.is_number(initial) and not checks.is_traced(initial) and initial == 0:
                raise ValueError(
                    f"schedules[{i}] must start above 0 to be relative to its start, got "
                    f"{checks.shown(schedule)}"
                )

    def _parts(self) -> list[tuple[Any, int]]:
        return [(schedule, 0) for schedule in self.schedules]

    def value(self, t: Any, xp: Any) -> Any:
        value = self.schedules[0](t)
        for schedule in self.schedules[1:]:
            value = value * schedule(t) / initial_value(schedule)
        return value


def initial_value(schedule: Callable[[Any], Any]) -> Any:
    """A schedule's own initial value, or its value at step 0."""
    own = getattr(schedule, "initial_learning_rate", None)
    return schedule(0) if own is None else own


@frozen
class sequential(KnownSchedule):
    """``schedules[j+1]`` takes over at ``milestones[j]``, and counts its steps from there.

    >>> from cerebras_jax.schedules import constant
    >>> s = sequential([linear(0.0, 1.0, 10), constant(1.0)], milestones=[10])
    >>> s(5), s(15)
    (0.5, 1.0)
    """

    schedules: Sequence[Callable[[Any], Any]]
    milestones: Sequence[int]

    def __post_init__(self) -> None:
        check_functions("schedules", self.schedules)
        check_milestones(self.milestones)
        check_lengths("schedules", self.schedules, self.milestones)

    def value(self, t: Any, xp: Any) -> Any:
        value = self.schedules[0](t)
        for milestone, schedule in zip(self.milestones, self.schedules[1:], strict=True):
            later = schedule(xp.maximum(t - whole(milestone), 0))
            value = xp.where(t >= milestone, later, value)
        return value

    def _parts(self) -> list[tuple[Any, int]]:
        starts = (0, *map(int, self.milestones))
        return list(zip(self.schedules, starts, strict=True))

    def _span(self) -> int:
        last, start = self._parts()[-1]
        return start + (span(last) or max(start // 4, 1))


def warmup(
    schedule: Callable[[Any], Any], steps: int, initial_learning_rate: Scalar = 0.0
) -> sequential:
    """A line up to where ``schedule`` starts, in ``steps`` steps, and then ``schedule``.

    The schedule counts its steps from the end of the warm-up.

    Args:
      schedule: any function of the step.
      steps: of the warm-up; 0 for none.
      initial_learning_rate: where the line starts.

    >>> from cerebras_jax.schedules import cosine_decay
    >>> s = warmup(cosine_decay(1.0, 0.0, total_iters=100), 10)
    >>> s(0), s(5), s(10), s(110)
    (0.0, 0.5, 1.0, 0.0)
    """
    check_function("schedule", schedule)
    checks.check_start("schedule", schedule, "finite")
    checks.check_number("steps", steps, ">= 0")
    checks.check_number("initial_learning_rate", initial_learning_rate, "finite")
    if not checks.is_traced(steps) and steps == 0:
        return sequential([schedule], [])
    checks.check_number("steps", steps, "> 0")
    return sequential([linear(initial_learning_rate, schedule(0), steps), schedule], [steps])
