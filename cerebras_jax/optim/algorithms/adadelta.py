"""Adadelta."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cerebras_jax.checks import check, check_flag
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.rule import Rule, add_weight_decay, per_parameter
from cerebras_jax.types import Array, Number


class AdadeltaState(NamedTuple):
    square_avg: Array  # running average of squared gradients, like the parameter
    acc_delta: Array  # running average of squared steps, like the parameter


@per_parameter
def adadelta(
    lr: Number = 1.0,
    rho: Number = 0.9,
    eps: Number = 1e-6,
    weight_decay: Number = 0,
    maximize: bool = False,
) -> Rule:
    r"""Adadelta: steps in the units of the parameter, from two running averages.

    .. math::

        g &\leftarrow \pm g + \lambda p \\
        s &\leftarrow \rho s + (1 - \rho) g^2 \\
        \delta &= \frac{\sqrt{a + \epsilon}}{\sqrt{s + \epsilon}} \, g \\
        a &\leftarrow \rho a + (1 - \rho) \delta^2 \\
        p &\leftarrow p - \gamma \delta

    As in torch.optim.Adadelta and optax.adadelta.

    Args:
      lr: factor of the step :math:`\gamma` >= 0.
      rho: decay rate of both averages, in [0, 1].
      eps: :math:`\epsilon` >= 0.
      weight_decay: L2 penalty :math:`\lambda` >= 0, added to the gradient.
      maximize: ascend instead of descend.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Zeiler, ADADELTA, https://arxiv.org/abs/1212.5701

    >>> tx = adadelta(rho=0.0, eps=1.0)
    >>> params = jnp.array([1.0])
    >>> tx.update(jnp.array([0.0]), tx.init(params), params)[0]
    Array([-0.], dtype=float32)
    """
    check("lr", lr, ">= 0")
    check("rho", rho, "in [0, 1]")
    check("eps", eps, ">= 0")
    check("weight_decay", weight_decay, ">= 0")
    check_flag("maximize", maximize)

    def init(p: Array) -> AdadeltaState:
        return AdadeltaState(jnp.zeros_like(p), jnp.zeros_like(p))

    def update(g: Array, s: AdadeltaState, t: Array, p: Array) -> tuple[Array, AdadeltaState]:
        g = add_weight_decay(-g if maximize else g, weight_decay, p)
        square_avg = rho * s.square_avg + (1 - rho) * g * g
        delta = jnp.sqrt(s.acc_delta + eps) / jnp.sqrt(square_avg + eps) * g
        acc_delta = rho * s.acc_delta + (1 - rho) * delta * delta
        return -lr * delta, AdadeltaState(square_avg, acc_delta)

    return Rule(
        init,
        update,
        written_last=("acc_delta", "square_avg"),
        wide=("square_avg", "acc_delta"),
        elementwise=True,
    )


class Adadelta(Optimizer.of(adadelta)):
    states_to_sparsify = ("square_avg", "acc_delta")
