"""Resilient backpropagation."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cerebras_jax.checks import check, check_pair, is_number, is_traced
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.rule import Rule, per_parameter
from cerebras_jax.types import Array, Number


class RpropState(NamedTuple):
    prev: Array  # the last gradient, 0 where the sign changed; like the parameter
    step_size: Array  # of every element, like the parameter


@per_parameter
def rprop(
    lr: Number = 1e-3,
    etas: tuple[Number, Number] = (0.5, 1.2),
    step_sizes: tuple[Number, Number] = (1e-6, 50.0),
) -> Rule:
    r"""Rprop: only signs count; a step grows while its sign holds, and shrinks when it changes.

    .. math::

        \sigma &= \operatorname{sign}(g \cdot g_{prev}) \\
        s &\leftarrow \operatorname{clip}(s \cdot \{\eta_+, \eta_-, 1\}
            \text{ for } \sigma \{> 0, < 0, = 0\},\ s_{min},\ s_{max}) \\
        g &\leftarrow 0 \text{ where } \sigma < 0 \\
        p &\leftarrow p - \operatorname{sign}(g) \, s, \quad g_{prev} \leftarrow g

    ``lr`` only seeds the step sizes: a schedule, or a new value later, has no effect. Meant for
    full batches. As in torch.optim.Rprop; optax.rprop applies each change of a step size one
    call later.

    Args:
      lr: the step size before the first step, >= 0.
      etas: factors (eta_minus in (0, 1), eta_plus > 1).
      step_sizes: smallest and largest step size, each >= 0.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Riedmiller and Braun, A direct adaptive method for faster backpropagation learning: the
      RPROP algorithm, https://doi.org/10.1109/ICNN.1993.298623

    >>> tx = rprop(lr=0.5)
    >>> params = jnp.array([1.0, 1.0])
    >>> updates, state = tx.update(jnp.array([3.0, -0.1]), tx.init(params), params)
    >>> updates
    Array([-0.5,  0.5], dtype=float32)
    >>> tx.update(jnp.array([3.0, 0.1]), state, params)[0]  # faster; and turned back
    Array([-0.6, -0. ], dtype=float32)
    """
    check("lr", lr, ">= 0")
    check_pair("etas", etas, "in (0, 1)", "> 1")
    check_pair("step_sizes", step_sizes, ">= 0", ">= 0")
    smallest, largest = step_sizes
    known = [is_number(x) and not is_traced(x) for x in step_sizes]
    if all(known) and smallest > largest:
        raise ValueError(f"step_sizes must be (smallest, largest), got {(smallest, largest)}")
    shrink, grow = etas

    def init(p: Array) -> RpropState:
        return RpropState(jnp.zeros_like(p), jnp.full_like(p, lr))

    def update(g: Array, s: RpropState, t: Array, p: Array) -> tuple[Array, RpropState]:
        sign = jnp.sign(g * s.prev)
        factor = jnp.where(sign > 0, grow, jnp.where(sign < 0, shrink, 1))
        step_size = jnp.clip(s.step_size * factor, smallest, largest)
        g = jnp.where(sign < 0, 0, g)
        return -jnp.sign(g) * step_size, RpropState(g, step_size)

    return Rule(init, update, written_last=("prev", "step_size"), elementwise=True)


class Rprop(Optimizer.of(rprop)):
    states_to_sparsify = ("prev", "step_size")
