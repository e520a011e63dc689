"""RAdam: Adam with a rectified variance."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cerebras_jax.checks import check, check_pair
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.rule import Rule, add_weight_decay, bias_correction, per_parameter
from cerebras_jax.types import Array, Number


class RAdamState(NamedTuple):
    exp_avg: Array  # first moment, like the parameter
    exp_avg_sq: Array  # second moment, like the parameter


class RAdamNow(NamedTuple):
    bias: Array  # 1 - beta1^t
    rectified: Array  # whether the variance can be trusted
    factor: Array  # rectification and bias correction of the second moment


@per_parameter
def radam(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
) -> Rule:
    r"""RAdam: plain momentum until the second moment can be trusted, then Adam.

    .. math::

        g &\leftarrow g + \lambda p \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \rho_\infty &= 2 / (1 - \beta_2) - 1, \quad
        \rho_t = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t) \\
        r_t &= \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}
                          {(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}} \\
        p &\leftarrow p - \gamma \frac{m}{1 - \beta_1^t} \cdot \begin{cases}
            r_t \sqrt{1 - \beta_2^t} / (\sqrt{v} + \epsilon) & \rho_t > 5 \\
            1 & \text{else} \end{cases}

    As in torch.optim.RAdam, whose default eps is 1e-8. optax.radam has a threshold argument and
    adds eps after the bias correction.

    Args:
      lr: learning rate :math:`\gamma` >= 0.
      betas: decay rates of the moments, each in [0, 1).
      eps: :math:`\epsilon` >= 0.
      weight_decay: L2 penalty :math:`\lambda` >= 0, added to the gradient.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Liu et al., On the Variance of the Adaptive Learning Rate and Beyond,
      https://arxiv.org/abs/1908.03265

    >>> tx = radam(lr=0.5)
    >>> params = jnp.array([1.0, 1.0])
    >>> updates, _ = tx.update(jnp.array([3.0, -0.5]), tx.init(params), params)
    >>> updates.round(4)  # momentum at first
    Array([-1.5 ,  0.25], dtype=float32)
    """
    check("lr", lr, ">= 0")
    check_pair("betas", betas, "in [0, 1)", "in [0, 1)")
    check("eps", eps, ">= 0")
    check("weight_decay", weight_decay, ">= 0")
    b1, b2 = betas

    def init(p: Array) -> RAdamState:
        return RAdamState(jnp.zeros_like(p), jnp.zeros_like(p))

    def tick(clock: tuple, t: Array) -> tuple[RAdamNow, tuple]:
        rho_inf = 2 / (1 - b2) - 1
        rho = _rho(b2, t)
        rectified = rho > 5
        ratio = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
        factor = jnp.sqrt(jnp.where(rectified, ratio, 1) * bias_correction(b2, t))
        return RAdamNow(bias_correction(b1, t), rectified, factor), clock

    def update(g: Array, s: RAdamState, now: RAdamNow, p: Array) -> tuple[Array, RAdamState]:
        g = add_weight_decay(g, weight_decay, p)
        m = b1 * s.exp_avg + (1 - b1) * g
        v = b2 * s.exp_avg_sq + (1 - b2) * g * g
        adapted = jnp.where(now.rectified, now.factor / (jnp.sqrt(v) + eps), 1)
        return -lr * (m / now.bias) * adapted, RAdamState(m, v)

    return Rule(init, update, (), tick, wide=("exp_avg_sq",), elementwise=True)


def _rho(b2: Number, t: Array) -> Array:
    r""":math:`\rho_t` without the cancellation of its two terms, which are near 2000.

    With :math:`y = -\log \beta_2` and Langevin's function :math:`L(z) = \coth z - 1/z`,
    :math:`\rho_t = L(y/2) + t (1 - L(t y / 2))`.
    """
    y = -jnp.log(b2)
    z = t * y / 2
    late = 2 / y - 2 * t / jnp.expm1(2 * z)  # the second term where L(z) is near 1
    return _langevin(y / 2) + jnp.where(z < 0.5, t * (1 - _langevin(z)), late)


def _langevin(z: Array) -> Array:
    small = z < 0.5
    direct = jnp.where(small, 1, z)
    series = z / 3 - z**3 / 45 + 2 * z**5 / 945 - z**7 / 4725 + 2 * z**9 / 93555
    return jnp.where(small, series, 1 / jnp.tanh(direct) - 1 / direct)


class RAdam(Optimizer.of(radam, enable_global_step=True)):
    states_to_sparsify = ("exp_avg", "exp_avg_sq")
