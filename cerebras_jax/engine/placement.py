"""Where arrays lie: beside the parameters, and where they were before a step."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cerebras_jax.checks import is_traced

Placement = tuple[NamedSharding | None, ...] | None
"""For each array where it lies, if that is a mesh of several devices; None: none does."""


def mesh_of(arrays: Sequence[Any]) -> Mesh | None:
    """The mesh that the first of the arrays that has one lies on."""
    for x in arrays:
        sharding = None if is_traced(x) else getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def beside(tree: Any, mesh: Mesh | None) -> Any:
    """The tree, with what lies nowhere in particular on every device of the parameters' mesh.

    Step counts and the like would be moved there by the first step, which would then be another
    program than the second, and could not be restored beside the parameters.
    """
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: _put(x, everywhere) if _is_adrift(x) else x, tree)


def _put(x: Any, sharding: NamedSharding) -> Any:
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    host = np.asarray(x)  # without a word between the processes, which `device_put` would have
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _is_adrift(x: Any) -> bool:
    return isinstance(x, jax.Array) and not is_traced(x) and not x.committed


def explicit_shardings(tree: Any) -> tuple[Any, Any]:
    """The mesh with explicit axes that arrays or tracers lie on, or None; and their shardings."""
    where = jax.tree.map(lambda x: jax.typeof(x).sharding, tree)
    meshes = (s.mesh for s in jax.tree.leaves(where))
    mesh = next((m for m in meshes if AxisType.Explicit in m.axis_types), None)
    return mesh, where


class Placements:
    """Remembers where arrays were when they were last asked for, as they seldom move."""

    def __init__(self) -> None:
        self._seen: list[Any] = []
        self._placement: Placement = None

    def of(self, arrays: Sequence[Any]) -> Placement:
        """The placement; the same object as long as no array moved."""
        if jax.device_count() == 1 or not arrays or is_traced(arrays[0]):
            return None
        now = [x.sharding for x in arrays]
        if len(now) != len(self._seen) or not all(map(operator.is_, now, self._seen)):
            spread = tuple(map(_spread, now))
            self._seen = now
            self._placement = spread if any(spread) else None
        return self._placement


def _spread(sharding: Any) -> NamedSharding | None:
    is_spread = isinstance(sharding, NamedSharding) and sharding.num_devices > 1
    return sharding if is_spread else None
