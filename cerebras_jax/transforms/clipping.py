"""Bounds of gradients: of their global norm, and of every element."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from cerebras_jax.checks import check, is_number
from cerebras_jax.types import Array, Scalar


def sum_of_squares(tree: Any) -> Array:
    """Sum of ``|x|**2`` over all elements of all leaves, in at least float32.

    Args:
      tree: arrays of any shape and dtype, None among them.

    Returns:
      A float32 scalar, float64 if a leaf is; 0 of no leaves.

    >>> sum_of_squares({"a": jnp.array([3.0 + 4.0j]), "b": None})
    Array(25., dtype=float32)
    """
    total = jnp.zeros((), jnp.float32)
    for x in jax.tree.leaves(tree):
        x = jnp.asarray(x)
        for part in (x.real, x.imag) if jnp.iscomplexobj(x) else (x,):
            total += jnp.sum(jnp.square(part.astype(jnp.promote_types(part.dtype, jnp.float32))))
    return total


def global_norm(grads: Any) -> Array:
    """Euclidean norm of all elements of a tree together, in at least float32.

    A float16 tree has a norm beyond 65504, a bfloat16 one has 24 bits of it; ``optax.global_norm``
    computes in the leaves' own dtype. Squares above float32's range make it inf.

    Args:
      grads: arrays of any shape and dtype, None among them.

    Returns:
      A float32 scalar, float64 if a leaf is; 0 of no leaves; NaN or inf if an element is.

    >>> global_norm([jnp.full((4,), 60000, jnp.float16), None])
    Array(120000., dtype=float32)
    """
    return jnp.sqrt(sum_of_squares(grads))


def clip_factor(norm: Array, max_norm: Scalar | None) -> Array:
    """What to multiply gradients with so that their norm is at most ``max_norm``.

    Exactly 1 where it already is, NaN if the norm is.
    """
    if max_norm is None:
        return jnp.ones((), norm.dtype)
    max_norm = jnp.asarray(max_norm, norm.dtype)
    return jnp.where(norm <= max_norm, 1, max_norm / norm)


def clip_gradients(grads: Any, factor: Array | None, max_value: Scalar | None) -> Any:
    """Multiplies by ``factor``, then bounds every element; computed in at least float32.

    Dtypes stay. A factor of 1 changes no bit, except that XLA's CPU backend takes subnormal
    numbers for zeros, as it does in every rule; a select that spared them would not be fused.
    """

    def clip_real(x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if factor is not None:
            wide = wide * factor.astype(wide.dtype)
        if max_value is not None:
            bound = jnp.asarray(max_value, wide.dtype)
            wide = jnp.clip(wide, -bound, bound)
        return wide.astype(x.dtype)

    def clip_leaf(x: Any) -> Array:
        x = jnp.asarray(x)
        if jnp.iscomplexobj(x):
            return jax.lax.complex(clip_real(x.real), clip_real(x.imag))
        return clip_real(x)

    if factor is None and max_value is None:
        return grads
    return jax.tree.map(clip_leaf, grads)


def clipped(grads: Any, max_norm: Scalar | None, max_value: Scalar | None) -> Any:
    """The gradients within the bounds: of their global norm, then of every element; see `clip`."""
    factor = None if max_norm is None else clip_factor(global_norm(grads), max_norm)
    return clip_gradients(grads, factor, max_value)


def bounded(
    tx: optax.GradientTransformation, max_norm: Scalar | None, max_value: Scalar | None
) -> optax.GradientTransformationExtraArgs:
    """Gives clipped gradients to a pair, whose state stays its own; see `clip`."""
    inner = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return inner.update(clipped(updates, max_norm, max_value), state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def check_bounds(max_norm: Any, max_value: Any) -> None:
    """Refuses bounds that are not positive numbers; None is no bound."""
    for name, bound in (("max_gradient_norm", max_norm), ("max_gradient_value", max_value)):
        if bound is not None:
            if not is_number(bound):
                raise TypeError(f"{name} must be a number or None, got {bound!r}")
            check(name, bound, "> 0")


def clip(
    max_norm: Scalar | None = None, max_value: Scalar | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Clips gradients by their global norm, then element by element.

    .. math::

        g \leftarrow \min(1, \text{max\_norm} / \lVert g \rVert) \, g, \qquad
        g \leftarrow \min(\max(g, -\text{max\_value}), \text{max\_value})

    The norm and the products are computed in at least float32 and every gradient keeps its dtype;
    None stays None; gradients within the bounds keep every bit. A complex element is bounded in
    its real and in its imaginary part. If the norm is NaN, so is every clipped element;
    `skip_nonfinite` keeps such a step away.

    As ``torch.nn.utils.clip_grad_norm_``, which divides by the norm plus 1e-6 and so clips to
    slightly less; ``optax.clip_by_global_norm`` computes the norm in the gradients' own dtype.

    Args:
      max_norm: bound of the global norm, > 0; a number or a tracer; None: no bound.
      max_value: bound of the absolute value of every element, > 0; likewise.

    Returns:
      An optax pair without state.

    Raises:
      TypeError: if a bound is not a number.
      ValueError: if a bound is not positive.

    >>> tx = clip(max_norm=1.0)
    >>> tx.update({"w": jnp.array([3.0, 4.0])}, tx.init(None))[0]
    {'w': Array([0.6, 0.8], dtype=float32)}
    """
    check_bounds(max_norm, max_value)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return clipped(updates, max_norm, max_value), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
