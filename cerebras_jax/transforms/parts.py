"""Parts of a vector that stands for several arrays: read, written, wherever it lies."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cerebras_jax.checks import is_traced
from cerebras_jax.engine.memory import in_memory_of, on_device
from cerebras_jax.engine.placement import copy_to, in_place_of, is_at_hand
from cerebras_jax.types import Array


class Part(NamedTuple):
    """Where a parameter lies in a vector.

    Attributes:
      start: its first element.
      shape: its shape; elements are in row-major order.
    """

    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)


def is_spread(x: Any) -> bool:
    """Whether an array is known to be split over devices."""
    sharding = jax.typeof(x).sharding if is_traced(x) else getattr(x, "sharding", None)
    return isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated


def part_of(vector: Any, part: Part, host: np.ndarray | None = None) -> Array:
    """A parameter's part of a vector, as an array of its own, on the device and not split.

    Args:
      vector: it may have leading axes, of `jax.vmap`.
      part: the part.
      host: what `at_hand` gave for the vector; None: nothing.
    """
    if host is None:
        return _cut(_gathered(vector), np.int32(part.start), part.shape)
    mine = host[..., part.start : part.stop].reshape(*host.shape[:-1], *part.shape)
    if not isinstance(vector, jax.Array) or not vector.committed:
        return jax.device_put(mine.copy())
    where = vector.sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec())
    return copy_to(mine, where)


def at_hand(vector: Any) -> np.ndarray | None:
    """A vector on the host, for `part_of`; None where the process does not have all of it."""
    return None if is_traced(vector) or not is_at_hand(vector) else np.asarray(vector)


def with_parts(vector: Any, values: Mapping[Part, Any]) -> Any:
    """A vector with other values in these parts; where it lies."""
    arrays = [vector, *values.values()]
    if any(is_traced(x) or not is_at_hand(x) for x in arrays):
        result = _gathered(vector)
        for part, value in values.items():
            new = jnp.asarray(value).astype(vector.dtype)
            result = _with_part(result, new, np.int32(part.start))
        if is_spread(vector):
            result = _laid(result, vector)
        return in_memory_of(vector, result)
    host = np.array(vector)
    for part, value in values.items():
        flat = np.asarray(value).reshape(*host.shape[:-1], -1)
        host[..., part.start : part.stop] = flat
    return in_place_of(vector, host)


def cut(vector: Array, start: Any, shape: tuple[int, ...]) -> Array:
    """The part of this shape from a place on, which may be traced."""
    part = jax.lax.dynamic_slice_in_dim(vector, start, math.prod(shape), -1)
    return part.reshape(*vector.shape[:-1], *shape)


# --- helpers --------------------------------------------------------------------------------------


def _gathered(vector: Any) -> Any:
    """The vector whole on every device: parts need not end where those of the devices do."""
    vector = on_device(vector)
    return _laid(vector, vector, PartitionSpec()) if is_spread(vector) else vector


def _laid(x: Any, like: Any, spec: PartitionSpec | None = None) -> Any:
    """An array split as another, or so on its mesh."""
    where = (jax.typeof(like) if is_traced(like) else like).sharding
    where = NamedSharding(where.mesh, where.spec if spec is None else spec)
    return jax.sharding.reshard(x, where) if is_traced(x) else jax.device_put(x, where)


@functools.partial(jax.jit, static_argnums=2)
def _cut(vector: Array, start: Any, shape: tuple[int, ...]) -> Array:
    return cut(vector, start, shape)


@jax.jit
def _with_part(vector: Array, value: Array, start: Any) -> Array:
    flat = value.reshape(*vector.shape[:-1], -1)
    return jax.lax.dynamic_update_slice_in_dim(vector, flat, start, -1)
