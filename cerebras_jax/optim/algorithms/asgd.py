"""Averaged stochastic gradient descent."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cerebras_jax.checks import check, check_flag
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.rule import Rule, add_weight_decay, per_parameter
from cerebras_jax.types import Array, Number


class ASGDState(NamedTuple):
    ax: Array  # the averaged parameter, like the parameter


class ASGDClock(NamedTuple):
    eta: Array  # learning rate of the coming step
    mu: Array  # weight of the coming step in the average


@per_parameter
def asgd(
    lr: Number = 1e-2,
    lambd: Number = 1e-4,
    alpha: Number = 0.75,
    t0: Number = 1e6,
    weight_decay: Number = 0,
    maximize: bool = False,
) -> Rule:
    r"""Averaged SGD: plain steps, and beside them the average of where they have been.

    .. math::

        g &\leftarrow \pm g + \lambda_2 p \\
        p &\leftarrow (1 - \lambda \eta) p - \eta g \\
        a &\leftarrow p \text{ if } \mu = 1 \text{ else } a + \mu (p - a) \\
        \eta &\leftarrow \gamma / (1 + \lambda \gamma t)^\alpha \\
        \mu &\leftarrow 1 / \max(1, t - t_0)

    The average is the state ``ax``. The first step uses the eta seeded with the learning rate at
    construction; a new learning rate acts one step later. As in torch.optim.ASGD; optax has none.

    Args:
      lr: learning rate :math:`\gamma` >= 0.
      lambd: decay :math:`\lambda` >= 0.
      alpha: power of the decay of eta, >= 0.
      t0: step :math:`t_0` >= 0 at which averaging starts.
      weight_decay: L2 penalty :math:`\lambda_2` >= 0, added to the gradient.
      maximize: ascend instead of descend.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Polyak and Juditsky, Acceleration of stochastic approximation by averaging,
      https://dl.acm.org/citation.cfm?id=131098

    >>> tx = asgd(lr=0.5, lambd=0.0)
    >>> params = jnp.array([1.0])
    >>> updates, state = tx.update(jnp.array([1.0]), tx.init(params), params)
    >>> updates, state.states.ax
    (Array([-0.5], dtype=float32), Array([0.5], dtype=float32))
    """
    check("lr", lr, ">= 0")
    check("lambd", lambd, ">= 0")
    check("alpha", alpha, ">= 0")
    check("t0", t0, ">= 0")
    check("weight_decay", weight_decay, ">= 0")
    check_flag("maximize", maximize)

    def init(p: Array) -> ASGDState:
        return ASGDState(jnp.zeros_like(p))

    def tick(clock: ASGDClock, t: Array) -> tuple[ASGDClock, ASGDClock]:
        eta = lr / (1 + lambd * lr * t) ** alpha
        return clock, ASGDClock(eta, 1 / jnp.maximum(1, t - t0))

    def update(g: Array, s: ASGDState, now: ASGDClock, p: Array) -> tuple[Array, ASGDState]:
        g = add_weight_decay(-g if maximize else g, weight_decay, p)
        u = -now.eta * (lambd * p + g)
        new = p + u
        ax = jnp.where(now.mu == 1, new, s.ax + (new - s.ax) * now.mu)
        return u, ASGDState(ax)

    return Rule(init, update, ASGDClock(lr, 1.0), tick, elementwise=True)


class ASGD(Optimizer.of(asgd, enable_global_step=True)):
    states_to_sparsify = ("ax",)
