"""Adaptive gradient clipping: bounds in proportion to the parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from cerebras_jax.checks import check
from cerebras_jax.types import Array, Scalar


def agc(clipping: Scalar = 0.01, eps: Scalar = 1e-3) -> optax.GradientTransformationExtraArgs:
    r"""Bounds the gradient of every output unit by the norm of the unit's weights.

    .. math::

        g_j \leftarrow g_j \, \min\left(1, \frac{\lambda \max(\lVert p_j \rVert, \epsilon)}
            {\lVert g_j \rVert}\right)

    A unit j is a slice along the last axis, which in flax holds the outputs: a column of a dense
    kernel, a filter of a convolution. A vector or scalar is one unit. Norms are computed in at
    least float32. The paper leaves the output layer alone: see ``optax.masked``.

    As optax.adaptive_grad_clip for arrays of rank 1, 2, 4 and 5; of rank 3 it makes a unit of
    every pair of the last two axes, as in flax's attention, and here they are filters of a 1-D
    convolution.

    Args:
      clipping: :math:`\lambda` > 0; smaller for larger batches.
      eps: :math:`\epsilon` > 0, the least norm of a unit, so that zeros can grow.

    Raises:
      ValueError: if a number is outside its range; from ``update``, without parameters.

    References:
      Brock et al., High-Performance Large-Scale Image Recognition Without Normalization,
      https://arxiv.org/abs/2102.06171

    >>> tx = agc(clipping=0.5)
    >>> params, grads = jnp.eye(2) * 4, jnp.array([[0.0, 1.0], [8.0, 0.0]])
    >>> tx.update(grads, tx.init(params), params)[0]
    Array([[0., 1.],
           [2., 0.]], dtype=float32)
    """
    check("clipping", clipping, "> 0")
    check("eps", eps, "> 0")

    def clip_leaf(g: Array | None, p: Array) -> Array | None:
        if g is None:
            return None
        bound = clipping * jnp.maximum(_unit_norm(p), eps)
        norm = _unit_norm(g)
        factor = jnp.where(norm > bound, bound / norm, 1)
        return (g * factor).astype(g.dtype)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("update needs the parameters: call update(grads, state, params)")
        return jax.tree.map(clip_leaf, updates, params, is_leaf=lambda x: x is None), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _unit_norm(x: Array) -> Array:
    """The norm of every slice along the last axis, broadcast over the others.

    A vector is one unit, also if it has axes of length 1 around it.
    """
    is_vector = sum(n > 1 for n in x.shape) <= 1
    axes = range(x.ndim) if is_vector else range(x.ndim - 1)
    largest = jnp.max(jnp.abs(x), tuple(axes), keepdims=True, initial=0)
    wide = jnp.promote_types(largest.dtype, jnp.float32)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1).astype(wide)
    scaled = jnp.abs(x).astype(wide) / scale  # squares of tiny or huge elements would be lost
    return scale * jnp.sqrt(jnp.sum(scaled * scaled, tuple(axes), keepdims=True))
