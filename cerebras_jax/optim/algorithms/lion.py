"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cerebras_jax.checks import check, check_pair
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.rule import Rule, add_weight_decay, per_parameter
from cerebras_jax.types import Array, Number


class LionState(NamedTuple):
    exp_avg: Array  # momentum, like the parameter


@per_parameter
def lion(
    lr: Number = 1e-4,
    betas: tuple[Number, Number] = (0.9, 0.99),
    weight_decay: Number = 0.0,
) -> Rule:
    r"""Lion: steps of one size, in the direction of a sign.

    .. math::

        p &\leftarrow p - \gamma \, (\operatorname{sign}(\beta_1 m + (1 - \beta_1) g) +
            \lambda p) \\
        m &\leftarrow \beta_2 m + (1 - \beta_2) g

    As optax.lion, whose default weight_decay is 1e-3; torch.optim has none.

    Args:
      lr: learning rate :math:`\gamma` >= 0; three to ten times smaller than for AdamW.
      betas: weight of the momentum in the step, and its decay rate, each in [0, 1).
      weight_decay: decoupled decay :math:`\lambda` >= 0.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Chen et al., Symbolic Discovery of Optimization Algorithms,
      https://arxiv.org/abs/2302.06675

    >>> tx = lion(lr=0.5)
    >>> params = jnp.array([1.0, 1.0, 1.0])
    >>> tx.update(jnp.array([3.0, -0.1, 0.0]), tx.init(params), params)[0]
    Array([-0.5,  0.5, -0. ], dtype=float32)
    """
    check("lr", lr, ">= 0")
    check_pair("betas", betas, "in [0, 1)", "in [0, 1)")
    check("weight_decay", weight_decay, ">= 0")
    b1, b2 = betas

    def init(p: Array) -> LionState:
        return LionState(jnp.zeros_like(p))

    def update(g: Array, s: LionState, t: Array, p: Array) -> tuple[Array, LionState]:
        u = jnp.sign(b1 * s.exp_avg + (1 - b1) * g)
        m = b2 * s.exp_avg + (1 - b2) * g
        return -lr * add_weight_decay(u, weight_decay, p), LionState(m)

    return Rule(init, update, written_last=("exp_avg",), elementwise=True)


class Lion(Optimizer.of(lion)):
    states_to_sparsify = ("exp_avg",)
