"""Lamb: Adam with a trust ratio for every parameter."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cerebras_jax.checks import check, check_flag, check_pair
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.rule import Rule, add_weight_decay, per_parameter
from cerebras_jax.types import Array, Number


class LambState(NamedTuple):
    exp_avg: Array  # first moment, like the parameter
    exp_avg_sq: Array  # second moment, like the parameter


@per_parameter
def lamb(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-6,
    weight_decay: Number = 0,
    adam: bool = False,
) -> Rule:
    r"""Lamb: every parameter moves by a length in proportion to its own norm.

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        u &= \frac{m}{\sqrt{v} + \epsilon} + \lambda p \\
        r &= \min(\lVert p \rVert, 10) / \lVert u \rVert, \quad
             1 \text{ if either norm is } 0 \\
        p &\leftarrow p - \gamma r u

    There is no bias correction, and the parameter's norm is clipped at 10. optax.lamb corrects
    the bias and does not clip; torch.optim has none.

    Args:
      lr: learning rate :math:`\gamma` >= 0.
      betas: decay rates of the moments, each in [0, 1).
      eps: :math:`\epsilon` >= 0.
      weight_decay: :math:`\lambda` >= 0, inside the trust ratio.
      adam: always use r = 1, for comparison with Adam.

    Raises:
      ValueError: if a number is outside its range.

    References:
      You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes,
      https://arxiv.org/abs/1904.00962

    >>> tx = lamb(lr=0.5)
    >>> params = jnp.array([3.0, 4.0])
    >>> updates, _ = tx.update(jnp.array([1.0, 0.0]), tx.init(params), params)
    >>> updates  # 0.5 * |params|, along u
    Array([-2.5, -0. ], dtype=float32)
    """
    check("lr", lr, ">= 0")
    check_pair("betas", betas, "in [0, 1)", "in [0, 1)")
    check("eps", eps, ">= 0")
    check("weight_decay", weight_decay, ">= 0")
    check_flag("adam", adam)
    b1, b2 = betas

    def init(p: Array) -> LambState:
        return LambState(jnp.zeros_like(p), jnp.zeros_like(p))

    def update(g: Array, s: LambState, t: Array, p: Array) -> tuple[Array, LambState]:
        m = b1 * s.exp_avg + (1 - b1) * g
        v = b2 * s.exp_avg_sq + (1 - b2) * g * g
        u = add_weight_decay(m / (jnp.sqrt(v) + eps), weight_decay, p)
        if adam:
            return -lr * u, LambState(m, v)
        p_norm = jnp.minimum(jnp.sqrt(jnp.sum(p * p)), 10)
        u_norm = jnp.sqrt(jnp.sum(u * u))
        has_norms = (p_norm > 0) & (u_norm > 0)
        ratio = jnp.where(has_norms, p_norm / jnp.where(has_norms, u_norm, 1), 1)
        return -lr * ratio * u, LambState(m, v)

    return Rule(init, update, wide=("exp_avg_sq",))


class Lamb(Optimizer.of(lamb)):
    states_to_sparsify = ("exp_avg", "exp_avg_sq")
