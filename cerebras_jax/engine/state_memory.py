"""Which states are kept in the memory of the host: names, and what is refused."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from cerebras_jax.checks import check_choice
from cerebras_jax.engine.lift import RuleState
from cerebras_jax.engine.memory import DEVICE, HOST, on_host
from cerebras_jax.messages import shown

StateMemory = str | Mapping[str, str] | None
"""``"pinned_host"`` or ``"device"``, for all states or by name; None: all on the device."""


class Leaf(NamedTuple):
    """What a leaf of a state is.

    Attributes:
      name: the last attribute on the way to a tree like the parameters.
      is_movable: whether it is an array of parameters, and no scalar.
    """

    name: str
    is_movable: bool


def named(tree: Any, params: Any) -> list[Leaf]:
    """What the leaves of a state are, given the parameters or their shapes."""
    paths = {tuple(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    longest = max(map(len, paths), default=0)
    rules = [x for x in jax.tree.leaves(tree, is_leaf=_is_rule) if _is_rule(x)]
    clocks = [(rule.count, rule.clock) for rule in rules]
    counts = {id(x) for x in jax.tree.leaves(clocks)}  # those of classes are vectors
    states = {id(x) for x in jax.tree.leaves([(rule.states, rule.low_bits) for rule in rules])}
    result = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        ends = [n for n in range(longest, -1, -1) if tuple(path[len(path) - n :]) in paths]
        above = path[: len(path) - next(iter(ends), 0)]
        names = [k.name for k in above if isinstance(k, jax.tree_util.GetAttrKey)]
        name = names[-1] if names else jax.tree_util.keystr(above)
        # Of packed parameters the paths are others.
        is_state = id(x) in states or (bool(ends) and id(x) not in counts)
        result.append(Leaf(name, is_state and x.ndim > 0))
    return result


def memories_of(leaves: Sequence[Leaf], state_memory: StateMemory) -> list[str | None]:
    """For each leaf of a state the memory that it is kept in; None: the device's."""
    movable = list(dict.fromkeys(leaf.name for leaf in leaves if leaf.is_movable))
    is_dict = isinstance(state_memory, Mapping)
    chosen = state_memory if is_dict else dict.fromkeys(movable, state_memory)
    for name in chosen:
        if name not in movable:
            is_known = any(leaf.name == name for leaf in leaves)
            what = "scalars, which stay on the device" if is_known else "no state"
            raise ValueError(
                f"state_memory: {shown(name)} names {what}; the states with arrays are {movable}"
            )
    wanted = (chosen.get(leaf.name) if leaf.is_movable else None for leaf in leaves)
    return [None if memory == DEVICE else memory for memory in wanted]


def in_memory(tree: Any, params: Any, state_memory: StateMemory) -> Any:
    """A state with its arrays in these memories, on the devices where they are; see `state`."""
    if state_memory is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    memories = memories_of(named(tree, params), state_memory)
    pairs = zip(leaves, memories, strict=True)
    return treedef.unflatten([x if memory is None else on_host(x) for x, memory in pairs])


def check_memory(state_memory: Any, mesh: Mesh | AbstractMesh) -> None:
    """Refuses what is no memory of the mesh's devices."""
    if state_memory is None:
        return
    if not isinstance(state_memory, str | Mapping):
        raise TypeError(
            f"state_memory must be {HOST!r}, or a dict from names of states to it, "
            f"got {shown(state_memory)}"
        )
    given = state_memory.items() if isinstance(state_memory, Mapping) else [(None, state_memory)]
    for name, memory in given:
        what = "state_memory" if name is None else f"state_memory[{name!r}]"
        check_choice(what, memory, (HOST, DEVICE))
        if memory == HOST and isinstance(mesh, Mesh):
            device = next(iter(mesh.local_mesh.devices.flat))
            there = [m.kind for m in device.addressable_memories()]
            if HOST not in there:
                raise ValueError(f"{what} must be a memory of {device}: {there}, got {HOST!r}")


def _is_rule(x: Any) -> bool:
    return isinstance(x, RuleState)
