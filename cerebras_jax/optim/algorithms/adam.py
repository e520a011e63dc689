"""Adam, with an L2 penalty."""

from __future__ import annotations

from cerebras_jax.checks import check
from cerebras_jax.optim.algorithms.adam_base import AdamBase, adam_base
from cerebras_jax.rule import Rule, per_parameter
from cerebras_jax.types import Number


@per_parameter
def adam(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    amsgrad: bool = False,
) -> Rule:
    r"""Adam: steps scaled by running estimates of the gradient's first two moments.

    .. math::

        g &\leftarrow g + \lambda p \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \gamma \, \frac{m}{\sqrt{v} + \epsilon} \cdot
            \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}

    With amsgrad the denominator has the running maximum of v. The arithmetic is `adam_base`'s.

    Weight decay is an L2 penalty, as in torch.optim.Adam; see `adamw` for decoupled decay.
    torch.optim.Adam and optax.adam add :math:`\epsilon` after the bias correction of v; here it
    is added before, as Cerebras does. Their default eps is 1e-8. optax.amsgrad takes the maximum
    of the bias-corrected v.

    Args:
      lr: learning rate :math:`\gamma` >= 0.
      betas: decay rates of the moments, each in [0, 1).
      eps: :math:`\epsilon` >= 0.
      weight_decay: L2 penalty :math:`\lambda` >= 0, added to the gradient.
      amsgrad: whether to divide by the running maximum of the second moment.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Kingma and Ba, Adam, https://arxiv.org/abs/1412.6980

    >>> import jax.numpy as jnp
    >>> tx = adam(lr=0.1, eps=0.0)
    >>> params = jnp.array([2.0])
    >>> tx.update(jnp.array([3.0]), tx.init(params), params)[0]
    Array([-0.1], dtype=float32)
    """
    check("weight_decay", weight_decay, ">= 0")
    return adam_base.rule(lr, betas, eps, 0.0, weight_decay, True, amsgrad)


class Adam(AdamBase.of(adam)):
    pass
