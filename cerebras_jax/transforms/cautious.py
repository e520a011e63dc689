"""Cautious steps: only where the step still agrees with the gradient of the moment."""

from __future__ import annotations

from collections.abc import Callable
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
    if decay != "masked":
        keep = _where_it_agrees if decay == "cautious" else lambda u, decayed, p: decayed
        return _with_decay(inner, lambda u, d, g, p: _cautious_step(u, g) + keep(u, d, p))
    extended = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        whole, new_state = extended.update(updates, state, params, **extra)
        return _map(_cautious_step, whole, updates), new_state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def cautious_decay(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Decays a weight only where the step makes it smaller too; the step itself stays.

    .. math::

        p \leftarrow p + u - \gamma \lambda \, [u p < 0] \, p

    u is the step without decay. The state is inner's own. Where a gradient is None, nothing moves.

    Args:
      inner: an optax pair with decoupled weight decay, whose update takes ``weight_decay`` as a
        keyword, as those of this package do.

    Raises:
      ValueError: if inner takes no keywords.

    References:
      Chen et al., Cautious Weight Decay, https://arxiv.org/abs/2510.12402

    >>> from cerebras_jax import optim
    >>> tx = cautious_decay(optim.lion(lr=1.0, weight_decay=0.5))
    >>> params = jnp.array([2.0, -2.0])
    >>> tx.update(jnp.ones(2), tx.init(params), params)[0]
    Array([-2., -1.], dtype=float32)
    """
    return _with_decay(inner, lambda u, decayed, g, p: u + _where_it_agrees(u, decayed, p))


def _with_decay(
    inner: optax.GradientTransformation, combine: Callable[[Array, Array, Array, Array], Array]
) -> optax.GradientTransformationExtraArgs:
    """Makes updates of step, decay, gradient and parameter; a decay of 0 takes the decay away."""
    if not isinstance(inner, optax.GradientTransformationExtraArgs):
        raise ValueError("inner must be a pair whose update takes weight_decay as a keyword")

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        whole, new_state = inner.update(updates, state, params, **extra)
        steps, _ = inner.update(updates, state, params, **{**extra, "weight_decay": 0.0})
        result = _map(lambda u, g, v, p: combine(u, v - u, g, p), steps, updates, whole, params)
        return result, new_state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _where_it_agrees(u: Array, decayed: Array, p: Array) -> Array:
    return jnp.where(_is_opposite(u, p), decayed, 0)


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
