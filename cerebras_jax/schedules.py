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
    """Base class. A schedule of one's own is a frozen dataclass that defines ``value``:

    >>> @dataclasses.dataclass(frozen=True)
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
    if xp is np or not isinstance(base, int | float):
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
class exponential(Schedule):
    r"""Times ``decay_rate`` every ``total_iters`` steps T; it does not stop there.

    .. math:: initial \cdot decay\_rate^{t / T}, \quad \lfloor t / T \rfloor \text{ if staircase}

    >>> exponential(1.0, total_iters=10, decay_rate=0.25)(5)
    0.5
    """

    initial_learning_rate: Scalar
    total_iters: int
    decay_rate: Scalar
    staircase: bool = False

    def __post_init__(self) -> None:
        checks.check("initial_learning_rate", self.initial_learning_rate, "finite")
        _check_steps("total_iters", self.total_iters)
        checks.check("decay_rate", self.decay_rate, ">= 0")
        checks.check_flag("staircase", self.staircase)

    def value(self, t: Any, xp: Any) -> Any:
        total = _whole(self.total_iters)
        periods = t // total if self.staircase else _float(t, xp) / total
        return self.initial_learning_rate * _power(self.decay_rate, periods, xp)


@_schedule
class inverse_exponential_time_decay(Schedule):
    r"""Falls as the inverse of a power of the time, as Keras' InverseTimeDecay.

    .. math:: \frac{initial}{1 + decay\_rate \cdot a}, \quad a = t^{step\_exponent} / T

    a is rounded down if staircase.

    >>> inverse_exponential_time_decay(1.0, 1, total_iters=10, decay_rate=0.5)(20)
    0.5
    """

    initial_learning_rate: Scalar
    step_exponent: Scalar
    total_iters: int
    decay_rate: Scalar
    staircase: bool = False

    def __post_init__(self) -> None:
        checks.check("initial_learning_rate", self.initial_learning_rate, "finite")
        checks.check("step_exponent", self.step_exponent, ">= 0")
        _check_steps("total_iters", self.total_iters)
        checks.check("decay_rate", self.decay_rate, ">= 0")
        checks.check_flag("staircase", self.staircase)

    def value(self, t: Any, xp: Any) -> Any:
        total = _whole(self.total_iters)
        if isinstance(self.step_exponent, int | float) and self.step_exponent == 1:
            a = _float(t // total, xp) if self.staircase else _float(t, xp) / total
        else:
            a = _float(t, xp) ** _whole(self.step_exponent) / total
            a = xp.floor(a) if self.staircase else a
        return self.initial_learning_rate / (1 + self.decay_rate * a)


@_schedule
class inverse_square_root_decay(Schedule):
    r"""Constant for ``warmup_steps``, then falling as the inverse square root of the step.

    .. math:: initial \cdot scale / \sqrt{\max(t, warmup\_steps)}

    >>> inverse_square_root_decay(1.0, scale=2.0, warmup_steps=16)(3)
    0.5
    """

    initial_learning_rate: Scalar = 1.0
    scale: Scalar = 1.0
    warmup_steps: Scalar = 1.0

    def __post_init__(self) -> None:
        checks.check("initial_learning_rate", self.initial_learning_rate, "finite")
        checks.check("scale", self.scale, "finite")
        _check_steps("warmup_steps", self.warmup_steps)

    def value(self, t: Any, xp: Any) -> Any:
        late = xp.maximum(_float(t, xp), self.warmup_steps)
        return self.initial_learning_rate * self.scale / xp.sqrt(late)


@_schedule
class piecewise_constant(Schedule):
    """``learning_rates[j]`` on the j-th interval between milestones.

    >>> s = piecewise_constant([1.0, 0.5, 0.1], milestones=[10, 20])
    >>> s(9), s(10), s(25)
    (1.0, 0.5, 0.1)
    """

    learning_rates: Sequence[Scalar]
    milestones: Sequence[int]

    def __post_init__(self) -> None:
        if not isinstance(self.learning_rates, tuple):
            raise TypeError(f"learning_rates must be a list, got {self.learning_rates!r}")
        for i, rate in enumerate(self.learning_rates):
            checks.check(f"learning_rates[{i}]", rate, "finite")
        _check_milestones(self.milestones)
        _check_lengths("learning_rates", self.learning_rates, self.milestones)

    def value(self, t: Any, xp: Any) -> Any:
        value = self.learning_rates[0] + xp.zeros(xp.shape(t))
        for milestone, rate in zip(self.milestones, self.learning_rates[1:], strict=True):
            value = xp.where(t >= _whole(milestone), rate, value)
        return value


@_schedule
class multi_step(Schedule):
    """Times ``gamma`` at every milestone.

    >>> s = multi_step(1.0, gamma=0.5, milestones=[10, 20])
    >>> s(9), s(10), s(20)
    (1.0, 0.5, 0.25)
    """

    initial_learning_rate: Scalar
    gamma: Scalar
    milestones: Sequence[int]

    def __post_init__(self) -> None:
        checks.check("initial_learning_rate", self.initial_learning_rate, "finite")
        checks.check("gamma", self.gamma, ">= 0")
        _check_milestones(self.milestones)

    def value(self, t: Any, xp: Any) -> Any:
        passed = sum((_float(t >= _whole(m), xp) for m in self.milestones), start=0.0)
        return self.initial_learning_rate * _power(self.gamma, passed + xp.zeros(xp.shape(t)), xp)


@_schedule
class step(Schedule):
    """Times ``gamma`` every ``step_size`` steps.

    >>> s = step(1.0, step_size=10, gamma=0.5)
    >>> s(9), s(10), s(20)
    (1.0, 0.5, 0.25)
    """

    initial_learning_rate: Scalar
    step_size: int
    gamma: Scalar

    def __post_init__(self) -> None:
        checks.check("initial_learning_rate", self.initial_learning_rate, "finite")
        _check_steps("step_size", self.step_size)
        checks.check("gamma", self.gamma, ">= 0")

    def value(self, t: Any, xp: Any) -> Any:
        return self.initial_learning_rate * _power(self.gamma, t // _whole(self.step_size), xp)


@_schedule
class cosine_annealing(Schedule):
    r"""A whole cosine: down to ``eta_min`` in ``T_max`` steps, up again in the next.

    .. math:: \eta_{min} + (initial - \eta_{min}) \cdot \tfrac12 (1 + \cos(\pi t / T_{max}))

    >>> s = cosine_annealing(1.0, T_max=10)
    >>> s(0), s(10), s(20)
    (1.0, 0.0, 1.0)
    """

    initial_learning_rate: Scalar
    T_max: int
    eta_min: Scalar = 0.0

    def __post_init__(self) -> None:
        checks.check("initial_learning_rate", self.initial_learning_rate, "finite")
        _check_steps("T_max", self.T_max)
        checks.check("eta_min", self.eta_min, "finite")

    def value(self, t: Any, xp: Any) -> Any:
        total = _whole(self.T_max)
        phase = t % (2 * total)
        done, left = _progress(xp.minimum(phase, 2 * total - phase), total, xp)
        return _cosine(self.initial_learning_rate, self.eta_min, done, left, xp)


@_schedule
class cosine_annealing_warm_restarts(Schedule):
    r"""SGDR: half a cosine, again and again, each ``T_mult`` times as long as the one before.

    .. math:: \eta_{min} + (initial - \eta_{min}) \cdot \tfrac12
        (1 + \cos(\pi T_{cur} / T_i))

    >>> s = cosine_annealing_warm_restarts(1.0, T_0=10, T_mult=2)
    >>> [round(s(t), 6) for t in (0, 5, 10, 20, 30)]
    [1.0, 0.5, 1.0, 0.5, 1.0]
    """

    initial_learning_rate: Scalar
    T_0: int
    T_mult: int = 1
    eta_min: Scalar = 0.0

    def __post_init__(self) -> None:
        checks.check("initial_learning_rate", self.initial_learning_rate, "finite")
        _check_whole("T_0", self.T_0)
        _check_whole("T_mult", self.T_mult)
        checks.check("eta_min", self.eta_min, "finite")

    def value(self, t: Any, xp: Any) -> Any:
        length = int(self.T_0)
        if self.T_mult == 1:
            done, left = _progress(t % length, length, xp)
            return _cosine(self.initial_learning_rate, self.eta_min, done, left, xp)
        done, left = _progress(t, length, xp)
        start = length
        while start <= _INT32_MAX:  # at most 31 restarts fit
            length *= int(self.T_mult)
            next_done, next_left = _progress(xp.maximum(t - start, 0), length, xp)
            begun = t >= start
            done, left = xp.where(begun, next_done, done), xp.where(begun, next_left, left)
            start += length
        return _cosine(self.initial_learning_rate, self.eta_min, done, left, xp)


@_schedule
class multiplicative(Schedule):
    r"""Times ``coefficient`` at every step: :math:`initial \cdot coefficient^t`.

    >>> multiplicative(1.0, coefficient=0.5)(3)
    0.125
    """

    initial_learning_rate: Scalar
    coefficient: Scalar

    def __post_init__(self) -> None:
        checks.check("initial_learning_rate", self.initial_learning_rate, "finite")
        checks.check("coefficient", self.coefficient, ">= 0")

    def value(self, t: Any, xp: Any) -> Any:
        return self.initial_learning_rate * _power(self.coefficient, t, xp)


def _thirtieth(t: Any) -> Any:
    return t / 30


def _decay_95(t: Any) -> Any:
    return 0.95**t


@_schedule
class product_of_lambdas(Schedule):
    r"""An initial value times functions of the step: :math:`initial \cdot \prod_i f_i(t)`.

    The initial value enters once. The default functions are the documented pair of the
    original: t / 30 and 0.95^t.

    >>> product_of_lambdas(2.0, [lambda t: t / 10])(5)
    1.0
    """

    initial_learning_rate: Scalar
    lambdas: Sequence[Callable[[Any], Any]] = (_thirtieth, _decay_95)

    def __post_init__(self) -> None:
        checks.check("initial_learning_rate", self.initial_learning_rate, "finite")
        if callable(self.lambdas):
            object.__setattr__(self, "lambdas", (self.lambdas,))
        _check_schedules(self.lambdas, "lambdas")

    def value(self, t: Any, xp: Any) -> Any:
        value = self.initial_learning_rate + xp.zeros(xp.shape(t))
        for f in self.lambdas:
            value = value * f(_float(t, xp))
        return value


@_schedule
class cyclic(Schedule):
    r"""Up and down between two values, with an amplitude that may shrink.

    ``step_size_up`` steps from base_lr to max_lr and ``step_size_down`` back. The amplitude of
    cycle c = 1, 2, ... is multiplied by 1 (triangular), :math:`2^{1-c}` (triangular2) or
    :math:`gamma^t` (exp_range).

    Args:
      base_lr: lower value.
      max_lr: upper value.
      step_size_up: steps up.
      step_size_down: steps down; by default as many as up.
      mode: "triangular", "triangular2" or "exp_range".
      gamma: of exp_range.
      scale_mode: "cycle" or "iterations": what a ``scale_fn`` is a function of.
      scale_fn: a function for the amplitude in place of the mode's.

    References:
      Smith, Cyclical Learning Rates for Training Neural Networks,
      https://arxiv.org/abs/1506.01186

    >>> s = cyclic(0.0, 1.0, step_size_up=10, mode="triangular2")
    >>> s(5), s(10), s(15), s(30)
    (0.5, 1.0, 0.5, 0.5)
    """

    base_lr: Scalar
    max_lr: Scalar
    step_size_up: int = 2000
    step_size_down: int | None = None
    mode: str = "triangular"
    gamma: Scalar = 1.0
    scale_mode: str = "cycle"
    scale_fn: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        checks.check("base_lr", self.base_lr, "finite")
        checks.check("max_lr", self.max_lr, "finite")
        _check_steps("step_size_up", self.step_size_up)
        if self.step_size_down is not None:
            _check_steps("step_size_down", self.step_size_down)
        _check_choice("mode", self.mode, ("triangular", "triangular2", "exp_range"))
        checks.check("gamma", self.gamma, ">= 0")
        _check_choice("scale_mode", self.scale_mode, ("cycle", "iterations"))

    def value(self, t: Any, xp: Any) -> Any:
        up = _whole(self.step_size_up)
        down = up if self.step_size_down is None else _whole(self.step_size_down)
        phase = t % (up + down)
        height = xp.where(phase <= up, _float(phase, xp) / up, _float(up + down - phase, xp) / down)
        cycle = t // (up + down) + 1
        if self.scale_fn is not None:
            scale = self.scale_fn(_float(cycle if self.scale_mode == "cycle" else t, xp))
        elif self.mode == "triangular":
            scale = 1.0
        elif self.mode == "triangular2":
            scale = _power(0.5, cycle - 1, xp)
        else:
            scale = _power(self.gamma, t, xp)
        return self.base_lr + (self.max_lr - self.base_lr) * height * scale


@_schedule
class one_cycle(Schedule):
    r"""The 1cycle policy: up to max_lr, then down to far below the start, then constant.

    With N = ``total_steps`` the phases end at pct_start N - 1 and N - 1; with three_phase at
    pct_start N - 1, 2 pct_start N - 2 and N - 1, through the initial value. The last value is
    initial / final_div_factor.

    Args:
      initial_learning_rate: the start; torch's max_lr / div_factor.
      max_lr: the top.
      total_steps: N.
      pct_start: the fraction of the steps that go up, in [0, 1].
      final_div_factor: initial / the last value.
      three_phase: return to the start before the last descent.
      anneal_strategy: "cos" or "linear".

    References:
      Smith and Topin, Super-Convergence, https://arxiv.org/abs/1708.07120

    >>> s = one_cycle(0.1, 1.0, total_steps=11, pct_start=0.5, anneal_strategy="linear")
    >>> s(0), round(s(10), 7)
    (0.1, 1e-05)
    """

    initial_learning_rate: Scalar
    max_lr: Scalar
    total_steps: int = 1000
    pct_start: Scalar = 0.3
    final_div_factor: Scalar = 1e4
    three_phase: bool = False
    anneal_strategy: str = "cos"

    def __post_init__(self) -> None:
        checks.check("initial_learning_rate", self.initial_learning_rate, "finite")
        checks.check("max_lr", self.max_lr, "finite")
        _check_steps("total_steps", self.total_steps)
        checks.check("pct_start", self.pct_start, "in [0, 1]")
        checks.check("final_div_factor", self.final_div_factor, "> 0")
        checks.check_flag("three_phase", self.three_phase)
        _check_choice("anneal_strategy", self.anneal_strategy, ("cos", "linear"))

    def value(self, t: Any, xp: Any) -> Any:
        anneal = _cosine if self.anneal_strategy == "cos" else _linear
        start, top = self.initial_learning_rate, self.max_lr
        last = start / self.final_div_factor
        top_at, last_at = self.pct_start * self.total_steps - 1, self.total_steps - 1
        phases = [(0, top_at, start, top), (top_at, last_at, top, last)]
        if self.three_phase:
            back_at = 2 * self.pct_start * self.total_steps - 2
            phases[1:] = [(top_at, back_at, top, start), (back_at, last_at, start, last)]
        value = last
        for begin, end, first, second in reversed(phases):
            length = xp.maximum(end - begin, 1e-9)  # of an empty phase
            done = xp.clip((_float(t, xp) - begin) / length, 0, 1)
            value = xp.where(t <= end, anneal(first, second, done, 1 - done, xp), value)
        return value


@_schedule
class chained(Schedule):
    r"""The first schedule times the others, each relative to its own initial value.

    .. math:: s_0(t) \prod_{i \ge 1} s_i(t) / s_i^{initial}

    The initial value is the schedule's ``initial_learning_rate``, or its value at step 0.

    >>> s = chained([linear(1.0, 0.5, 10), exponential(0.1, 10, 0.5)])
    >>> s(10)
    0.25
    """

    schedules: Sequence[Callable[[Any], Any]]

    def __post_init__(self) -> None:
        _check_schedules(self.schedules)
        for i, schedule in enumerate(self.schedules[1:], start=1):
            initial = initial_value(schedule)
            if checks.is_number(initial) and not checks.is_traced(initial) and initial == 0:
                raise ValueError(
                    f"schedules[{i}] must start above 0 to be relative to its start, got "
                    f"{schedule!r}"
                )

    def value(self, t: Any, xp: Any) -> Any:
        value = self.schedules[0](t)
        for schedule in self.schedules[1:]:
            value = value * schedule(t) / initial_value(schedule)
        return value


def initial_value(schedule: Callable[[Any], Any]) -> Any:
    """A schedule's own initial value, or its value at step 0."""
    own = getattr(schedule, "initial_learning_rate", None)
    return schedule(0) if own is None else own


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


def _check_schedules(schedules: Any, name: str = "schedules") -> None:
    if not isinstance(schedules, tuple) or not schedules:
        raise TypeError(f"{name} must be a list of at least one function, got {schedules!r}")
    for i, schedule in enumerate(schedules):
        if not callable(schedule):
            raise TypeError(f"{name}[{i}] must be a schedule, got {schedule!r}")


def _check_whole(name: str, value: Any) -> None:
    checks.check(name, value, ">= 1")
    if checks.is_traced(value) or float(value) != int(value):
        raise ValueError(f"{name} must be a whole number, got {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def span(schedule: Any) -> int | None:
    """How many steps a schedule takes before it repeats or stands still; None if it never does."""
    if isinstance(schedule, sequential):
        last = span(schedule.schedules[-1])
        start = schedule.milestones[-1] if schedule.milestones else 0
        return int(start + (last or max(start // 4, 1)))
    if isinstance(schedule, scaled):
        return span(schedule.schedule)
    if isinstance(schedule, chained):
        return max((span(s) or 0 for s in schedule.schedules), default=0) or None
    if isinstance(schedule, cyclic):
        return 3 * int(schedule.step_size_up + (schedule.step_size_down or schedule.step_size_up))
    milestones = getattr(schedule, "milestones", None)
    if milestones:
        return int(milestones[-1] * 1.25)
    for name, periods in _SPANS.items():
        total = getattr(schedule, name, None)
        if isinstance(total, int | float):
            return int(total * periods)
    return None


_SPANS = {
    "total_iters": 1,
    "total_steps": 1,
    "T_max": 2,
    "T_0": 4,
    "step_size": 4,
    "warmup_steps": 10,
}
