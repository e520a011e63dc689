"""Gradient accumulation across calls: one step of the inner optimizer for several gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cerebras_jax.checks import check, is_traced
from cerebras_jax.transforms.branch import branch
from cerebras_jax.types import Array


class EveryState(NamedTuple):
    """State of `every`.

    Attributes:
      inner: the state of the inner optimizer.
      total: the sum of the gradients of this group so far; like the parameters, in at least
        float32. Of no meaning while ``count`` is 0.
      count: int32 scalar, how many they are.
      steps: int32 scalar, the steps of the inner optimizer so far.
    """

    inner: Any
    total: Any
    count: Array
    steps: Array


def every(
    tx: optax.GradientTransformation, k: int | Array | Callable[[Any], Any]
) -> optax.GradientTransformationExtraArgs:
    """Updates on every k-th call only, with the mean of the k gradients.

    The calls between return updates of -0.0, which change no parameter, and leave the inner state
    alone: its clock and its schedules count steps, not calls. The sum is kept in at least float32
    and begins anew after the step, so a NaN ends with its group; around `skip_nonfinite` it costs
    the group and nothing else. None gradients stay None.

    Unlike ``optax.MultiSteps``, the inner update runs only when it is due, and nothing is
    multiplied by zero. Where the whole batch is at hand, `accumulate` needs no memory between
    calls. Extra arguments reach the inner update from the last call of a group.

    Args:
      tx: the inner optimizer.
      k: how many gradients make one step, an integer >= 1, or a schedule of ``steps``.

    Returns:
      An optax pair with an `EveryState`.

    Raises:
      TypeError, ValueError: if k is not such a number.

    >>> tx = every(optax.sgd(1.0), 2)
    >>> state = tx.init(jnp.array([0.0]))
    >>> for g in [1.0, 3.0]:
    ...     updates, state = tx.update(jnp.array([g]), state)
    ...     print(updates)
    [-0.]
    [-2.]
    """
    check("k", k, ">= 1")
    if not callable(k) and not is_traced(k) and k != int(k):
        raise ValueError(f"k must be an integer, got {k!r}")
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> EveryState:
        def zeros(p: Any) -> Array:
            return jnp.zeros_like(p, jnp.promote_types(jnp.asarray(p).dtype, jnp.float32))

        zero = jnp.zeros((), jnp.int32)
        return EveryState(inner.init(params), jax.tree.map(zeros, params), zero, zero)

    def update(
        updates: Any, state: EveryState, params: Any = None, **extra: Any
    ) -> tuple[Any, EveryState]:
        count = state.count + 1

        def add(total: Array, g: Any) -> Array:
            total = jnp.where(state.count > 0, total, 0)  # a select: what is left may be NaN
            return total if g is None else total + g.astype(total.dtype)

        def mean(total: Array, g: Any) -> Array | None:
            return None if g is None else total / count.astype(total.dtype)

        total = jax.tree.map(add, state.total, updates)

        def take() -> tuple[Any, Any]:
            return inner.update(jax.tree.map(mean, total, updates), state.inner, params, **extra)

        due = count >= jnp.asarray(k(state.steps) if callable(k) else k)
        out, new_inner = branch(due, take, lambda: state.inner)
        return out, EveryState(
            inner=new_inner,
            total=total,
            count=jnp.where(due, 0, count),
            steps=state.steps + due,
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
