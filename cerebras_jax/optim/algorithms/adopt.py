"""ADOPT: Adam with a second moment that does not know the gradient it divides."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cerebras_jax.checks import check, check_flag, check_pair
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.rule import Rule, add_weight_decay, per_parameter
from cerebras_jax.types import Array, Number


class AdoptState(NamedTuple):
    exp_avg: Array  # average of the normalized gradients, like the parameter
    exp_avg_sq: Array  # second moment, like the parameter; at least float32


@per_parameter
def adopt(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.9999),
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    decouple: bool = False,
    clip_exp: Number | None = 0.25,
) -> Rule:
    r"""ADOPT: converges with any :math:`\beta_2`, where Adam needs one that fits the problem.

    .. math::

        u &= \operatorname{clip}(g / \max(\sqrt v, \epsilon),\ -c_t,\ c_t),
            \quad c_t = (t - 1)^\kappa \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) u \\
        p &\leftarrow p - \gamma (m + \lambda p) \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2

    The first step only sets :math:`v = g^2`. Without decouple, weight decay is an L2 penalty
    instead, :math:`g \leftarrow g + \lambda p`. As the authors' implementation; as
    optax.contrib.adopt, which has no weight decay.

    Args:
      lr: learning rate :math:`\gamma` >= 0.
      betas: decay rates of the average and of the second moment, each in [0, 1).
      eps: :math:`\epsilon` >= 0, the least denominator.
      weight_decay: :math:`\lambda` >= 0.
      decouple: whether weight decay is decoupled from the gradient.
      clip_exp: :math:`\kappa` >= 0, power of the bound of u; None: no bound.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Taniguchi et al., ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal Rate,
      https://arxiv.org/abs/2411.02853

    >>> tx = adopt(lr=0.5, betas=(0.0, 0.9999))
    >>> params = jnp.array([1.0])
    >>> updates, state = tx.update(jnp.array([4.0]), tx.init(params), params)
    >>> updates, tx.update(jnp.array([2.0]), state, params)[0]
    (Array([-0.], dtype=float32), Array([-0.25], dtype=float32))
    """
    check("lr", lr, ">= 0")
    check_pair("betas", betas, "in [0, 1)", "in [0, 1)")
    check("eps", eps, ">= 0")
    check("weight_decay", weight_decay, ">= 0")
    check_flag("decouple", decouple)
    if clip_exp is not None:
        check("clip_exp", clip_exp, ">= 0")
    b1, b2 = betas

    def init(p: Array) -> AdoptState:
        wide = jnp.promote_types(p.dtype, jnp.float32)
        return AdoptState(jnp.zeros_like(p), jnp.zeros_like(p, wide))

    def update(g: Array, s: AdoptState, t: Array, p: Array) -> tuple[Array, AdoptState]:
        is_first = t == 1
        if not decouple:
            g = add_weight_decay(g, weight_decay, p)
        # A root without eps in it would be one expression for all results, kept in memory.
        u = g / jnp.maximum(jnp.sqrt(jnp.maximum(s.exp_avg_sq, eps * eps)), eps)
        if clip_exp is not None:
            bound = (t - 1) ** clip_exp
            u = jnp.clip(u, -bound, bound)
        m = jnp.where(is_first, 0, b1 * s.exp_avg + (1 - b1) * u)
        v = jnp.where(is_first, 0, b2) * s.exp_avg_sq + jnp.where(is_first, 1, 1 - b2) * g * g
        step = add_weight_decay(m, weight_decay, p) if decouple else m
        return -jnp.where(is_first, 0, lr) * step, AdoptState(m, v)

    return Rule(
        init, update, written_last=("exp_avg", "exp_avg_sq"), wide=("exp_avg_sq",), elementwise=True
    )


class ADOPT(Optimizer.of(adopt, enable_global_step=True)):
    states_to_sparsify = ("exp_avg", "exp_avg_sq")
