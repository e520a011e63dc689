"""Trees by name: the state of every rule in them in one layout, the rest by path."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cerebras_jax.checkpoint.leaves import ANY, CheckpointError, Leaves, Place
from cerebras_jax.engine.leaf import fields
from cerebras_jax.engine.lift import RuleState
from cerebras_jax.engine.trees import path_name
from cerebras_jax.transforms.packed import PackedState, Packs
from cerebras_jax.transforms.parts import Part, at_hand, part_of, with_parts


class Clock(NamedTuple):
    """The place of a clock, and whose it is; of several entries, per name the row."""

    folder: str
    names: tuple[str, ...]
    rows: tuple[int, ...] = ()


class Vector(NamedTuple):
    """The places of the parameters that are packed in one vector."""

    folder: str
    parts: tuple[tuple[str, Part], ...]

    def by_place(self) -> dict[Place, Part]:
        return {Place(self.folder, name): part for name, part in self.parts}


def places(tree: Any) -> list[Place | Clock | Vector]:
    """Where each leaf of a tree stands in a checkpoint.

    Wherever a `RuleState` is nested, its states are at ``state/KEY/PARAMETER`` and its clocks at
    ``clock/KEY``, as those of the class form. Other leaves have the path in the tree.
    """
    nodes = list(_nodes(tree))
    has_rules = any(isinstance(node, RuleState) for _, node, _ in nodes)
    found: list[Place | Clock | Vector] = []
    for path, node, packs in nodes:
        if isinstance(node, RuleState):
            i, taken = 0, _taken(found)
            while taken & _taken(mine := _rule_places(node, packs, f"{i or ''}")):
                i += 1
            found += mine
            continue
        # With rules, parts of a training state, such as params.
        folder, rest = (path_name(path[:1]), path[1:]) if has_rules else ("", path)
        if packs is not None and packs.is_joined(node):
            found += _tree_places(node, folder, path_name(rest), dict(packs.vectors))
        else:
            found.append(Place(folder, path_name(rest)))
    return found


def _nodes(tree: Any) -> Iterator[tuple[Any, Any, Packs | None]]:
    """Rules, the dicts of packed parameters, and other leaves: path, node, and what is packed.

    The paths are those without packing.
    """
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_rule_or_packed):
        if not isinstance(node, PackedState):
            yield path, node, None
            continue
        packs = node.packs

        def is_whole(x: Any, packs: Packs = packs) -> bool:
            return isinstance(x, RuleState) or packs.is_joined(x)

        for more, inner in jax.tree_util.tree_leaves_with_path(node.inner, is_leaf=is_whole):
            yield (*path, *more), inner, packs


def _is_rule_or_packed(x: Any) -> bool:
    return isinstance(x, RuleState | PackedState)


def _tree_places(
    tree: Any, folder: str, above: str, vectors: Mapping[str, tuple[tuple[str, Part], ...]]
) -> Iterator[Place | Vector]:
    """Those of the leaves of a tree like the parameters, of which some are packed in vectors."""

    def at(name: str) -> str:
        return ".".join(filter(None, (above, name)))

    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        if name in vectors:
            yield Vector(folder, tuple((at(member), part) for member, part in vectors[name]))
        else:
            yield Place(folder, at(name))


def _taken(found: Sequence[Place | Clock | Vector]) -> set[tuple[str, str]]:
    return {(p.folder, name) for p in found for name in _names_at(p)}


def _names_at(place: Place | Clock | Vector) -> tuple[str, ...]:
    if isinstance(place, Vector):
        return tuple(name for name, _ in place.parts)
    return place.names if isinstance(place, Clock) else (place.name,)


def _rule_places(
    state: RuleState, packs: Packs | None, number: str
) -> list[Place | Clock | Vector]:
    """Those of the leaves of a rule's state, in their order."""
    vectors = {} if packs is None else dict(packs.vectors)
    rows = [[name] for name in _names(state)] if packs is None else packs.rows()
    of_names = [(name, row) for row, members in enumerate(rows) for name in members]
    names, row_of = zip(*of_names, strict=True) if of_names else ((), ())

    def clock(key: str) -> Clock:
        return Clock(f"clock{number}/{key}", names, row_of)

    found: list[Place | Clock | Vector] = [clock("step")]
    found += [clock(key) for key, _ in fields(state.clock)]
    for key, tree in fields(state.states):
        found += _tree_places(tree, f"state{number}/{key}", "", vectors)
    return found


def _names(state: RuleState) -> tuple[str, ...]:
    """The parameters' names, as far as the states tell."""
    trees = [tree for _, tree in fields(state.states) if tree is not None]
    shape = np.shape(state.count)
    if trees:
        leaves = jax.tree_util.tree_leaves_with_path(trees[0], is_leaf=lambda x: x is None)
        names = tuple(path_name(path) for path, _ in leaves)
        if shape in ((), (len(names),)):
            return names
    return tuple(f"{i}" for i in range(shape[0])) if shape else (ANY,)


def to_leaves(tree: Any) -> Leaves:
    """A tree's leaves by name."""
    values: dict[Place, Any] = {}
    clocks: dict[str, dict[str, Any]] = {}
    for place, leaf in zip(places(tree), jax.tree.leaves(tree), strict=True):
        if isinstance(place, Clock):
            clocks.setdefault(place.folder, {}).update(_numbers(place, leaf))
        elif isinstance(place, Vector):
            is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
            host = None if is_shape else at_hand(leaf)
            values |= {at: _cut(leaf, part, host) for at, part in place.by_place().items()}
        else:
            values[place] = leaf
    return Leaves(values, clocks)


def _cut(vector: Any, part: Part, host: Any) -> Any:
    """A part of a vector; a shape of a shape."""
    if isinstance(vector, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*vector.shape[:-1], *part.shape), vector.dtype)
    return part_of(vector, part, host)


def _numbers(place: Clock, clock: Any) -> dict[str, Any]:
    """A clock's entry for each name; shapes stand for themselves."""
    if isinstance(clock, jax.ShapeDtypeStruct):
        return dict.fromkeys(place.names, clock)
    host = np.asarray(clock)
    entries = [host[row] if host.ndim else host[()] for row in place.rows]
    return dict(zip(place.names, entries, strict=True))


def from_leaves(tree: Any, leaves: Leaves, where: str) -> Any:
    """The tree with other leaves; ``where`` is its path, for messages.

    Raises:
      CheckpointError: if the parameters of one clock have taken different numbers of steps.
    """
    filled = []
    for place, like in zip(places(tree), jax.tree.leaves(tree), strict=True):
        if isinstance(place, Clock):
            filled.append(_clock(place, leaves.clocks[place.folder], like, where))
        elif isinstance(place, Vector):
            parts = {part: leaves.values[at] for at, part in place.by_place().items()}
            is_shape = isinstance(like, jax.ShapeDtypeStruct)
            old = jnp.zeros(like.shape, like.dtype, device=like.sharding) if is_shape else like
            filled.append(with_parts(old, parts))
        else:
            filled.append(leaves.values[place])
    return jax.tree.structure(tree).unflatten(filled)


def _clock(place: Clock, numbers: dict[str, Any], like: Any, where: str) -> Any:
    mine = [numbers[name] for name in place.names]
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in mine):
        raise CheckpointError(f"{where}{place.folder} is missing, and ours has no value")
    vector = np.asarray(mine).astype(like.dtype)
    if np.shape(like) != ():
        first = {row: x for row, x in zip(reversed(place.rows), vector[::-1], strict=True)}
        apart = [
            n for n, row, x in zip(place.names, place.rows, vector, strict=True) if x != first[row]
        ]
        if apart:
            raise CheckpointError(
                f"{where}{place.folder}: {apart[0]!r} has taken other steps than the parameters "
                "that it is packed with; leave it apart (packed(..., apart=[...]))"
            )
        vector = np.asarray([first[row] for row in sorted(first)], like.dtype)
    else:
        if len(set(vector.tolist())) > 1:
            raise CheckpointError(
                f"{where}{place.folder}: parameters have taken different numbers of steps, ours "
                "has one count for all; make it with per_leaf_clocks=True"
            )
        vector = vector[0]
    if isinstance(like, np.ndarray | np.generic):
        return vector
    sharding = like.sharding if getattr(like, "committed", True) else None
    array = jnp.array(vector)
    return array if sharding is None else jax.device_put(array, sharding)
