"""Adafactor: second moments kept as a row and a column."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cerebras_jax.checks import check, check_flag, check_pair
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.rule import Rule, add_weight_decay, per_parameter, zeros_without_axis
from cerebras_jax.types import Array, Number


class AdafactorState(NamedTuple):
    exp_avg_sq_row: Array | None  # mean square over the last axis, shape[:-1]; rank >= 2
    exp_avg_sq_col: Array | None  # over the one before, shape[:-2] + shape[-1:]; rank >= 2
    exp_avg_sq: Array | None  # second moment, like the parameter; rank < 2
    exp_avg: Array | None  # average of the steps, like the parameter; None without beta1


@per_parameter
def adafactor(
    lr: Number | None,
    eps: tuple[Number, Number] = (1e-30, 1e-3),
    clip_threshold: Number = 1.0,
    decay_rate: Number = -0.8,
    beta1: Number | None = None,
    weight_decay: Number = 0.0,
    scale_parameter: bool = True,
    relative_step: bool = False,
    warmup_init: bool = False,
) -> Rule:
    r"""Adafactor: Adam's scaling with memory for a row and a column instead of a matrix.

    .. math::

        \hat\beta_t &= 1 - t^{d}, \quad \gamma_t = \gamma \max(\epsilon_2, \mathrm{RMS}(p)) \\
        R &\leftarrow \hat\beta_t R + (1 - \hat\beta_t) \,
            \mathrm{mean}_{-1}(g^2 + \epsilon_1), \quad C \text{ likewise over axis } -2 \\
        u &= g / \sqrt{R \, C / \mathrm{mean}(R)} \\
        u &\leftarrow \gamma_t \, u / \max(1, \mathrm{RMS}(u) / \theta) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) u \\
        p &\leftarrow p - \lambda \gamma_t p - m

    Parameters of rank >= 2 are factored over their last two axes; others keep the whole second
    moment. Without beta1, m is u. Without scale_parameter, :math:`\gamma_t = \gamma`. With
    relative_step, :math:`\gamma = \min(10^{-2}, 1/\sqrt t)`, or
    :math:`\min(10^{-6} t, 1/\sqrt t)` with warmup_init.

    torch.optim.Adafactor takes :math:`\min(\gamma, 1/\sqrt t)` for the rate, does not scale
    weight decay by RMS(p), and clamps where eps is added here. optax.adafactor factors only
    matrices of at least 128 x 128 by default, and does not multiply weight decay by the rate.

    Args:
      lr: learning rate :math:`\gamma` >= 0; None with relative_step.
      eps: :math:`\epsilon_1` (in the second moment) and :math:`\epsilon_2` (of the scale), >= 0.
      clip_threshold: :math:`\theta` > 0, the largest root mean square of u.
      decay_rate: :math:`d` <= 0.
      beta1: decay rate of the average of steps in [0, 1); None: no average.
      weight_decay: :math:`\lambda` >= 0.
      scale_parameter: scale the rate by the parameter's root mean square.
      relative_step: use the rate of the paper instead of lr.
      warmup_init: start that rate near zero; needs relative_step.

    Raises:
      ValueError: if a number is outside its range, or if not exactly one of lr and
        relative_step is given.
      TypeError: at init, for a complex parameter.

    References:
      Shazeer and Stern, Adafactor, https://arxiv.org/abs/1804.04235

    >>> tx = adafactor(lr=0.5, scale_parameter=False)
    >>> params = jnp.ones((2, 3))
    >>> state = tx.init(params)
    >>> state.states.exp_avg_sq_row.shape, state.states.exp_avg_sq_col.shape
    ((2,), (3,))
    >>> tx.update(jnp.full((2, 3), 4.0), state, params)[0]
    Array([[-0.5, -0.5, -0.5],
           [-0.5, -0.5, -0.5]], dtype=float32)
    """
    for name, flag in (
        ("scale_parameter", scale_parameter),
        ("relative_step", relative_step),
        ("warmup_init", warmup_init),
    ):
        check_flag(name, flag)
    if relative_step == (lr is not None):
        raise ValueError(
            f"Adafactor needs either lr or relative_step=True, got lr={lr!r} and "
            f"relative_step={relative_step}"
        )
    if warmup_init and not relative_step:
        raise ValueError("warmup_init needs relative_step=True, got relative_step=False")
    if lr is not None:
        check("lr", lr, ">= 0")
    check_pair("eps", eps, ">= 0", ">= 0")
    check("clip_threshold", clip_threshold, "> 0")
    check("decay_rate", decay_rate, "<= 0")
    if beta1 is not None:
        check("beta1", beta1, "in [0, 1)")
    check("weight_decay", weight_decay, ">= 0")

    def init(p: Array) -> AdafactorState:
        average = jnp.zeros_like(p) if beta1 is not None else None
        if p.ndim < 2:
            return AdafactorState(None, None, jnp.zeros_like(p), average)
        row, col = zeros_without_axis(p, -1), zeros_without_axis(p, -2)
        return AdafactorState(row, col, None, average)

    def update(g: Array, s: AdafactorState, t: Array, p: Array) -> tuple[Array, AdafactorState]:
        new = t**decay_rate  # the weight of this step, 1 - b2, with all its digits
        b2 = 1 - new
        if s.exp_avg_sq is None:
            # Two sums of the same squares, and a sum of squares of u itself, would make XLA keep
            # them in memory: hence the weight inside of a sum, and u under another shape.
            row = b2 * s.exp_avg_sq_row + new * (_mean(g * g, -1) + eps[0])
            col = b2 * s.exp_avg_sq_col + _mean(new * g * g, -2) + new * eps[0]
            row_factor = jax.lax.rsqrt(row / _mean(row, -1)[..., None])[..., None]
            col_factor = jax.lax.rsqrt(col)[..., None, :]
            u, v = g * row_factor * col_factor, None
            u_rms = _rms(g[None] * row_factor * col_factor)
        else:
            row = col = None
            v = b2 * s.exp_avg_sq + new * (g * g + eps[0])
            u = g / jnp.sqrt(v)
            u_rms = _rms(u)
        rate = jnp.minimum(1e-6 * t if warmup_init else 1e-2, 1 / jnp.sqrt(t)) if lr is None else lr
        if scale_parameter:
            rate = rate * jnp.maximum(eps[1], _rms(p))
        u = rate / jnp.maximum(1, u_rms / clip_threshold) * u
        m = None
        if s.exp_avg is not None:
            u = m = beta1 * s.exp_avg + (1 - beta1) * u
        return -add_weight_decay(u, weight_decay * rate, p), AdafactorState(row, col, v, m)

    return Rule(
        init,
        update,
        supports_complex=False,
        wide=("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"),
    )


def _mean(x: Array, axis: int | None) -> Array:
    """The mean; 0 of nothing."""
    n = math.prod(x.shape) if axis is None else x.shape[axis]
    return jnp.sum(x, axis) / float(max(n, 1))  # an int above 2**31 is no int32


def _rms(x: Array) -> Array:
    return jnp.sqrt(_mean(x * x, None))


class Adafactor(Optimizer.of(adafactor, enable_global_step=True)):
    states_to_sparsify = ("exp_avg", "exp_avg_sq")
