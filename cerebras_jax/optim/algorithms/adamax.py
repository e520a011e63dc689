"""Adamax: Adam with the infinity norm."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cerebras_jax.checks import check, check_flag, check_pair
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.rule import Rule, add_weight_decay, per_parameter
from cerebras_jax.types import Array, Number


class AdamaxState(NamedTuple):
    exp_avg: Array  # first moment, like the parameter
    exp_inf: Array  # exponentially weighted infinity norm, like the parameter


class AdamaxClock(NamedTuple):
    beta1_power: Array  # beta1^t of the coming step t, a running product


@per_parameter
def adamax(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    maximize: bool = False,
) -> Rule:
    r"""Adamax: Adam with a running maximum in place of the second moment.

    .. math::

        g &\leftarrow \pm g + \lambda p \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        u &\leftarrow \max(\beta_2 u, |g| + \epsilon) \\
        p &\leftarrow p - \frac{\gamma}{1 - \beta_1^t} \, \frac{m}{u}

    As in torch.optim.Adamax, whose default lr is 2e-3 and eps 1e-8. optax.adamax is the same
    without weight decay.

    Args:
      lr: learning rate :math:`\gamma` >= 0.
      betas: decay rates, each in [0, 1).
      eps: :math:`\epsilon` >= 0.
      weight_decay: L2 penalty :math:`\lambda` >= 0, added to the gradient.
      maximize: ascend instead of descend.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Kingma and Ba, Adam, section 7.1, https://arxiv.org/abs/1412.6980

    >>> tx = adamax(lr=0.5, eps=0.0)
    >>> params = jnp.array([1.0, 1.0])
    >>> tx.update(jnp.array([2.0, -4.0]), tx.init(params), params)[0]
    Array([-0.5,  0.5], dtype=float32)
    """
    check("lr", lr, ">= 0")
    check_pair("betas", betas, "in [0, 1)", "in [0, 1)")
    check("eps", eps, ">= 0")
    check("weight_decay", weight_decay, ">= 0")
    check_flag("maximize", maximize)
    b1, b2 = betas

    def init(p: Array) -> AdamaxState:
        return AdamaxState(jnp.zeros_like(p), jnp.zeros_like(p))

    def tick(clock: AdamaxClock, t: Array) -> tuple[Array, AdamaxClock]:
        return 1 - clock.beta1_power, AdamaxClock(clock.beta1_power * b1)

    def update(g: Array, s: AdamaxState, bias: Array, p: Array) -> tuple[Array, AdamaxState]:
        g = add_weight_decay(-g if maximize else g, weight_decay, p)
        m = b1 * s.exp_avg + (1 - b1) * g
        u = jnp.maximum(b2 * s.exp_inf, jnp.abs(g) + eps)
        return -lr * (m / u) / bias, AdamaxState(m, u)

    return Rule(init, update, AdamaxClock(b1), tick, wide=("exp_inf",), elementwise=True)


class Adamax(Optimizer.of(adamax)):
    states_to_sparsify = ("exp_avg", "exp_inf")
