"""Adagrad."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cerebras_jax.checks import check, check_flag
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.rule import Rule, add_weight_decay, per_parameter
from cerebras_jax.types import Array, Number


class AdagradState(NamedTuple):
    sum: Array  # sum of squared gradients, like the parameter


@per_parameter
def adagrad(
    lr: Number = 1e-2,
    lr_decay: Number = 0,
    weight_decay: Number = 0,
    initial_accumulator_value: Number = 0,
    eps: Number = 1e-6,
    maximize: bool = False,
) -> Rule:
    r"""Adagrad: every coordinate's rate falls with the gradients it has seen.

    .. math::

        g &\leftarrow \pm g + \lambda p \\
        s &\leftarrow s + g^2 \\
        p &\leftarrow p - \frac{\gamma}{1 + (t - 1) \eta} \, \frac{g}{\sqrt{s} + \epsilon}

    As in torch.optim.Adagrad, whose default eps is 1e-10. optax.adagrad puts eps under the root,
    starts s at 0.1, and has neither lr_decay nor weight decay.

    Args:
      lr: learning rate :math:`\gamma` >= 0.
      lr_decay: decay of the learning rate :math:`\eta` >= 0.
      weight_decay: L2 penalty :math:`\lambda` >= 0, added to the gradient.
      initial_accumulator_value: s before the first step, >= 0; its value at construction counts.
      eps: :math:`\epsilon` >= 0.
      maximize: ascend instead of descend.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Duchi et al., Adaptive Subgradient Methods for Online Learning and Stochastic Optimization,
      http://jmlr.org/papers/v12/duchi11a.html

    >>> tx = adagrad(lr=0.5, eps=0.0)
    >>> params = jnp.array([1.0, 1.0])
    >>> tx.update(jnp.array([2.0, -4.0]), tx.init(params), params)[0]
    Array([-0.5,  0.5], dtype=float32)
    """
    check("lr", lr, ">= 0")
    check("lr_decay", lr_decay, ">= 0")
    check("weight_decay", weight_decay, ">= 0")
    check("initial_accumulator_value", initial_accumulator_value, ">= 0")
    check("eps", eps, ">= 0")
    check_flag("maximize", maximize)

    def init(p: Array) -> AdagradState:
        return AdagradState(jnp.full_like(p, initial_accumulator_value))

    def update(g: Array, s: AdagradState, t: Array, p: Array) -> tuple[Array, AdagradState]:
        g = add_weight_decay(-g if maximize else g, weight_decay, p)
        total = s.sum + g * g
        decay = 1 + (t - 1) * lr_decay
        return -lr / decay * g / (jnp.sqrt(total) + eps), AdagradState(total)

    return Rule(init, update, wide=("sum",), elementwise=True)


class Adagrad(Optimizer.of(adagrad, enable_global_step=True)):
    states_to_sparsify = ("sum",)
