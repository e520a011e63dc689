"""What Adam and AdamW share: the moments, the bias correction, both kinds of decay."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cerebras_jax.checks import check, check_flag, check_pair
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.rule import Rule, add_weight_decay, per_parameter
from cerebras_jax.types import Array, Number


class AdamState(NamedTuple):
    exp_avg: Array  # first moment, like the parameter
    exp_avg_sq: Array  # second moment, like the parameter
    max_exp_avg_sq: Array | None  # running maximum of it; None without amsgrad


class AdamClock(NamedTuple):
    beta1_power: Array  # beta1^t of the coming step t, a running product
    beta2_power: Array  # beta2^t


@per_parameter
def adam_base(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    l2_regularization_rate: Number = 0.0,
    correct_bias: bool = True,
    amsgrad: bool = False,
) -> Rule:
    r"""The common base of Adam and AdamW: decoupled decay and L2 penalty side by side.

    .. math::

        g &\leftarrow g + \lambda_2 p \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        u &= \frac{m}{\sqrt{v} + \epsilon} \cdot \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \\
        p &\leftarrow p - \gamma \, (u + \lambda p)

    With amsgrad the denominator has the running maximum of v. Without correct_bias the second
    factor of u is 1. :math:`\epsilon` is added before the bias correction; torch and optax add
    it after: ours corresponds to theirs times :math:`\sqrt{1 - \beta_2^t}`.

    Args:
      lr: learning rate :math:`\gamma` >= 0.
      betas: decay rates of the moments, each in [0, 1).
      eps: :math:`\epsilon` >= 0.
      weight_decay: decoupled decay :math:`\lambda` >= 0.
      l2_regularization_rate: L2 penalty :math:`\lambda_2` >= 0, added to the gradient.
      correct_bias: whether to correct the moments' start at zero.
      amsgrad: whether to divide by the running maximum of the second moment.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Kingma and Ba, Adam, https://arxiv.org/abs/1412.6980;
      Loshchilov and Hutter, Decoupled Weight Decay Regularization,
      https://arxiv.org/abs/1711.05101;
      Reddi et al., On the Convergence of Adam and Beyond,
      https://openreview.net/forum?id=ryQu7f-RZ

    >>> tx = adam_base(lr=0.1, eps=0.0, weight_decay=0.5)
    >>> params = jnp.array([2.0])
    >>> tx.update(jnp.array([3.0]), tx.init(params), params)[0]
    Array([-0.2], dtype=float32)
    """
    check("lr", lr, ">= 0")
    check_pair("betas", betas, "in [0, 1)", "in [0, 1)")
    check("eps", eps, ">= 0")
    check("weight_decay", weight_decay, ">= 0")
    check("l2_regularization_rate", l2_regularization_rate, ">= 0")
    check_flag("correct_bias", correct_bias)
    check_flag("amsgrad", amsgrad)
    b1, b2 = betas

    def init(p: Array) -> AdamState:
        return AdamState(
            jnp.zeros_like(p), jnp.zeros_like(p), jnp.zeros_like(p) if amsgrad else None
        )

    def tick(clock: AdamClock, t: Array) -> tuple[Array, AdamClock]:
        correction = jnp.sqrt(1 - clock.beta2_power) / (1 - clock.beta1_power)
        return correction, AdamClock(clock.beta1_power * b1, clock.beta2_power * b2)

    def update(g: Array, s: AdamState, correction: Array, p: Array) -> tuple[Array, AdamState]:
        g = add_weight_decay(g, l2_regularization_rate, p)
        m = b1 * s.exp_avg + (1 - b1) * g
        v = b2 * s.exp_avg_sq + (1 - b2) * g * g
        v_max = jnp.maximum(s.max_exp_avg_sq, v) if s.max_exp_avg_sq is not None else None
        u = m / (jnp.sqrt(v if v_max is None else v_max) + eps)
        if correct_bias:
            u = u * correction
        return -lr * add_weight_decay(u, weight_decay, p), AdamState(m, v, v_max)

    if not correct_bias:
        return Rule(init, update, wide=("exp_avg_sq", "max_exp_avg_sq"), elementwise=True)
    return Rule(
        init,
        update,
        AdamClock(b1, b2),
        tick,
        wide=("exp_avg_sq", "max_exp_avg_sq"),
        elementwise=True,
    )


class AdamBase(Optimizer.of(adam_base)):
    states_to_sparsify = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
