"""Where arrays lie: beside the parameters, and where they were before a step."""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
from cerebras_jax.engine.memory import HOST, in_memory_of

Placement = tuple[NamedSharding | None, ...] | None
"""For each array where it lies, if that is a mesh of several devices; None: none does."""


def home_of(arrays: Any) -> Sharding | None:
    """Where what belongs to no array in particular lies: with the first that is committed.

    That is on every device of its mesh, or on its device. None if all are free to move.

    Args:
      arrays: a tree of them, such as the parameters; tracers and other leaves are passed over.
    """
    for x in jax.tree.leaves(arrays):
        if isinstance(x, jax.Array) and not is_traced(x) and x.committed:
            if isinstance(x.sharding, NamedSharding):
                return _everywhere(x.sharding.mesh)
            if len(x.sharding.device_set) == 1:
                return SingleDeviceSharding(*x.sharding.device_set)  # in the device's own memory
    return None


@functools.lru_cache(maxsize=64)
def _everywhere(mesh: Any) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def beside(tree: Any, home: Sharding | None) -> Any:
    """The tree, with what lies nowhere in particular where the parameters are; see `home_of`.

    What a program makes of committed arrays is committed. A step count that was not would be
    another kind of argument in the second step, whose program would be compiled again, and it
    could not be restored beside the parameters.
    """
    if home is None:
        return tree
    return jax.tree.map(lambda x: copy_to(x, home) if _is_adrift(x) else x, tree)


def in_place_of(old: Any, new: Any) -> Any:
    """A new value for an array: where the old one lies, unless it lies elsewhere on purpose.

    It is in the memory where the old one was, in any case.

    Args:
      old: the array, or whatever stands in its place, which says nothing.
      new: an array of JAX or NumPy; that of NumPy is copied, others pass.
    """
    is_host = isinstance(new, np.ndarray)
    is_placed = isinstance(old, jax.Array) and not is_traced(old) and old.committed
    if is_placed and (is_host or _is_adrift(new)) and new.shape == old.shape:
        return copy_to(new, old.sharding)
    return in_memory_of(old, jnp.array(new) if is_host else new)


def is_at_hand(x: Any) -> bool:
    """Whether this process has all of an array."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def copy_to(x: Any, where: Sharding) -> Any:
    """A copy: steps give away what they hold, and `device_put` alone may share the buffer of x."""
    if where.is_fully_addressable:
        return jax.device_put(x.copy(), where)
    host = np.array(x)  # without a word between the processes, which `device_put` would have
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def check_together(names: Callable[[], Sequence[str]], *lists: Sequence[Any]) -> None:
    """Refuses arrays on different devices, or in another order; no program could take them.

    Args:
      names: called for an error only; of the arrays of all lists, one after the other.
      *lists: arrays; tracers, what is no array and what is free to move pass.

    Raises:
      ValueError: names two of them, and their devices.
    """
    first: tuple[int, Any] | None = None
    for i, x in enumerate(itertools.chain.from_iterable(lists)):
        if not isinstance(x, jax.Array) or is_traced(x) or not x.committed:
            continue
        if first is None:
            first = i, x.sharding
        elif _devices(x.sharding) != _devices(first[1]):
            j, other = first
            raise ValueError(
                f"{names()[i]} lies on the devices {_ids(x.sharding)}, and {names()[j]} on "
                f"{_ids(other)}: what is stepped together must lie on the same, in one order. "
                "To move a run, make its optimizer there, and load the state dict"
            )


@functools.lru_cache(maxsize=1024)
def _devices(sharding: Sharding) -> Sequence[Any]:
    """The devices in their order, which has to be one in a program."""
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return tuple(sharding.mesh.devices.flat)
    return tuple(sorted(sharding.device_set, key=lambda device: device.id))


def _ids(sharding: Sharding) -> str:
    ids = [device.id for device in _devices(sharding)]
    return f"{ids}" if len(ids) <= 8 else f"[{ids[0]}, {ids[1]}, ..., {ids[-1]}]"


def check_parameters(names: Callable[[], Sequence[str]], values: Sequence[Any]) -> None:
    """Refuses parameters on different devices, and those in the memory of the host.

    Raises:
      ValueError: names the parameter.
    """
    check_together(names, values)
    for i, x in enumerate(values):
        if not is_traced(x):
            check_not_on_host(lambda i=i: names()[i], x)


def check_not_on_host(name: Callable[[], str], x: Any) -> None:
    """Refuses a parameter, or the shape of one, in the memory of the host."""
    if getattr(getattr(x, "sharding", None), "memory_kind", None) == HOST:
        raise ValueError(
            f"parameter {name()!r} must be in the memory of its devices, got {HOST!r}; states may "
            "be there, with state_memory="
        )


def _is_adrift(x: Any) -> bool:
    return isinstance(x, jax.Array) and not is_traced(x) and not x.committed


def explicit_shardings(tree: Any) -> tuple[Any, Any]:
    """The mesh with explicit axes that arrays or tracers lie on, or None; and their shardings."""
    where = jax.tree.map(lambda x: jax.typeof(x).sharding, tree)
    meshes = (s.mesh for s in jax.tree.leaves(where))
    mesh = next((m for m in meshes if AxisType.Explicit in m.axis_types), None)
    return mesh, where


class Placements:
    """Remembers where arrays were when they were last asked for, as they seldom move.

    In a step nothing is done but to see that every sharding is the object that it was. Several
    threads may ask: what is remembered is replaced at once.
    """

    def __init__(self) -> None:
        self._last: tuple[list[Any], Sharding | None, Placement] = [], None, None

    def settle(
        self, *lists: list[Any], names: Callable[[], Sequence[str]]
    ) -> tuple[Sequence[list[Any]], Sharding | None, Placement]:
        """The arrays, what lay nowhere beside the others; their home; and where they stay.

        Raises:
          ValueError: if they lie on different devices; ``names`` are those of all arrays.
        """
        first = next(itertools.chain.from_iterable(lists), None)
        if first is None or is_traced(first):
            return lists, None, None
        seen, home, placement = self._last
        now = _shardings(lists, first)
        if len(now) != len(seen) or not all(map(operator.is_, now, seen)):
            check_together(names, *lists)
            home = home_of(lists)
            settled = beside(lists, home)
            seen = _shardings(settled, next(itertools.chain.from_iterable(settled)))
            spread = tuple(map(_spread, seen))
            placement = spread if any(spread) else None
            self._last = seen, home, placement
            return settled, home, placement
        return lists, home, placement


def _shardings(lists: Sequence[list[Any]], first: Any) -> list[Any]:
    """Those of all arrays; with one device the first speaks for all."""
    arrays = itertools.chain.from_iterable(lists) if jax.device_count() > 1 else (first,)
    return [getattr(x, "sharding", None) for x in arrays]


def _spread(sharding: Any) -> NamedSharding | None:
    is_spread = isinstance(sharding, NamedSharding) and sharding.num_devices > 1
    return sharding if is_spread else None
