"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cerebras_jax.checks import check, check_flag
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.rule import Rule, add_weight_decay, has_term, per_parameter
from cerebras_jax.types import Array, Number


class SGDState(NamedTuple):
    momentum_buffer: Array | None  # like the parameter; None if momentum is the constant 0


@per_parameter
def sgd(
    lr: Number,
    momentum: Number = 0,
    dampening: Number = 0,
    weight_decay: Number = 0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Rule:
    r"""Stochastic gradient descent, with momentum and Nesterov's variant.

    .. math::

        g &\leftarrow \pm g + \lambda p \\
        b &\leftarrow \mu b + (1 - \tau) g \\
        p &\leftarrow p - \gamma \, (g + \mu b \text{ if nesterov else } b)

    The buffer b starts at zero, so dampening applies to the first step too. torch.optim.SGD
    starts it at the first gradient; optax.sgd has no dampening. Without momentum, b is g.

    Args:
      lr: learning rate :math:`\gamma` >= 0.
      momentum: :math:`\mu` >= 0. A constant 0 allocates no buffer.
      dampening: :math:`\tau`, a finite number.
      weight_decay: L2 penalty :math:`\lambda` >= 0, added to the gradient.
      nesterov: look ahead along the buffer; needs momentum > 0 and dampening = 0.
      maximize: ascend instead of descend.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Sutskever et al., On the importance of initialization and momentum in deep learning,
      https://proceedings.mlr.press/v28/sutskever13.html

    >>> tx = sgd(lr=0.1, momentum=0.9)
    >>> params = jnp.array([1.0, 2.0])
    >>> updates, state = tx.update(jnp.array([1.0, -1.0]), tx.init(params), params)
    >>> updates
    Array([-0.1,  0.1], dtype=float32)
    >>> state.states.momentum_buffer
    Array([ 1., -1.], dtype=float32)
    """
    check("lr", lr, ">= 0")
    check("momentum", momentum, ">= 0")
    check("dampening", dampening, "finite")
    check("weight_decay", weight_decay, ">= 0")
    check_flag("nesterov", nesterov)
    check_flag("maximize", maximize)
    if nesterov and not has_term(momentum):
        raise ValueError(f"nesterov needs momentum > 0, got momentum={momentum!r}")
    if nesterov and isinstance(dampening, int | float) and dampening != 0:
        raise ValueError(f"nesterov needs dampening == 0, got dampening={dampening!r}")

    def init(p: Array) -> SGDState:
        return SGDState(jnp.zeros_like(p) if has_term(momentum) else None)

    def update(g: Array, s: SGDState, t: Array, p: Array) -> tuple[Array, SGDState]:
        g = add_weight_decay(-g if maximize else g, weight_decay, p)
        if s.momentum_buffer is None:
            return -lr * g, s
        b = momentum * s.momentum_buffer + (1 - dampening) * g
        return -lr * (g + momentum * b if nesterov else b), SGDState(b)

    return Rule(init, update, elementwise=True)


class SGD(Optimizer.of(sgd)):
    states_to_sparsify = ("momentum_buffer",)
