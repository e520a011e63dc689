"""Schedules: pure functions from the step 0, 1, 2, ... to a number.

A schedule is a value: hashable, comparable, printable, and callable.

>>> s = cosine_decay(initial_learning_rate=1e-3, end_learning_rate=1e-5, total_iters=1000)
>>> s
cosine_decay(initial_learning_rate=0.001, end_learning_rate=1e-05, total_iters=1000)
>>> s(0), s(1000)
(0.001, 1e-05)

Called with a Python int or a NumPy array of steps it computes on the host in float64; called
with a JAX array or a tracer it is part of the program, in float32 (float64 under x64), and may
differ there in the last bit. Every schedule is an optax schedule: ``optax.adamw(s)`` and
``optim.adamw(lr=s)`` both work.

Differences of steps are taken in integers before anything is rounded to float32, so that a
decay over 18,773,260 steps loses nothing.

NumPy and JAX scalars become Python numbers when the schedule is made; tracers stay. Schedules
are calculated with: ``0.5 * s``, ``a + b``, ``a / b``, ``s.clip(upper=0.1)``, ``s.shift(100)``.
"""

from cerebras_jax.schedules.base import Schedule, clipped, combined, scaled, shifted, span
from cerebras_jax.schedules.compositions import (
    chained,
    initial_value,
    product_of_lambdas,
    sequential,
    warmup,
)
from cerebras_jax.schedules.family import (
    constant,
    cosine_annealing,
    cosine_annealing_warm_restarts,
    cosine_decay,
    cyclic,
    exponential,
    inverse_exponential_time_decay,
    inverse_square_root_decay,
    linear,
    multi_step,
    multiplicative,
    one_cycle,
    piecewise_constant,
    polynomial,
    step,
    torch_eps,
    wsd,
)

__all__ = [
    "Schedule",
    "chained",
    "clipped",
    "combined",
    "constant",
    "cosine_annealing",
    "cosine_annealing_warm_restarts",
    "cosine_decay",
    "cyclic",
    "exponential",
    "initial_value",
    "inverse_exponential_time_decay",
    "inverse_square_root_decay",
    "linear",
    "multi_step",
    "multiplicative",
    "one_cycle",
    "piecewise_constant",
    "polynomial",
    "product_of_lambdas",
    "scaled",
    "sequential",
    "shifted",
    "span",
    "step",
    "torch_eps",
    "warmup",
    "wsd",
]
