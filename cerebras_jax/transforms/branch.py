"""One decision for a whole step: take it, or leave everything as it is."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cerebras_jax.checks import is_traced
from cerebras_jax.types import Array


def branch(
    ok: Array,
    take: Callable[[], Any],
    hold: Callable[[], Any],
    updates: Callable[[], Any] | None = None,
) -> Any:
    """``take()`` where ``ok``, else no updates and the state ``hold()``.

    Nothing is computed that is not used, so a NaN on the way not taken reaches nothing. In a
    trace this is one `jax.lax.cond`; eagerly, where a cond would be compiled at every call, it
    waits for ``ok``.

    Args:
      ok: a boolean scalar.
      take: returns (updates, state).
      hold: returns a state of the same structure.
      updates: returns the updates that go with it; by default `no_updates` like those of take.

    Returns:
      (updates, state).
    """
    traced = is_traced(ok)
    if traced:
        take = jax.jit(take)  # traced once, for its shapes and for the cond
    elif ok:
        return take()
    if updates is None:
        shapes, _ = jax.eval_shape(take)
        updates = functools.partial(no_updates, shapes)

    def leave() -> Any:
        return updates(), hold()

    return jax.lax.cond(ok, take, leave) if traced else leave()


def no_updates(shapes: Any) -> Any:
    """Updates that `optax.apply_updates` adds without changing a parameter.

    They are -0.0, because 0.0 would turn a parameter of -0.0 into 0.0. (XLA's CPU backend takes
    subnormal numbers for zeros, in every sum.)
    """

    def fill(like: Any) -> Array:
        is_inexact = jnp.issubdtype(like.dtype, jnp.inexact)
        zero = -0.0 if is_inexact else 0
        if jnp.issubdtype(like.dtype, jnp.complexfloating):
            zero = complex(-0.0, -0.0)
        return jnp.full_like(like, zero)

    return jax.tree.map(fill, shapes)
