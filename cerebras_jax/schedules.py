"""Schedules: pure functions from the step 0, 1, 2, ... to a number.

A schedule is a value: hashable, comparable, printable, and callable.

>>> s = cosine_decay(initial_learning_rate=1e-3, end_learning_rate=1e-5, total_iters=1000)
>>> s
cosine_decay(initial_learning_rate=0.001, end_learning_rate=1e-05, total_iters=1000)
>>> s(0), s(1000)
(0.001, 1e-05)

Called with a Python int or a NumPy array of steps it computes on the host in float64; called
with a JAX array or a tracer it is part of the program, in float32 (float64 under x64). Every
schedule is an optax schedule: ``optax.adamw(s)`` and ``optim.adamw(lr=s)`` both work.

Differences of steps are taken in integers before anything is rounded to float32, so that a
decay over 18,773,260 steps loses nothing.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from cerebras_jax import checks
from cerebras_jax.types import Scalar

_INT32_MAX = np.iinfo(np.int32).max


class Schedule:
    """Base class. A schedule of one's own defines fields and ``value``:

    >>> @_schedule
    ... class halving(Schedule):
    ...     initial: float
    ...     def value(self, t, xp):
    ...         return self.initial * 0.5 ** xp.asarray(t, float)
    >>> halving(8.0)(3)
    1.0
    """

    def value(self, t: Any, xp: Any) -> Any:
        """The schedule at step(s) ``t``, with the functions of ``xp``: numpy or jax.numpy."""
        raise NotImplementedError

    def __call__(self, step: Any) -> Any:
        """The value at ``step``: a float for an int, else an array of step's shape."""
        on_device = isinstance(step, jax.Array) or any(
            isinstance(x, jax.Array) for x in jax.tree.leaves(list(vars(self).values()))
        )
        if on_device:
            return jnp.asarray(self.value(jnp.asarray(step), jnp), float)
        value = np.asarray(self.value(np.asarray(step), np), float)
        return float(value) if value.ndim == 0 else value

    def __mul__(self, factor: Scalar) -> "scaled":
        return scaled(self, factor)

    __rmul__ = __mul__

    def plot(self, steps: int | None = None, ax: Any = None, label: str | None = None) -> Any:
        """Draws the schedule over ``range(steps)`` and returns the matplotlib axes.

        Args:
          steps: how many steps to draw; by default what the schedule spans, or 1000.
          ax: the axes to draw into; by default new ones.
          label: the curve's label; by default the schedule itself.
        """
        from matplotlib import pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(6, 2.5), layout="constrained")
        steps = steps or span(self) or 1000
        t = np.unique(np.linspace(0, steps, 2001).astype(int))
        ax.plot(t, self(t), label=label or repr(self))
        ax.set_xlabel("step")
        ax.margins(x=0)
        return ax

    def _repr_html_(self) -> str:
        """A small curve for Jupyter; without matplotlib the text."""
        import html
        import io

        text = f"<code>{html.escape(repr(self))}</code>"
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return text
        figure = Figure(figsize=(4, 1.5), layout="constrained")
        self.plot(ax=figure.subplots())
        svg = io.StringIO()
        figure.savefig(svg, format="svg")
        return f"<div>{text}</div>{svg.getvalue()[svg.getvalue().index('<svg') :]}"


@dataclass_transform(frozen_default=True)
def _schedule(cls: type) -> Any:
    """A frozen dataclass whose sequences are tuples and whose NumPy scalars are Python's."""
    check = cls.__dict__.get("__post_init__")

    def __post_init__(self: Any) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        if check is not None:
            check(self)

    cls.__post_init__ = __post_init__  # pyright: ignore
    return dataclasses.dataclass(frozen=True)(cls)


def _plain(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return tuple(_plain(v) for v in x)
    return x.item() if isinstance(x, np.generic | np.ndarray) and x.shape == () else x


# --- arithmetic that loses nothing ----------------------------------------------------------------


def _float(x: Any, xp: Any) -> Any:
    return xp.asarray(x, float)


def _whole(x: Any) -> Any:
    """A number of steps as an int where int32 holds it, so that differences are exact."""
    if isinstance(x, float) and x.is_integer():
        x = int(x)
    return float(x) if isinstance(x, int) and abs(x) > _INT32_MAX else x


def _progress(t: Any, total: Any, xp: Any) -> tuple[Any, Any]:
    """(fraction done, fraction left) of ``total`` steps, each exact to rounding, in [0, 1]."""
    total = _whole(total)
    done = xp.clip(t, 0, total)
    return _float(done, xp) / total, _float(total - done, xp) / total


def _power(base: Any, exponent: Any, xp: Any) -> Any:
    """base**exponent for base >= 0; the logarithm of a constant is taken in float64."""
    exponent = _float(exponent, xp)
    if not isinstance(base, int | float):
        return xp.power(base, exponent)
    if base == 0:
        return xp.where(exponent == 0, 1.0, 0.0)
    return xp.exp(exponent * math.log(base))


def _cosine(start: Any, end: Any, done: Any, left: Any, xp: Any) -> Any:
    """Half a cosine from start to end, as sin^2 of both fractions: accurate at both ends."""
    return start * xp.sin(np.pi / 2 * left) ** 2 + end * xp.sin(np.pi / 2 * done) ** 2


def _linear(start: Any, end: Any, done: Any, left: Any, xp: Any) -> Any:
    return start * left + end * done


def _check_steps(name: str, value: Any) -> None:
    checks.check(name, value, "> 0")


def _check_milestones(milestones: Sequence[Any]) -> None:
    if not isinstance(milestones, tuple):
        raise TypeError(f"milestones must be a list of steps, got {milestones!r}")
    for i, m in enumerate(milestones):
        checks.check(f"milestones[{i}]", m, ">= 0")
    if any(a >= b for a, b in itertools.pairwise(milestones)):
        raise ValueError(f"milestones must be increasing, got {list(milestones)}")


def _check_lengths(name: str, values: Sequence[Any], milestones: Sequence[Any]) -> None:
    if len(values) != len(milestones) + 1:
        raise ValueError(
            f"{name} must be one more than milestones, got {len(values)} and {len(milestones)}"
        )


# --- the family -----------------------------------------------------------------------------------


@_schedule
class constant(Schedule):
    """``learning_rate`` at every step; ``total_iters`` only tells a sequence how long it lasts.

    >>> constant(0.1)(5)
    0.1
    """

    learning_rate: Scalar
    total_iters: int | None = None

    def __post_init__(self) -> None:
        checks.check("learning_rate", self.learning_rate, "finite")
        if self.total_iters is not None:
            _check_steps("total_iters", self.total_iters)

    def value(self, t: Any, xp: Any) -> Any:
        return self.learning_rate + xp.zeros(xp.shape(t))


@_schedule
class polynomial(Schedule):
    r"""From initial to end in ``total_iters`` steps T, along a power of the fraction left.

    .. math:: (1 - t/T)^{power} \, (initial - end) + end \quad (t < T), \quad end \quad (t \ge T)

    With ``cycle``, T is multiplied by the whole number of periods begun (at least 1), as in
    Keras' PolynomialDecay: the rate jumps up after every period.

    >>> polynomial(1.0, 0.0, total_iters=10, power=2.0)(5)
    0.25
    """

    initial_learning_rate: Scalar
    end_learning_rate: Scalar
    total_iters: int
    power: Scalar = 1.0
    cycle: bool = False

    def __post_init__(self) -> None:
        _check_ends(self)
        checks.check("power", self.power, ">= 0")
        checks.check_flag("cycle", self.cycle)

    def value(self, t: Any, xp: Any) -> Any:
        total = _whole(self.total_iters)
        if self.cycle:
            total = total * xp.maximum(-(-t // total), 1)
        done, left = _progress(t, total, xp)
        if isinstance(self.power, int | float) and self.power == 1:
            return _linear(self.initial_learning_rate, self.end_learning_rate, done, left, xp)
        running = left > 0
        weight = xp.where(running, xp.where(running, left, 1.0) ** self.power, 0.0)
        return (
            self.initial_learning_rate - self.end_learning_rate
        ) * weight + self.end_learning_rate


@_schedule
class linear(Schedule):
    """`polynomial` with power 1: a straight line from initial to end.

    >>> linear(0.0, 0.5, total_iters=10)(5)
    0.25
    """

    initial_learning_rate: Scalar
    end_learning_rate: Scalar
    total_iters: int
    cycle: bool = False

    def __post_init__(self) -> None:
        _check_ends(self)
        checks.check_flag("cycle", self.cycle)

    def value(self, t: Any, xp: Any) -> Any:
        line = (self.initial_learning_rate, self.end_learning_rate, self.total_iters)
        return polynomial(*line, cycle=self.cycle).value(t, xp)


def _check_ends(self: Any) -> None:
    checks.check("initial_learning_rate", self.initial_learning_rate, "finite")
    checks.check("end_learning_rate", self.end_learning_rate, "finite")
    _check_steps("total_iters", self.total_iters)


@_schedule
class cosine_decay(Schedule):
    r"""Half a cosine from initial to end in ``total_iters`` steps T, then constant.

    .. math:: end + (initial - end) \cdot \tfrac12 (1 + \cos(\pi \min(t, T) / T))

    >>> cosine_decay(1.0, 0.0, total_iters=10)(10)
    0.0
    """

    initial_learning_rate: Scalar
    end_learning_rate: Scalar
    total_iters: int

    def __post_init__(self) -> None:
        _check_ends(self)

    def value(self, t: Any, xp: Any) -> Any:
        done, left = _progress(t, self.total_iters, xp)
        return _cosine(self.initial_learning_rate, self.end_learning_rate, done, left, xp)


@_schedule
class sequential(Schedule):
    """``schedules[j+1]`` takes over at ``milestones[j]``, and counts its steps from there.

    >>> s = sequential([linear(0.0, 1.0, 10), constant(1.0)], milestones=[10])
    >>> s(5), s(15)
    (0.5, 1.0)
    """

    schedules: Sequence[Callable[[Any], Any]]
    milestones: Sequence[int]

    def __post_init__(self) -> None:
        _check_schedules(self.schedules)
        _check_milestones(self.milestones)
        _check_lengths("schedules", self.schedules, self.milestones)

    def value(self, t: Any, xp: Any) -> Any:
        value = self.schedules[0](t)
        for milestone, schedule in zip(self.milestones, self.schedules[1:], strict=True):
            later = schedule(xp.maximum(t - _whole(milestone), 0))
            value = xp.where(t >= milestone, later, value)
        return value


@_schedule
class scaled(Schedule):
    """A schedule times a number; what ``schedule * number`` makes.

    >>> (constant(0.1) * 0.5)(0)
    0.05
    """

    schedule: Callable[[Any], Any]
    factor: Scalar

    def __post_init__(self) -> None:
        checks.check("factor", self.factor, "finite")

    def value(self, t: Any, xp: Any) -> Any:
        return self.schedule(t) * self.factor


def _check_schedules(schedules: Any) -> None:
    if not isinstance(schedules, tuple) or not schedules:
        raise TypeError(f"schedules must be a list of at least one schedule, got {schedules!r}")
    for i, schedule in enumerate(schedules):
        if not callable(schedule):
            raise TypeError(f"schedules[{i}] must be a schedule, got {schedule!r}")


def span(schedule: Any) -> int | None:
    """How many steps a schedule takes before it repeats or stands still; None if it never does."""
    if isinstance(schedule, sequential):
        last = span(schedule.schedules[-1])
        start = schedule.milestones[-1] if schedule.milestones else 0
        return int(start + (last or max(start // 4, 1)))
    if isinstance(schedule, scaled):
        return span(schedule.schedule)
    total = getattr(schedule, "total_iters", None)
    return int(total) if isinstance(total, int | float) else None
