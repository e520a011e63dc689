"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from cerebras_jax.optim.algorithms.adam_base import AdamBase, adam_base
from cerebras_jax.rule import Rule, per_parameter
from cerebras_jax.types import Number


@per_parameter
def adamw(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    correct_bias: bool = True,
    amsgrad: bool = False,
) -> Rule:
    r"""Adam with decoupled weight decay.

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        u &= \frac{m}{\sqrt{v} + \epsilon} \cdot \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \\
        p &\leftarrow p - \gamma \, (u + \lambda p)

    With amsgrad the denominator has the running maximum of v; without correct_bias the second
    factor of u is 1, as in Hugging Face's AdamW. The arithmetic is `adam_base`'s.

    torch.optim.AdamW and optax.adamw add :math:`\epsilon` after the bias correction of v; here
    it is added before, as Cerebras and Hugging Face do. Their defaults differ too: eps 1e-8, and
    weight_decay 1e-2 (torch) or 1e-4 (optax).

    Args:
      lr: learning rate :math:`\gamma` >= 0.
      betas: decay rates of the moments, each in [0, 1).
      eps: :math:`\epsilon` >= 0.
      weight_decay: decoupled decay :math:`\lambda` >= 0.
      correct_bias: whether to correct the moments' start at zero.
      amsgrad: whether to divide by the running maximum of the second moment.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Loshchilov and Hutter, Decoupled Weight Decay Regularization,
      https://arxiv.org/abs/1711.05101

    >>> import jax.numpy as jnp
    >>> tx = adamw(lr=0.1, eps=0.0, weight_decay=0.5)
    >>> params = {"w": jnp.array([2.0])}
    >>> state = tx.init(params)
    >>> tx.update({"w": jnp.array([3.0])}, state, params)[0]
    {'w': Array([-0.2], dtype=float32)}
    >>> tx.update({"w": jnp.array([3.0])}, state, params, lr=0.2)[0]
    {'w': Array([-0.4], dtype=float32)}
    """
    return adam_base.rule(lr, betas, eps, weight_decay, 0.0, correct_bias, amsgrad)


class AdamW(AdamBase.of(adamw)):
    pass
