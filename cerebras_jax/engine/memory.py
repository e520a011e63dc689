"""In which memory an array lies: that of its device, or, to be brought there in a step, the host's.

JAX has the memory in the type of an array, so that a program moves what has to be moved, whichever
arrays it is given, and nothing else.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from cerebras_jax.checks import is_traced

DEVICE, HOST = "device", "pinned_host"
"""The memories that JAX tells apart in types."""


def on_device(tree: Any) -> Any:
    """The tree with all arrays in the memory of their devices, now or in the program."""
    return jax.tree.map(lambda x: _moved(x, jax.memory.Space.Device), tree)


def on_host(x: Any) -> Any:
    """The array in the memory of the host, on the devices where it is, now or in the program."""
    where = None if is_traced(x) else x.sharding
    if isinstance(where, SingleDeviceSharding):  # the type would not tell its memory
        where = NamedSharding(mesh_of(*where.device_set), PartitionSpec(), memory_kind=HOST)
        return jax.device_put(x, where)
    return _moved(x, jax.memory.Space.Host)


def put(x: jax.Array, where: Sharding) -> jax.Array:
    """`jax.device_put`, which moves an array to other devices or to another memory, not to both."""
    kind = where.memory_kind
    if x.sharding.memory_kind != kind and kind is not None:
        x = jax.device_put(x, x.sharding.with_memory_kind(kind))
    return jax.device_put(x, where)


@functools.lru_cache(maxsize=64)
def mesh_of(device: Any) -> Mesh:
    """A mesh of one device."""
    return Mesh(np.array([device]), ("device",), axis_types=(AxisType.Auto,))


def in_memory_of(old: Any, new: Any) -> Any:
    """A tree whose arrays are in the memory of those of another of its structure."""
    return jax.tree.map(lambda x, y: _moved(y, _space_of(x)), old, new)


def _moved(x: Any, space: Any) -> Any:
    return x if _space_of(x) is space else jax.device_put(x, space)


def _space_of(x: Any) -> Any:
    """The memory of an array or a tracer; what is neither will be in that of a device."""
    if isinstance(x, jax.Array):
        return jax.typeof(x).memory_space
    return jax.memory.Space.Device
