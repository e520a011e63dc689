"""Schedules that are formulas."""

from collections.abc import Callable, Sequence
from typing import Any

from cerebras_jax import checks
from cerebras_jax.schedules.arithmetic import (
    INT32_MAX,
    SHAPES,
    as_float,
    cosine,
    line,
    log,
    power,
    progress,
    whole,
)
from cerebras_jax.schedules.base import KnownSchedule
from cerebras_jax.schedules.fields import (
    check_fields,
    check_function,
    check_lengths,
    check_milestones,
    check_whole,
    frozen,
)
from cerebras_jax.types import Scalar


@frozen
class constant(KnownSchedule):
    """``learning_rate`` at every step; ``total_iters`` only tells a sequence how long it lasts.

    >>> constant(0.1)(5)
    0.1
    """

    learning_rate: Scalar
    total_iters: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, learning_rate="finite")
        if self.total_iters is not None:
            check_fields(self, total_iters="> 0")

    def value(self, t: Any, xp: Any) -> Any:
        return self.learning_rate + xp.zeros(xp.shape(t))


@frozen
class polynomial(KnownSchedule):
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
        check_fields(
            self, initial_learning_rate="finite", end_learning_rate="finite", total_iters="> 0"
        )
        check_fields(self, power=">= 0", cycle=bool)

    def value(self, t: Any, xp: Any) -> Any:
        total = whole(self.total_iters)
        if self.cycle:
            total = total * xp.maximum(-(-t // total), 1)
        done, left = progress(t, total, xp)
        if isinstance(self.power, int | float) and self.power == 1:
            return line(self.initial_learning_rate, self.end_learning_rate, done, left, xp)
        running = left > 0
        weight = xp.where(running, xp.where(running, left, 1.0) ** self.power, 0.0)
        return (
            self.initial_learning_rate - self.end_learning_rate
        ) * weight + self.end_learning_rate


@frozen
class linear(KnownSchedule):
    """`polynomial` with power 1: a straight line from initial to end.

    >>> linear(0.0, 0.5, total_iters=10)(5)
    0.25
    """

    initial_learning_rate: Scalar
    end_learning_rate: Scalar
    total_iters: int
    cycle: bool = False

    def __post_init__(self) -> None:
        check_fields(
            self, initial_learning_rate="finite", end_learning_rate="finite", total_iters="> 0"
        )
        check_fields(self, cycle=bool)

    def value(self, t: Any, xp: Any) -> Any:
        ends = (self.initial_learning_rate, self.end_learning_rate)
        return polynomial(*ends, self.total_iters, cycle=self.cycle).value(t, xp)


@frozen
class cosine_decay(KnownSchedule):
    r"""Half a cosine from initial to end in ``total_iters`` steps T, then constant.

    .. math:: end + (initial - end) \cdot \tfrac12 (1 + \cos(\pi \min(t, T) / T))

    >>> cosine_decay(1.0, 0.0, total_iters=10)(10)
    0.0
    """

    initial_learning_rate: Scalar
    end_learning_rate: Scalar
    total_iters: int

    def __post_init__(self) -> None:
        check_fields(
            self, initial_learning_rate="finite", end_learning_rate="finite", total_iters="> 0"
        )

    def value(self, t: Any, xp: Any) -> Any:
        done, left = progress(t, self.total_iters, xp)
        return cosine(self.initial_learning_rate, self.end_learning_rate, done, left, xp)


@frozen
class exponential(KnownSchedule):
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
        check_fields(self, initial_learning_rate="finite", total_iters="> 0")
        check_fields(self, decay_rate=">= 0", staircase=bool)

    def value(self, t: Any, xp: Any) -> Any:
        total = whole(self.total_iters)
        periods = t // total if self.staircase else as_float(t, xp) / total
        return self.initial_learning_rate * power(self.decay_rate, periods, xp)


@frozen
class inverse_exponential_time_decay(KnownSchedule):
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
        check_fields(self, initial_learning_rate="finite", total_iters="> 0")
        check_fields(self, step_exponent=">= 0", decay_rate=">= 0", staircase=bool)

    def value(self, t: Any, xp: Any) -> Any:
        total = whole(self.total_iters)
        if isinstance(self.step_exponent, int | float) and self.step_exponent == 1:
            a = as_float(t // total, xp) if self.staircase else as_float(t, xp) / total
        else:
            a = as_float(t, xp) ** whole(self.step_exponent) / total
            a = xp.floor(a) if self.staircase else a
        return self.initial_learning_rate / (1 + self.decay_rate * a)


@frozen
class inverse_square_root_decay(KnownSchedule):
    r"""Constant for ``warmup_steps``, then falling as the inverse square root of the step.

    .. math:: initial \cdot scale / \sqrt{\max(t, warmup\_steps)}

    >>> inverse_square_root_decay(1.0, scale=2.0, warmup_steps=16)(3)
    0.5
    """

    initial_learning_rate: Scalar = 1.0
    scale: Scalar = 1.0
    warmup_steps: Scalar = 1.0

    def __post_init__(self) -> None:
        check_fields(self, initial_learning_rate="finite", scale="finite", warmup_steps="> 0")

    def value(self, t: Any, xp: Any) -> Any:
        late = xp.maximum(as_float(t, xp), self.warmup_steps)
        return self.initial_learning_rate * self.scale / xp.sqrt(late)


@frozen
class piecewise_constant(KnownSchedule):
    """``learning_rates[j]`` on the j-th interval between milestones.

    >>> s = piecewise_constant([1.0, 0.5, 0.1], milestones=[10, 20])
    >>> s(9), s(10), s(25)
    (1.0, 0.5, 0.1)
    """

    learning_rates: Sequence[Scalar]
    milestones: Sequence[int]

    def __post_init__(self) -> None:
        if not isinstance(self.learning_rates, tuple):
            raise TypeError(
                f"learning_rates must be a list, got {checks.shown(self.learning_rates)}"
            )
        for i, rate in enumerate(self.learning_rates):
            checks.check_number(f"learning_rates[{i}]", rate, "finite")
        check_milestones(self.milestones)
        check_lengths("learning_rates", self.learning_rates, self.milestones)

    def value(self, t: Any, xp: Any) -> Any:
        value = self.learning_rates[0] + xp.zeros(xp.shape(t))
        for milestone, rate in zip(self.milestones, self.learning_rates[1:], strict=True):
            value = xp.where(t >= whole(milestone), rate, value)
        return value


@frozen
class multi_step(KnownSchedule):
    """Times ``gamma`` at every milestone.

    >>> s = multi_step(1.0, gamma=0.5, milestones=[10, 20])
    >>> s(9), s(10), s(20)
    (1.0, 0.5, 0.25)
    """

    initial_learning_rate: Scalar
    gamma: Scalar
    milestones: Sequence[int]

    def __post_init__(self) -> None:
        check_fields(self, initial_learning_rate="finite", gamma=">= 0")
        check_milestones(self.milestones)

    def value(self, t: Any, xp: Any) -> Any:
        passed = sum((as_float(t >= whole(m), xp) for m in self.milestones), start=0.0)
        return self.initial_learning_rate * power(self.gamma, passed + xp.zeros(xp.shape(t)), xp)


@frozen
class step(KnownSchedule):
    """Times ``gamma`` every ``step_size`` steps.

    >>> s = step(1.0, step_size=10, gamma=0.5)
    >>> s(9), s(10), s(20)
    (1.0, 0.5, 0.25)
    """

    initial_learning_rate: Scalar
    step_size: int
    gamma: Scalar

    def __post_init__(self) -> None:
        check_fields(self, initial_learning_rate="finite", step_size="> 0", gamma=">= 0")

    def value(self, t: Any, xp: Any) -> Any:
        return self.initial_learning_rate * power(self.gamma, t // whole(self.step_size), xp)


@frozen
class cosine_annealing(KnownSchedule):
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
        check_fields(self, initial_learning_rate="finite", T_max="> 0", eta_min="finite")

    def value(self, t: Any, xp: Any) -> Any:
        total = whole(self.T_max)
        phase = t % (2 * total)
        done, left = progress(xp.minimum(phase, 2 * total - phase), total, xp)
        return cosine(self.initial_learning_rate, self.eta_min, done, left, xp)


@frozen
class cosine_annealing_warm_restarts(KnownSchedule):
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
        check_fields(self, initial_learning_rate="finite", eta_min="finite")
        check_whole("T_0", self.T_0, ">= 1")
        check_whole("T_mult", self.T_mult, ">= 1")

    def value(self, t: Any, xp: Any) -> Any:
        length = int(self.T_0)
        if self.T_mult == 1:
            done, left = progress(t % length, length, xp)
            return cosine(self.initial_learning_rate, self.eta_min, done, left, xp)
        done, left = progress(t, length, xp)
        start = length
        while start <= INT32_MAX:  # at most 31 restarts fit
            length *= int(self.T_mult)
            next_done, next_left = progress(xp.maximum(t - start, 0), length, xp)
            begun = t >= start
            done, left = xp.where(begun, next_done, done), xp.where(begun, next_left, left)
            start += length
        return cosine(self.initial_learning_rate, self.eta_min, done, left, xp)


@frozen
class multiplicative(KnownSchedule):
    r"""Times ``coefficient`` at every step: :math:`initial \cdot coefficient^t`.

    >>> multiplicative(1.0, coefficient=0.5)(3)
    0.125
    """

    initial_learning_rate: Scalar
    coefficient: Scalar

    def __post_init__(self) -> None:
        check_fields(self, initial_learning_rate="finite", coefficient=">= 0")

    def value(self, t: Any, xp: Any) -> Any:
        return self.initial_learning_rate * power(self.coefficient, t, xp)


@frozen
class cyclic(KnownSchedule):
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
        check_fields(self, base_lr="finite", max_lr="finite", step_size_up="> 0", gamma=">= 0")
        check_fields(self, mode=("triangular", "triangular2", "exp_range"))
        check_fields(self, scale_mode=("cycle", "iterations"))
        if self.step_size_down is not None:
            check_fields(self, step_size_down="> 0")
        if self.scale_fn is not None:
            check_function("scale_fn", self.scale_fn)

    def _parts(self) -> list[tuple[Any, int]]:
        return [] if self.scale_fn is None else [(self.scale_fn, 0)]

    def _turns(self) -> list[Any]:
        up, down = self.step_size_up, self.step_size_down or self.step_size_up
        return [up, up + down, 2 * up + down, 2 * (up + down)]

    def _span(self) -> int:
        return 3 * int(self.step_size_up + (self.step_size_down or self.step_size_up))

    def value(self, t: Any, xp: Any) -> Any:
        up = whole(self.step_size_up)
        down = up if self.step_size_down is None else whole(self.step_size_down)
        phase = t % (up + down)
        height = xp.where(
            phase <= up, as_float(phase, xp) / up, as_float(up + down - phase, xp) / down
        )
        cycle = t // (up + down) + 1
        if self.scale_fn is not None:
            scale = self.scale_fn(as_float(cycle if self.scale_mode == "cycle" else t, xp))
        elif self.mode == "triangular":
            scale = 1.0
        elif self.mode == "triangular2":
            scale = power(0.5, cycle - 1, xp)
        else:
            scale = power(self.gamma, t, xp)
        return self.base_lr + (self.max_lr - self.base_lr) * height * scale


@frozen
class one_cycle(KnownSchedule):
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
        check_fields(self, initial_learning_rate="finite", max_lr="finite", total_steps="> 0")
        check_fields(self, pct_start="in [0, 1]", final_div_factor="> 0", three_phase=bool)
        check_fields(self, anneal_strategy=("cos", "linear"))

    def _turns(self) -> list[Any]:
        top_at = self.pct_start * self.total_steps - 1
        return [top_at, 2 * top_at, self.total_steps - 1]

    def value(self, t: Any, xp: Any) -> Any:
        anneal = cosine if self.anneal_strategy == "cos" else line
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
            done = xp.clip((as_float(t, xp) - begin) / length, 0, 1)
            value = xp.where(t <= end, anneal(first, second, done, 1 - done, xp), value)
        return value


@frozen
class wsd(KnownSchedule):
    r"""Warm-up, stable, decay: a line up, a plateau, and a fall that ends at ``total_iters``.

    With x the fraction done of the decay, the fall from the plateau a to the end b is
    :math:`a (1 - x) + b x` (linear), :math:`a (1 - \sqrt x) + b \sqrt x` (1-sqrt), half a cosine,
    or :math:`a^{1 - x} b^x` (exponential).

    Args:
      learning_rate: of the plateau.
      total_iters: the step at which the decay ends.
      warmup_iters: steps from the initial value to the plateau, >= 0.
      decay_iters: steps from the plateau to the end, > 0.
      end_learning_rate: the last value; exponential needs one above 0.
      decay: the shape of the fall: "linear", "cosine", "1-sqrt" or "exponential".
      initial_learning_rate: the first value.

    References:
      Hu et al., MiniCPM, https://arxiv.org/abs/2404.06395;
      Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations
      (1-sqrt), https://arxiv.org/abs/2405.18392

    >>> s = wsd(1.0, total_iters=100, warmup_iters=10, decay_iters=20)
    >>> s(5), s(10), s(80), s(90), s(100)
    (0.5, 1.0, 1.0, 0.5, 0.0)
    """

    learning_rate: Scalar
    total_iters: int
    warmup_iters: int
    decay_iters: int
    end_learning_rate: Scalar = 0.0
    decay: str = "linear"
    initial_learning_rate: Scalar = 0.0

    def __post_init__(self) -> None:
        check_fields(self, learning_rate="finite", end_learning_rate="finite", decay=tuple(SHAPES))
        check_fields(self, initial_learning_rate="finite", total_iters="> 0")
        check_fields(self, warmup_iters=">= 0", decay_iters="> 0")
        if self.decay == "exponential":
            check_fields(self, learning_rate="> 0", end_learning_rate="> 0")
        steps = (self.warmup_iters, self.decay_iters, self.total_iters)
        if not any(map(checks.is_traced, steps)) and steps[0] + steps[1] > steps[2]:
            raise ValueError(
                "warmup_iters + decay_iters must be at most total_iters, got "
                f"{steps[0]} + {steps[1]} and {steps[2]}"
            )

    def value(self, t: Any, xp: Any) -> Any:
        warm, total, last = map(whole, (self.warmup_iters, self.total_iters, self.decay_iters))
        done, left = progress(t, xp.maximum(warm, 1), xp)
        rise = line(self.initial_learning_rate, self.learning_rate, done, left, xp)
        done, left = progress(t - (total - last), last, xp)
        fall = SHAPES[self.decay](self.learning_rate, self.end_learning_rate, done, left, xp)
        return xp.where(t < warm, rise, fall)

    def _turns(self) -> list[Any]:
        return [self.warmup_iters, self.total_iters - self.decay_iters, self.total_iters]


@frozen
class torch_eps(KnownSchedule):
    r"""The eps that makes Adam and AdamW those of torch: :math:`\epsilon \sqrt{1 - \beta_2^{t+1}}`.

    torch and optax add :math:`\epsilon` after the bias correction of the second moment, and
    `optim.adam` and `optim.adamw` before it. With this schedule they do the same.

    Args:
      eps: the eps of torch.
      beta2: betas[1] of the optimizer.

    >>> from cerebras_jax import optim
    >>> tx = optim.adamw(eps=torch_eps(1e-8, 0.999), weight_decay=1e-2)
    >>> round(torch_eps(1.0, 0.75)(0), 12)
    0.5
    """

    eps: Scalar = 1e-8
    beta2: Scalar = 0.999

    def __post_init__(self) -> None:
        check_fields(self, eps=">= 0", beta2="in [0, 1)")

    def value(self, t: Any, xp: Any) -> Any:
        # log and expm1 keep the digits of 1 - beta2**t where beta2 is near 1
        return self.eps * xp.sqrt(-xp.expm1((as_float(t, xp) + 1) * log(self.beta2, xp)))
