"""Cautious steps: only where the step still agrees with the gradient of the moment."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from cerebras_jax.types import Array

DECAYS = ("masked", "kept", "cautious")


def cautious(
    inner: optax.GradientTransformation, decay: str = "masked"
) -> optax.GradientTransformationExtraArgs:
    r"""Drops the elements of a step that go against the gradient, and scales up the others.

    .. math::

        u \leftarrow u \, \frac{m}{\max(\operatorname{mean}(m), 10^{-3})}, \qquad
        m = [u g < 0]

    u is what inner adds to the parameter, and the mean is that of one parameter. The state is
    inner's own. Where a gradient is None, u stays.

    Args:
      inner: an optax pair.
      decay: what happens to decoupled weight decay: "masked": it is a part of u; "kept": it is
        applied as it is; "cautious": it is applied where it agrees with the step, :math:`u p < 0`.
        For the last two, inner's update must take ``weight_decay`` as a keyword, as those of this
        package do; what a decay of 0 takes away is the decay.

    Raises:
      ValueError: if decay is none of the three, or inner takes no keywords but needs to.

    References:
      Liang et al., Cautious Optimizers, https://arxiv.org/abs/2411.16085; Chen et al., Cautious
      Weight Decay, https://arxiv.org/abs/2510.12402

    >>> from cerebras_jax import optim
    >>> tx = cautious(optim.sgd(lr=1.0, momentum=0.9))
    >>> params = jnp.zeros(2)
    >>> _, state = tx.update(jnp.array([1.0, 1.0]), tx.init(params), params)
    >>> tx.update(jnp.array([1.0, -0.5]), state, params)[0]
    Array([-3.8,  0. ], dtype=float32)
    """
    if decay not in DECAYS:
        raise ValueError(f"decay must be one of {[*DECAYS]}, got {decay!r}")
    if decay != "masked" and not isinstance(inner, optax.GradientTransformationExtraArgs):
        raise ValueError(f"decay={decay!r} needs an update that takes weight_decay as a keyword")
    extended = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        grads = updates
        whole, new_state = extended.update(grads, state, params, **extra)
        if decay == "masked":
            return _map(_cautious_step, whole, grads), new_state
        steps, _ = extended.update(grads, state, params, **{**extra, "weight_decay": 0.0})

        def combine(u: Array, g: Array, all_of_it: Array, p: Array) -> Array:
            decayed = all_of_it - u
            if decay == "cautious":
                decayed = jnp.where(_is_opposite(u, p), decayed, 0)
            return _cautious_step(u, g) + decayed

        return _map(combine, steps, grads, whole, params), new_state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _map(fn: Any, updates: Any, grads: Any, *rest: Any) -> Any:
    """Maps over the leaves that have a gradient; the update of the others stays."""
    return jax.tree.map(
        lambda u, g, *more: u if g is None else fn(u, g, *more),
        updates,
        grads,
        *rest,
        is_leaf=lambda x: x is None,
    )


def _cautious_step(u: Array, g: Array) -> Array:
    is_kept = _is_opposite(u, g)
    share = jnp.mean(is_kept, dtype=jnp.promote_types(u.real.dtype, jnp.float32))
    return jnp.where(is_kept, u / jnp.maximum(share, 1e-3), 0).astype(u.dtype)


def _is_opposite(u: Array, x: Array) -> Array:
    """Whether u leads against x, by signs, as products may underflow."""
    if jnp.iscomplexobj(u):
        return (u * jnp.conj(x)).real < 0
    return jnp.sign(u) * jnp.sign(x) < 0
