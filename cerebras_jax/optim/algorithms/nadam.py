"""NAdam: Adam with Nesterov momentum."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cerebras_jax.checks import check, check_pair
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.rule import Rule, add_weight_decay, bias_correction, per_parameter
from cerebras_jax.types import Array, Number


class NAdamState(NamedTuple):
    exp_avg: Array  # first moment, like the parameter
    exp_avg_sq: Array  # second moment, like the parameter


class NAdamClock(NamedTuple):
    mu_product: Array  # product of the momenta of all steps so far


class NAdamNow(NamedTuple):
    of_momentum: Array  # weight of the first moment in the step
    of_gradient: Array  # weight of the gradient in the step
    bias: Array  # 1 - beta2^t


@per_parameter
def nadam(
    lr: Number = 2e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0,
    momentum_decay: Number = 4e-3,
) -> Rule:
    r"""NAdam: Adam that looks one momentum step ahead.

    .. math::

        g &\leftarrow g + \lambda p \\
        \mu_t &= \beta_1 (1 - \tfrac12 \, 0.96^{t \psi}), \quad
            \Pi_t = \mu_1 \cdots \mu_t \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \gamma \, \frac{
            \frac{\mu_{t+1}}{1 - \Pi_{t+1}} m + \frac{1 - \mu_t}{1 - \Pi_t} g}{
            \sqrt{v / (1 - \beta_2^t)} + \epsilon}

    As in torch.optim.NAdam. The original multiplies by :math:`\mu_t` once too often in the first
    denominator. optax.nadam has no momentum decay: it is the limit of a large one.

    Args:
      lr: learning rate :math:`\gamma` >= 0.
      betas: decay rates of the moments, each in [0, 1).
      eps: :math:`\epsilon` >= 0.
      weight_decay: L2 penalty :math:`\lambda` >= 0, added to the gradient.
      momentum_decay: :math:`\psi` >= 0.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Dozat, Incorporating Nesterov Momentum into Adam,
      https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ

    >>> tx = nadam(lr=0.5, betas=(0.0, 0.0), eps=0.0)
    >>> params = jnp.array([1.0, 1.0])
    >>> tx.update(jnp.array([3.0, -0.1]), tx.init(params), params)[0]
    Array([-0.5,  0.5], dtype=float32)
    """
    check("lr", lr, ">= 0")
    check_pair("betas", betas, "in [0, 1)", "in [0, 1)")
    check("eps", eps, ">= 0")
    check("weight_decay", weight_decay, ">= 0")
    check("momentum_decay", momentum_decay, ">= 0")
    b1, b2 = betas

    def init(p: Array) -> NAdamState:
        return NAdamState(jnp.zeros_like(p), jnp.zeros_like(p))

    def tick(clock: NAdamClock, t: Array) -> tuple[NAdamNow, NAdamClock]:
        mu = b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
        mu_next = b1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
        product = clock.mu_product * mu
        now = NAdamNow(
            mu_next / (1 - product * mu_next), (1 - mu) / (1 - product), bias_correction(b2, t)
        )
        return now, NAdamClock(product)

    def update(g: Array, s: NAdamState, now: NAdamNow, p: Array) -> tuple[Array, NAdamState]:
        g = add_weight_decay(g, weight_decay, p)
        m = b1 * s.exp_avg + (1 - b1) * g
        v = b2 * s.exp_avg_sq + (1 - b2) * g * g
        u = (now.of_momentum * m + now.of_gradient * g) / (jnp.sqrt(v / now.bias) + eps)
        return -lr * u, NAdamState(m, v)

    return Rule(init, update, NAdamClock(1.0), tick, wide=("exp_avg_sq",), elementwise=True)


class NAdam(Optimizer.of(nadam, enable_global_step=True)):
    states_to_sparsify = ("exp_avg", "exp_avg_sq")
