"""Exact top-k without sorting: bisection over the bits of the scores.

Every pass is one comparison and one sum, so k may be traced, an array stays sharded as it is,
and the result is the same on any number of devices.
"""

from typing import Any

import jax
import jax.numpy as jnp

from cerebras_jax.types import Array


def codes_of(score: Array, eligible: Array | None = None) -> Array:
    """Unsigned integers in the order of ``|score|``, NaN like 0; 0 where not eligible.

    Args:
      score: any floating point or complex array.
      eligible: bool, like ``score``: entries that may be chosen; None: all.

    >>> codes_of(jnp.array([-2.0, 0.0, 1.0])) > 1
    Array([ True, False,  True], dtype=bool)
    """
    size = jnp.abs(score)
    size = jnp.where(jnp.isnan(size), 0, size)
    size = size.astype(jnp.promote_types(size.dtype, jnp.float32))  # exact
    unsigned = jnp.uint32 if size.dtype.itemsize == 4 else jnp.uint64
    codes = jax.lax.bitcast_convert_type(size, unsigned) + 1
    return codes if eligible is None else jnp.where(eligible, codes, 0)


@jax.jit
def top_k(codes: Array, k: Any) -> Array:
    """A mask of the k largest codes; among equal ones the lower index is chosen.

    Args:
      codes: unsigned integers of any shape; an entry with code 0 is never chosen.
      k: how many, an integer or a traced one.

    >>> top_k(codes_of(jnp.array([[1.0, 2.0], [0.0, -1.0]])), 2)
    Array([[ True,  True],
           [False, False]], dtype=bool)
    """
    k = jnp.asarray(k, jnp.int32)
    bits = 8 * codes.dtype.itemsize

    def set_bit(i: Array, kth: Array) -> Array:
        candidate = kth | (jnp.ones((), codes.dtype) << (bits - 1 - i).astype(codes.dtype))
        return jnp.where(_count(codes >= candidate) >= k, candidate, kth)

    kth = jax.lax.fori_loop(0, bits, set_bit, jnp.zeros((), codes.dtype))
    above = codes > kth
    return above | _first(k - _count(above), (codes == kth) & (codes > 0))


def _first(n: Array, candidates: Array) -> Array:
    """The first n of the candidates, in the order of their index."""
    index = _index(candidates.shape)
    size = jnp.asarray(candidates.size, jnp.int32)
    all_fit = _count(candidates) <= n  # as if there are no ties

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = _count(candidates & (index < middle)) >= n
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    start = (jnp.where(all_fit, size, 0), size)
    end, _ = jax.lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, start)
    return candidates & (index < end)


def _index(shape: tuple[int, ...]) -> Array:
    """The position of every entry in row-major order."""
    index, stride = jnp.zeros(shape, jnp.int32), 1
    for axis in reversed(range(len(shape))):
        index += stride * jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        stride *= shape[axis]
    return index


def _count(mask: Array) -> Array:
    return jnp.sum(mask, dtype=jnp.int32)
