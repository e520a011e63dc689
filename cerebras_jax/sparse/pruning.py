"""Masks of one array: how many entries stay, which ones at first, and which ones next."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cerebras_jax.sparse.topk import codes_of, top_k
from cerebras_jax.types import Array


def kept_count(sparsity: Any, size: int) -> Array:
    """How many of ``size`` entries a sparsity keeps: rounded down in float32, as Cerebras.

    >>> int(kept_count(0.7, 10)), int(kept_count(0.9, 33554434))
    (3, 3355444)
    """
    sparsity = jnp.clip(jnp.asarray(sparsity, jnp.float32), 0, 1)
    return ((1 - sparsity) * jnp.float32(size)).astype(jnp.int32)


def undropped_count(drop_fraction: Any, nonzero: Any, parts: int = 1) -> Array:
    """How many entries of each part stay when a fraction of all that are on is dropped.

    >>> int(undropped_count(0.3, 10)), int(undropped_count(0.2, 5, parts=2))
    (7, 2)
    """
    keep = 1 - jnp.asarray(drop_fraction, jnp.float32)
    each = jnp.asarray(nonzero, jnp.float32)
    return (keep * (each if parts == 1 else each / parts)).astype(jnp.int32)


class Cut(NamedTuple):
    """Consecutive parts along one axis, which compete among themselves only."""

    axis: int
    parts: int


def top_k_of_parts(codes: Array, k: Any, cut: Cut | None) -> Array:
    """`top_k` of the whole array, or of each part of a cut; k is a scalar or one per part."""
    if cut is None:
        return top_k(codes, k)
    parts = _split(codes, cut)
    chosen = jax.vmap(top_k)(parts, jnp.broadcast_to(k, parts.shape[:1]))
    front = jnp.moveaxis(codes, cut.axis, 0).shape
    return jnp.moveaxis(chosen.reshape(front), 0, cut.axis)


def _split(x: Array, cut: Cut) -> Array:
    return jnp.moveaxis(x, cut.axis, 0).reshape(cut.parts, -1)


def _part_size(p: Any, cut: Cut | None) -> int:
    return math.prod(p.shape) // (1 if cut is None else cut.parts)


# --- the first mask -------------------------------------------------------------------------------


def random(p: Array, sparsity: float, key: Array, cut: Cut | None) -> Array:
    """Which entries stay is random, how many is not."""
    return top_k_of_parts(random_codes(p, key), kept_count(sparsity, _part_size(p, cut)), cut)


def largest(p: Array, sparsity: float, key: Array, cut: Cut | None) -> Array:
    """The entries of largest magnitude stay."""
    return top_k_of_parts(codes_of(p), kept_count(sparsity, _part_size(p, cut)), cut)


def from_zeros(p: Array, sparsity: float, key: Array, cut: Cut | None) -> Array:
    """The zeros of the parameter are what is pruned; the sparsity is not looked at."""
    return p != 0


def checkerboard(p: Array, sparsity: float, key: Array, cut: Cut | None) -> Array:
    """A regular pattern along the last axis, in a matrix shifted from row to row.

    As Cerebras: an array that is not a matrix has the same pattern in every row.
    """
    if p.ndim == 0:
        raise ValueError("init_method 'checkerboard' needs an axis, got shape ()")
    density = 1 - sparsity
    if density <= 0:
        return jnp.zeros(p.shape, bool)
    column = jax.lax.broadcasted_iota(jnp.int32, p.shape, p.ndim - 1)
    if p.ndim == 2:
        shift = math.floor(1 / density - 1e-5)
        length = p.shape[1] + math.ceil(p.shape[1] / density + 1e-5) - 1
        row = jax.lax.broadcasted_iota(jnp.int32, p.shape, 0)
        column = (column + row * shift) % length
    steps = [jnp.floor(x.astype(jnp.float32) * density + 1e-5) for x in (column, column + 1)]
    return steps[0] != steps[1]


INIT_METHODS: dict[str, Callable[[Array, float, Array, Cut | None], Array]] = {
    "random": random,
    "topk": largest,
    "from_zeros": from_zeros,
    "checkerboard": checkerboard,
}


# --- the next mask --------------------------------------------------------------------------------


def drop(p: Array, mask: Array, drop_fraction: Any, cut: Cut | None) -> Array:
    """The mask without the entries of smallest magnitude; a pruned entry is never kept."""
    parts = 1 if cut is None else cut.parts
    k = undropped_count(drop_fraction, jnp.sum(mask, dtype=jnp.int32), parts)
    return top_k_of_parts(codes_of(p, mask), k, cut)


def grow(codes: Array, mask: Array, sparsity: Any, cut: Cut | None) -> Array:
    """The mask and as many of the other entries, of the highest codes, as the sparsity allows."""
    if cut is None:
        present = jnp.sum(mask, dtype=jnp.int32)
    else:
        present = jnp.sum(_split(mask, cut), axis=1, dtype=jnp.int32)
    missing = kept_count(sparsity, _part_size(mask, cut)) - present
    return mask | top_k_of_parts(jnp.where(mask, 0, codes), missing, cut)


def random_codes(p: Any, key: Array) -> Array:
    """Codes without order, almost all different."""
    return jnp.maximum(jax.random.bits(key, p.shape, jnp.uint32), 1)
