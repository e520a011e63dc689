"""Newton-Schulz iteration: the nearest orthogonal matrix, by matrix products alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cerebras_jax.checks import check
from cerebras_jax.messages import shown
from cerebras_jax.types import Array

Triple = tuple[float | Array, float | Array, float | Array]

# Singular values between 0.001 and 1 (1.02 in rounded arithmetic) end where the comment says.
PRESETS: dict[str, tuple[Triple, ...]] = {
    # 0.47 to 1.20 after 5 steps; https://kellerjordan.github.io/posts/muon/
    "keller": ((3.4445, -4.7750, 2.0315),),
    # 0.86 to 1.14 after 5 steps, the best of five, with a margin of 2 % for rounding; the classic
    # polynomial afterwards. https://arxiv.org/abs/2505.16932
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        (15 / 8, -5 / 4, 3 / 8),
    ),
    # Converges to 1, from 0.001 in 14 steps: p(1) = 1, p'(1) = p''(1) = 0.
    "classic": ((15 / 8, -5 / 4, 3 / 8),),
}


def on_whole_matrices(
    fn: Callable[[Array], Array], x: Array, mesh_axes: str | tuple[str, ...]
) -> Array:
    """Applies ``fn`` where every matrix is on one device, so that it communicates nothing.

    Matrices that are stacked are dealt out along axes of the mesh that `jax.set_mesh` set, in one
    exchange; a single matrix is gathered on all devices.

    Args:
      fn: a function of matrices in the last two axes, which keeps their shape.
      x: the matrices.
      mesh_axes: names of mesh axes.

    Raises:
      ValueError: if no mesh is set, or it lacks an axis.
    """
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    mesh = jax.sharding.get_abstract_mesh()
    if not set(names) <= set(mesh.axis_names):
        raise ValueError(
            f"shard_stack must be axes of the mesh that jax.set_mesh has set, got {names}, the "
            f"mesh has {mesh.axis_names}"
        )
    count = math.prod(x.shape[:-2])
    stack = x.reshape(count, *x.shape[-2:])
    spec = PartitionSpec(names if count > 1 else None, None, None)
    whole = jax.lax.with_sharding_constraint(stack, spec)
    return jax.lax.with_sharding_constraint(fn(whole), spec).reshape(x.shape)


def newton_schulz(x: Array, coefficients: Sequence[Triple], dtype: Any = None) -> Array:
    r"""Drives the singular values of matrices to 1, and leaves their singular vectors alone.

    .. math::

        X_0 = X / \lVert X \rVert_F, \qquad
        X_{k+1} = a_k X_k + b_k X_k X_k^\top X_k + c_k (X_k X_k^\top)^2 X_k

    X is divided by its largest entry first, so that neither tiny nor huge entries are lost in the
    square root of a sum of squares. A matrix of zeros stays one.

    Args:
      x: matrices in the last two axes, of at least float32.
      coefficients: :math:`(a_k, b_k, c_k)` of each step.
      dtype: the type of the factors of the products; sums and results stay in that of x.

    References:
      Björck and Bowie, An Iterative Algorithm for Computing the Best Estimate of an Orthogonal
      Matrix, https://doi.org/10.1137/0708036; Jordan et al., Muon,
      https://kellerjordan.github.io/posts/muon/

    >>> newton_schulz(jnp.diag(jnp.array([3.0, -1e-12])), [(15 / 8, -5 / 4, 3 / 8)] * 5).round(3)
    Array([[ 1.,  0.],
           [ 0., -0.]], dtype=float32)
    """

    def times(a: Array, b: Array) -> Array:
        a, b = (a, b) if dtype is None else (a.astype(dtype), b.astype(dtype))
        return jnp.matmul(a, b, preferred_element_type=x.dtype)

    is_tall = x.shape[-2] > x.shape[-1]
    y = x.mT if is_tall else x
    tiny = jnp.finfo(x.dtype).tiny
    y = y / jnp.maximum(jnp.max(jnp.abs(y), (-2, -1), keepdims=True, initial=0), tiny)
    y = y / jnp.maximum(jnp.sqrt(jnp.sum(y * y, (-2, -1), keepdims=True)), tiny)
    for a, b, c in coefficients:
        square = times(y, y.mT)
        y = a * y + times(b * square + c * times(square, square), y)
    return y.mT if is_tall else y


def steps_of(coefficients: Any, steps: int) -> tuple[Triple, ...]:
    """The coefficients of each step, from a preset's name, one triple, or a triple per step.

    Raises:
      ValueError: if there is no such preset, or not one triple per step.

    >>> steps_of("classic", 2)
    ((1.875, -1.25, 0.375), (1.875, -1.25, 0.375))
    """
    if isinstance(coefficients, str):
        if coefficients not in PRESETS:
            raise ValueError(
                f"ns_coefficients must be one of {[*PRESETS]}, got {shown(coefficients)}"
            )
        triples = PRESETS[coefficients]
        return tuple(triples[min(k, len(triples) - 1)] for k in range(steps))
    if not isinstance(coefficients, tuple | list):
        raise TypeError(f"ns_coefficients must be a name or triples, got {shown(coefficients)}")
    if not any(isinstance(c, tuple | list) for c in coefficients):
        coefficients = [coefficients] * steps
    elif len(coefficients) != steps:
        raise ValueError(
            f"ns_coefficients must be one triple for each of ns_steps={steps}, "
            f"got {len(coefficients)}"
        )
    for k, triple in enumerate(coefficients):
        if not isinstance(triple, tuple | list) or len(triple) != 3:
            raise ValueError(f"ns_coefficients must be triples (a, b, c), got {shown(triple)}")
        for number in triple:
            check(f"ns_coefficients[{k}]", number, "finite")
    return tuple((a, b, c) for a, b, c in coefficients)
