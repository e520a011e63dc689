"""Between float32 and bfloat16, on bits: to nearest, at random, or keeping what is cut off.

XLA may compute ``x.astype(bfloat16).astype(float32)`` as x, and on GPU and TPU it does. So
nothing here depends on such a conversion: a float32 number is its 32 bits, a bfloat16 number the
upper 16 of them. Counted as integers, the bits grow with the magnitude, and a carry out of the
fraction runs into the exponent as it should; the sign is never touched.

NaN is always the quiet NaN without payload. Everything else that float32 has passes: infinities,
denormal numbers, both zeros.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cerebras_jax.types import Array

_INFINITY = np.uint32(0x7F800000)
_NAN = np.uint32(0x7FC00000)
_HALF = np.uint32(0x8000)  # half a step of bfloat16


def split(x: Array) -> tuple[Array, Array]:
    """A float32 array as bfloat16 and the 16 bits that this leaves over; `join` undoes it.

    The first is one of the two bfloat16 numbers next to x, the nearest: ties go away from zero,
    and beyond the largest finite one comes infinity. The second is the signed distance from it
    in units of float32's last place.

    Args:
      x: float32.

    Returns:
      bfloat16 and int16 arrays of x's shape.

    >>> top, low_bits = split(jnp.float32(1 + 2**-10))
    >>> top, low_bits
    (Array(1, dtype=bfloat16), Array(8192, dtype=int16))
    >>> float(join(top, low_bits)) == 1 + 2**-10
    True
    """
    bits = _bits(x)
    low = jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.int16)
    return _upper_half(bits + _HALF), low


def join(x: Array, low_bits: Array) -> Array:
    """The float32 array that `split` took apart.

    Args:
      x: bfloat16.
      low_bits: int16, of x's shape; 0 where x is all there is.
    """
    low = jax.lax.bitcast_convert_type(low_bits.astype(jnp.int32), jnp.uint32)  # keeps its sign
    return jax.lax.bitcast_convert_type(_widened(x) + low, jnp.float32)


def nearest(x: Array) -> Array:
    """A float32 array in bfloat16, rounded to nearest, ties to even: as ``astype`` should.

    >>> nearest(jnp.float32([1 + 2**-8, 1 + 3 * 2**-8]))
    Array([1, 1.01562], dtype=bfloat16)
    """
    bits = _bits(x)
    return _upper_half(bits + (_HALF - 1) + (bits >> 16 & 1))


def stochastic(x: Array, random: Array) -> Array:
    """A float32 array in bfloat16, rounded up or down at random so that its mean is x.

    The probability of a neighbour is the share of the way that x has gone towards it. What
    bfloat16 can represent is not changed. Beyond its largest finite number the upper neighbour
    is infinity.

    Args:
      x: float32.
      random: uint16 of x's shape, uniform: `random_bits`.

    References:
      Gupta et al., Deep Learning with Limited Numerical Precision, https://arxiv.org/abs/1502.02551

    >>> x = jnp.full(3, 1 + 2**-9)  # a quarter of the way from 1 to 1 + 2**-7
    >>> stochastic(x, jnp.array([0, 3 * 2**14 - 1, 3 * 2**14], jnp.uint16))
    Array([1, 1, 1.00781], dtype=bfloat16)
    """
    return _upper_half(_bits(x) + random.astype(jnp.uint32))


def random_bits(
    seed: Any, path: str | np.uint32 | Array, count: Any, shape: tuple[int, ...]
) -> Array:
    """Uniform uint16 that depend on their arguments only: nothing to store, to split or to resume.

    The same on any number of devices, and whatever JAX's default generator is.

    Args:
      seed: an integer.
      path: what tells the draws of one step apart: the dotted path of the array, or its
        `path_number`, which may be traced, so that arrays of one shape share a program.
      count: the number of steps that the parameter has taken.
      shape: of the result.

    >>> again = random_bits(0, path_number("dense.kernel"), 7, (3,))
    >>> bool((random_bits(0, "dense.kernel", 7, (3,)) == again).all())
    True
    """
    if isinstance(path, str):
        path = path_number(path)
    key = jax.random.key(seed, impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, path), count)
    return jax.random.bits(key, shape, jnp.uint16)


def path_number(path: str) -> np.uint32:
    """A number for a path: the CRC-32 of its UTF-8 text.

    >>> hex(path_number("123456789"))
    '0xcbf43926'
    """
    return np.uint32(zlib.crc32(path.encode()))


def float32_update(new: Array, old: Array) -> Array:
    """The update in float32 that takes a bfloat16 parameter from ``old`` to ``new``.

    ``optax.apply_updates(old, update)`` is ``new`` exactly, unless ``new`` is below 2**-16 of
    ``old``: float32 updates do not reach every such number, and this one misses by at most
    2**-24 of ``old``. An update in bfloat16 misses by more, and often. Whatever comes after it
    in a chain must leave it alone.

    Args:
      new: bfloat16.
      old: bfloat16, of the same shape.
    """
    return _as_float32(new) - _as_float32(old)


def _bits(x: Array) -> Array:
    """The bits of a float32 array, with one NaN only."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits & 0x7FFFFFFF > _INFINITY, _NAN, bits)


def _upper_half(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _widened(x: Array) -> Array:
    """The bits of a bfloat16 array as those of a float32 one."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16


def _as_float32(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(_widened(x), jnp.float32)
