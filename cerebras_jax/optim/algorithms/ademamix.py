"""AdEMAMix: AdamW with a second, slow average of the gradients."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cerebras_jax.checks import check, check_pair
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.rule import (
    Rule,
    add_weight_decay,
    bias_correction,
    has_term,
    per_parameter,
)
from cerebras_jax.types import Array, Number


class AdEMAMixState(NamedTuple):
    exp_avg_fast: Array | None  # fast average of the gradients, like the parameter; None: beta1=0
    exp_avg_slow: Array  # slow average of them, like the parameter; at least float32
    exp_avg_sq: Array  # second moment, like the parameter; at least float32


class _Now(NamedTuple):
    correction1: Array
    correction2: Array
    alpha: Array
    beta3: Array


@per_parameter
def ademamix(
    lr: Number = 1e-3,
    betas: tuple[Number, Number, Number] = (0.9, 0.999, 0.9999),
    alpha: Number = 2.0,
    beta3_warmup: Number | None = None,
    alpha_warmup: Number | None = None,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
) -> Rule:
    r"""AdEMAMix: gradients of tens of thousands of steps ago still push.

    .. math::

        m_1 &\leftarrow \beta_1 m_1 + (1 - \beta_1) g \\
        m_2 &\leftarrow \beta_{3,t} m_2 + (1 - \beta_{3,t}) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \gamma \left(\frac{m_1 / (1 - \beta_1^t) + \alpha_t m_2}
            {\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda p\right)

    In the first steps, :math:`\alpha_t` may rise linearly from 0, and the half-life of
    :math:`\beta_{3,t}` linearly from that of :math:`\beta_1`; without it, large alphas diverge.
    As the authors' implementation; as optax.contrib.ademamix, which has alpha=5 and no warm-up.

    Args:
      lr: learning rate :math:`\gamma` >= 0.
      betas: decay rates of the fast average, the second moment and the slow average, each in
        [0, 1).
      alpha: weight of the slow average, >= 0.
      beta3_warmup: steps until :math:`\beta_{3,t}` is what betas says, > 0; None: from the first.
      alpha_warmup: steps until :math:`\alpha_t` is alpha, > 0; None: from the first.
      eps: :math:`\epsilon` >= 0, added after the bias correction.
      weight_decay: decoupled decay :math:`\lambda` >= 0.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Pagliardini et al., The AdEMAMix Optimizer: Better, Faster, Older,
      https://arxiv.org/abs/2409.03137

    >>> tx = ademamix(lr=0.5, betas=(0.0, 0.0, 0.75), eps=0.0)
    >>> params = jnp.array([1.0])
    >>> tx.update(jnp.array([4.0]), tx.init(params), params)[0]  # (4 + 2 * 1) / 4 * 0.5
    Array([-0.75], dtype=float32)
    """
    check("lr", lr, ">= 0")
    check_pair("betas", betas, "in [0, 1)", "in [0, 1)", "in [0, 1)")
    check("alpha", alpha, ">= 0")
    for name, steps in (("beta3_warmup", beta3_warmup), ("alpha_warmup", alpha_warmup)):
        if steps is not None:
            check(name, steps, "> 0")
    check("eps", eps, ">= 0")
    check("weight_decay", weight_decay, ">= 0")
    b1, b2, b3 = betas

    def init(p: Array) -> AdEMAMixState:
        wide = jnp.promote_types(p.dtype, jnp.float32)
        fast = jnp.zeros_like(p) if has_term(b1) else None
        return AdEMAMixState(fast, jnp.zeros_like(p, wide), jnp.zeros_like(p, wide))

    def tick(clock: tuple, t: Array) -> tuple[_Now, tuple]:
        alpha_t = alpha if alpha_warmup is None else alpha * jnp.minimum(1, t / alpha_warmup)
        beta3_t = b3
        if beta3_warmup is not None:
            half_life = _mix(_half_life(b1), _half_life(b3), t / beta3_warmup)
            beta3_t = jnp.where(t < beta3_warmup, 0.5 ** (1 / (half_life + 1)), b3)
        return _Now(1 - b1**t, bias_correction(b2, t), alpha_t, beta3_t), clock

    def update(g: Array, s: AdEMAMixState, now: _Now, p: Array) -> tuple[Array, AdEMAMixState]:
        fast = g if s.exp_avg_fast is None else b1 * s.exp_avg_fast + (1 - b1) * g
        slow = now.beta3 * s.exp_avg_slow + (1 - now.beta3) * g
        v = b2 * s.exp_avg_sq + (1 - b2) * g * g
        u = (fast / now.correction1 + now.alpha * slow) / (jnp.sqrt(v / now.correction2) + eps)
        kept = None if s.exp_avg_fast is None else fast
        return -lr * add_weight_decay(u, weight_decay, p), AdEMAMixState(kept, slow, v)

    return Rule(init, update, tick=tick, wide=("exp_avg_slow", "exp_avg_sq"), elementwise=True)


def _half_life(beta: Number) -> Array:
    """Steps after which a gradient counts half, minus 1; of the authors, with their 1e-8."""
    return jnp.log(0.5) / jnp.log(beta + 1e-8) - 1


def _mix(a: Array, b: Array, share: Array) -> Array:
    return (1 - share) * a + share * b


class AdEMAMix(Optimizer.of(ademamix, enable_global_step=True)):
    states_to_sparsify = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
