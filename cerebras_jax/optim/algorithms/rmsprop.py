"""RMSprop."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cerebras_jax.checks import check, check_flag
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.rule import Rule, add_weight_decay, has_term, per_parameter
from cerebras_jax.types import Array, Number


class RMSpropState(NamedTuple):
    square_avg: Array  # running average of squared gradients, like the parameter
    momentum_buffer: Array | None  # like the parameter; None if momentum is the constant 0
    grad_avg: Array | None  # running average of gradients; None unless centered


@per_parameter
def rmsprop(
    lr: Number = 1e-2,
    alpha: Number = 0.99,
    eps: Number = 1e-8,
    weight_decay: Number = 0,
    momentum: Number = 0,
    centered: bool = False,
) -> Rule:
    r"""RMSprop: gradients divided by the root of their running mean square.

    .. math::

        g &\leftarrow g + \lambda p \\
        s &\leftarrow \alpha s + (1 - \alpha) g^2 \\
        \bar g &\leftarrow \alpha \bar g + (1 - \alpha) g \quad \text{(centered)} \\
        a &= \sqrt{s - \bar g^2} + \epsilon \text{ if centered else } \sqrt{s} + \epsilon \\
        b &\leftarrow \mu b + g / a \\
        p &\leftarrow p - \gamma b

    Without momentum, b is g / a. As in torch.optim.RMSprop. optax.rmsprop puts eps under the
    root, applies the learning rate before the momentum, and has a default decay rate of 0.9.

    Args:
      lr: learning rate :math:`\gamma` >= 0.
      alpha: decay rate of the averages, in [0, 1].
      eps: :math:`\epsilon` >= 0.
      weight_decay: L2 penalty :math:`\lambda` >= 0, added to the gradient.
      momentum: :math:`\mu` >= 0. A constant 0 allocates no buffer.
      centered: divide by the estimated standard deviation instead.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Tieleman and Hinton, Lecture 6.5 of Neural Networks for Machine Learning,
      https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf;
      Graves, Generating Sequences With Recurrent Neural Networks (centered),
      https://arxiv.org/abs/1308.0850

    >>> tx = rmsprop(lr=0.5, alpha=0.75, eps=0.0)
    >>> params = jnp.array([1.0, 1.0])
    >>> tx.update(jnp.array([3.0, -0.5]), tx.init(params), params)[0]
    Array([-1.,  1.], dtype=float32)
    """
    check("lr", lr, ">= 0")
    check("alpha", alpha, "in [0, 1]")
    check("eps", eps, ">= 0")
    check("weight_decay", weight_decay, ">= 0")
    check("momentum", momentum, ">= 0")
    check_flag("centered", centered)

    def init(p: Array) -> RMSpropState:
        return RMSpropState(
            jnp.zeros_like(p),
            jnp.zeros_like(p) if has_term(momentum) else None,
            jnp.zeros_like(p) if centered else None,
        )

    def update(g: Array, s: RMSpropState, t: Array, p: Array) -> tuple[Array, RMSpropState]:
        g = add_weight_decay(g, weight_decay, p)
        square_avg = alpha * s.square_avg + (1 - alpha) * g * g
        grad_avg, variance = None, square_avg
        if s.grad_avg is not None:
            grad_avg = alpha * s.grad_avg + (1 - alpha) * g
            variance = jnp.maximum(square_avg - grad_avg * grad_avg, 0)  # rounding goes below 0
        scale = jnp.sqrt(variance) + eps
        if s.momentum_buffer is None:
            return -lr * g / scale, RMSpropState(square_avg, None, grad_avg)
        b = momentum * s.momentum_buffer + g / scale
        return -lr * b, RMSpropState(square_avg, b, grad_avg)

    return Rule(init, update, wide=("square_avg",), elementwise=True)


class RMSprop(Optimizer.of(rmsprop)):
    states_to_sparsify = ("square_avg", "momentum_buffer", "grad_avg")
