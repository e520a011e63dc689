"""Which array of an optimizer's state belongs to which parameter, and under which name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cerebras_jax.checks import is_traced
from cerebras_jax.engine.leaf import fields
from cerebras_jax.engine.lift import RuleState
from cerebras_jax.engine.placement import in_place_of
from cerebras_jax.engine.trees import path_name
from cerebras_jax.messages import shown, warn_caller
from cerebras_jax.optim.guarding import Guard
from cerebras_jax.sparse.masking import find_state, is_on, pack
from cerebras_jax.transforms.grouped import GroupedState
from cerebras_jax.transforms.packed import PackedState
from cerebras_jax.transforms.parts import Part, at_hand, part_of, with_parts
from cerebras_jax.types import Array

LOW_BITS = "low_bits"  # the state of that name; see `rounding`
MASK = "mask"  # the state of that name, see `sparse`
SPARSE_STEP = "sparsity.step"  # and the path of the steps that masks go by


class Place(NamedTuple):
    """Where a value lies: a leaf of the state, or a part or an entry of one that is a vector.

    Attributes:
      leaf, row: the leaf, and the entry; None: all of the leaf.
      is_packed: whether the leaf has the bits of a mask of `sparsify`; see `pack`.
      part: the part of the leaf, where parameters share one; None: all of it. See `packed`.
    """

    leaf: int
    row: int | None = None
    is_packed: bool = False
    part: Part | None = None


class Catalogue(NamedTuple):
    """What the leaves of a state are.

    Attributes:
      of: per parameter name, the places of its states by key; its step count is ``"step"``.
      shared: places, by path, of what belongs to no parameter: the states of wrappers.
      guard: places of what watches over the steps; see `guarding`.
      norms: places of the norms of the last step, by kind; nothing continues from them.
    """

    of: dict[str, dict[str, Place]]
    shared: dict[str, Place]
    guard: dict[str, Place]
    norms: dict[str, Place]


class NamedState(NamedTuple):
    """All that continuing needs beside the parameters and their groups, by name.

    Attributes:
      states: per parameter name, arrays by state name.
      clocks: per clock name, such as ``step``, a number by parameter name.
      shared: what belongs to no parameter, by path: the states of wrappers.
      guard: what watches over the steps, by name; see `guarding`.
    """

    states: dict[str, dict[str, Any]]
    clocks: dict[str, dict[str, Any]]
    shared: dict[str, Any]
    guard: Mapping[str, Any] = MappingProxyType({})


Owners = Callable[[int, Any, Any], list[str | None]]
"""For a group, its state and a tree of names like its parameters: which leaf is whose."""


def catalogue(
    state: Any,
    params: Any,
    names: Mapping[str, str],
    owners: Owners,
    watch: Guard,
    is_sparse: bool = False,
) -> Catalogue:
    """Finds out what the leaves of a state are.

    Args:
      state: shapes in the structure of the state, each of them a different object.
      params: the structure of the parameters.
      names: from the dotted path of each leaf of it, in their order, to the parameter's name.
      owners: tells for pairs that are not made of a rule.
      watch: what watches over the steps.
      is_sparse: whether the optimizer has masks of its own, beside those of wrappers.

    Raises:
      ValueError: if the state does not hold that of the groups exactly once.
    """
    index = {id(x): i for i, x in enumerate(jax.tree.leaves(state))}
    guard = {
        path_name(path): Place(index[id(x)])
        for path, x in jax.tree_util.tree_leaves_with_path(watch.watch(state))
    }
    measured = watch.norms_of(state)
    norms = {
        kind: Place(index[id(x)])
        for kind, named in ({} if measured is None else measured._asdict()).items()
        for x in jax.tree.leaves(named)
    }
    state = watch.guarded(state)
    of: dict[str, dict[str, Place]] = {name: {} for name in names.values()}
    nodes = [x for x in jax.tree.leaves(state, is_leaf=_is_groups) if _is_groups(x)]
    if len(nodes) != 1:
        raise ValueError(
            f"what is around the groups must keep their state once, it keeps it {len(nodes)} times"
        )
    known: set[int] = set()
    for g, (paths, own) in enumerate(zip(nodes[0].names.of_group, nodes[0].states, strict=True)):
        members = [names[path] for path in paths]
        masked = params if len(members) == len(names) else _masked(params, names, set(paths))
        known |= {index[id(x)] for x in jax.tree.leaves(own)}
        if isinstance(own, PackedState):
            _add_packed(of, own, names, index)
        elif isinstance(own, RuleState):
            _add_rule(of, own, masked, members, index)
        else:
            mine = owners(g, own, masked.unflatten(members))
            _add_foreign(of, own, mine, members, index)
    places = [
        (path_name(path), Place(index[id(x)]))
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    ]
    shared = {path: place for path, place in places if place.leaf not in known}
    if is_sparse:
        _add_masks(of, shared, state, params, names, index)
    return Catalogue(of, shared, guard, norms)


def _add_masks(
    of: dict,
    shared: dict[str, Place],
    state: Any,
    params: Any,
    names: Mapping[str, str],
    index: Mapping[int, int],
) -> None:
    """Takes what belongs to `sparsify` out of what is shared."""
    node = find_state(state)
    masks = zip(names.values(), params.flatten_up_to(node.bits), strict=True)
    places = {n: Place(index[id(m)], is_packed=True) for n, m in masks if id(m) in index}
    step = Place(index[id(node.step)])
    mine = {place.leaf for place in (*places.values(), step)}
    for path in [k for k, v in shared.items() if v.leaf in mine]:
        del shared[path]
    shared[SPARSE_STEP] = step
    for name, place in places.items():
        of[name][MASK] = place


def without(entries: Mapping[str, Mapping[str, Any]], *keys: str) -> dict[str, dict[str, Any]]:
    """The states of these names left out."""
    return {n: {k: v for k, v in entry.items() if k not in keys} for n, entry in entries.items()}


def with_our_low_bits(
    loaded: Mapping[str, Any], ours: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Loaded states with the bits that ``rounding="exact"`` keeps, or does not keep, here.

    Another rounding has none: they are zero then. Those that are not kept here are left out. Both
    is said once.

    Args:
      loaded: by parameter name, the loaded states by name, or None.
      ours: by parameter name, the states to be replaced.
    """
    result, lacking, dropped = dict(loaded), [], []
    for name, entry in loaded.items():
        if entry is None:
            continue
        theirs, mine = entry.get(LOW_BITS), ours[name].get(LOW_BITS)
        if theirs is None and mine is not None:
            lacking.append(name)
            result[name] = {**entry, LOW_BITS: jnp.zeros_like(mine)}
        elif theirs is not None and mine is None:
            dropped.append(name)
            result[name] = {k: v for k, v in entry.items() if k != LOW_BITS}
    for names, what in (
        (lacking, "has no {}: with rounding='exact' {} start from their bfloat16 values"),
        (dropped, "has {}, which rounding='exact' keeps: they are dropped for {}"),
    ):
        if names:
            warn_caller("the state dict " + what.format(LOW_BITS, shown(names)))
    return result


def _masked(params: Any, names: Mapping[str, str], members: set[str]) -> Any:
    leaf = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.tree.structure(
        params.unflatten([leaf if path in members else optax.MaskedNode() for path in names])
    )


def _is_groups(x: Any) -> bool:
    return isinstance(x, GroupedState)


def _add_rule(
    of: dict, state: RuleState, treedef: Any, members: Sequence[str], index: Mapping[int, int]
) -> None:
    for key, tree in fields(state.states):
        if tree is not None:
            for name, leaf in zip(members, treedef.flatten_up_to(tree), strict=True):
                if leaf is not None:
                    of[name][key] = Place(index[id(leaf)])
    if state.low_bits is not None:
        for name, leaf in zip(members, treedef.flatten_up_to(state.low_bits), strict=True):
            if leaf is not None:
                of[name][LOW_BITS] = Place(index[id(leaf)])
    for row, name in enumerate(members):
        for key, vector in [*fields(state.clock), ("step", state.count)]:
            of[name][key] = Place(index[id(vector)], row)


def _add_packed(
    of: dict, state: PackedState, names: Mapping[str, str], index: Mapping[int, int]
) -> None:
    vectors, own = dict(state.packs.vectors), state.inner
    for key, tree in [*fields(own.states), (LOW_BITS, own.low_bits)]:
        for path, leaf in (tree or {}).items():
            for member, part in vectors.get(path, [(path, None)]) if leaf is not None else ():
                of[names[member]][key] = Place(index[id(leaf)], part=part)
    for row, members in enumerate(state.packs.rows()):
        for key, vector in [*fields(own.clock), ("step", own.count)]:
            for member in members:
                of[names[member]][key] = Place(index[id(vector)], row)


def _add_foreign(
    of: dict,
    state: Any,
    mine: Sequence[str | None],
    members: Sequence[str],
    index: Mapping[int, int],
) -> None:
    """States of an optax pair: ``mu``, ``nu``; what has no owner stands with every member."""
    with_path = jax.tree_util.tree_leaves_with_path(state)
    short = [_last_attribute(path) for path, _ in with_path]
    for (path, leaf), key, owner in zip(with_path, short, mine, strict=True):
        clashes = sum(k == key and o == owner for k, o in zip(short, mine, strict=True)) > 1
        if clashes or key is None:
            key = path_name(path)
        for name in members if owner is None else [owner]:
            of[name][key] = Place(index[id(leaf)])


def _last_attribute(path: Any) -> str | None:
    names = [p.name for p in path if isinstance(p, jax.tree_util.GetAttrKey)]
    return names[-1] if names else None


def read(
    leaves: Sequence[Array], places: Mapping[str, Place], host: dict[int, Any]
) -> dict[str, Any]:
    """The values at these places.

    Args:
      leaves: the leaves of the state.
      places: e.g. those of one parameter.
      host: vectors that were already brought to the host, by leaf; it is added to.
    """
    return {key: _value(leaves, place, host) for key, place in places.items()}


def named(leaves: Sequence[Array], catalogue: Catalogue) -> NamedState:
    """The state by name, with clocks as they are, unrounded."""
    host: dict[int, Any] = {}
    states: dict[str, dict[str, Any]] = {name: {} for name in catalogue.of}
    clocks: dict[str, dict[str, Any]] = {}
    for name, places in catalogue.of.items():
        for key, place in places.items():
            leaf, row = place.leaf, place.row
            if row is None:
                states[name][key] = _whole(leaves, place, host)
                continue
            if leaf not in host:
                host[leaf] = np.asarray(leaves[leaf])
            clocks.setdefault(key, {})[name] = host[leaf][row]
    return NamedState(states, clocks, read(leaves, catalogue.shared, host))


class StateView(Mapping[str, Mapping[str, Any]]):
    """Per parameter name, the states by name: as they are now, also after further steps."""

    def __init__(self, leaves: Sequence[Array], catalogue: Catalogue, shown: Mapping[str, Any]):
        self._leaves, self._catalogue, self._shown = tuple(leaves), catalogue, shown
        self._host: dict[int, Any] = {}

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        places = self._catalogue.of[name]
        hidden = self._shown.get(name, ())
        mine = {key: place for key, place in places.items() if key not in hidden}
        return MappingProxyType(read(self._leaves, mine, self._host))

    def __iter__(self) -> Iterator[str]:
        return iter(self._catalogue.of)

    def __len__(self) -> int:
        return len(self._catalogue.of)

    def __repr__(self) -> str:
        return repr({name: dict(entry) for name, entry in self.items()})


def _value(leaves: Sequence[Array], place: Place, host: dict[int, Any]) -> Any:
    leaf = leaves[place.leaf]
    if place.row is None:
        return _whole(leaves, place, host)
    if place.leaf not in host:  # it will be read element by element
        host[place.leaf] = leaf if is_traced(leaf) or not is_whole(leaf) else np.asarray(leaf)
    entry = host[place.leaf][place.row]
    return _as_step(entry) if jnp.issubdtype(entry.dtype, jnp.integer) else entry


def _whole(leaves: Sequence[Array], place: Place, host: dict[int, Any]) -> Array:
    leaf = leaves[place.leaf]
    if place.part is not None:
        if place.leaf not in host:
            host[place.leaf] = at_hand(leaf)
        return part_of(leaf, place.part, host[place.leaf])
    return is_on(leaf) if place.is_packed else leaf


def _as_step(count: Any) -> Any:
    """A step count as checkpoints have it: float32, or float64 where that would not be exact."""
    if not isinstance(count, np.generic):
        return count.astype(jnp.float32)
    return np.float32(count) if int(count) <= 2**24 else np.float64(count)


def is_whole(x: Any) -> bool:
    """Whether all of an array can be read from this process."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def write(
    leaves: Sequence[Array], catalogue: Catalogue, entries: Mapping[str, Mapping[str, Any]]
) -> list[Array]:
    """The leaves of a state that holds these values; what entries lack stays as it is."""
    check_shared(catalogue, entries)
    result = list(leaves)
    rows: dict[int, dict[int, Any]] = {}
    parts: dict[int, dict[Part, Any]] = {}
    for name, entry in entries.items():
        for key, value in entry.items():
            place = catalogue.of[name].get(key)
            if place is None:
                continue
            if place.part is not None:
                parts.setdefault(place.leaf, {})[place.part] = value
            elif place.row is None:
                new = pack(value) if place.is_packed else value
                result[place.leaf] = in_place_of(result[place.leaf], new)
            else:
                rows.setdefault(place.leaf, {})[place.row] = value
    for leaf, values in rows.items():
        result[leaf] = _with_rows(result[leaf], values)
    for leaf, values in parts.items():
        result[leaf] = with_parts(result[leaf], values)
    return result


def check_shared(catalogue: Catalogue, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses values for parameters that are packed together, if their clocks differ.

    Args:
      catalogue: what the leaves of the state are.
      entries: by parameter name, values by state name; those that are traced pass.
    """
    first: dict[Place, tuple[str, Any]] = {}
    for name, entry in entries.items():
        places = catalogue.of[name]
        if all(place.part is None for place in places.values()):
            continue
        for key in places.keys() & entry.keys():
            place, value = places[key], entry[key]
            if place.row is None or is_traced(value):
                continue
            other, theirs = first.setdefault(place, (name, value))
            if np.asarray(value) != np.asarray(theirs):
                raise ValueError(
                    f"parameters {other!r} and {name!r} are packed and share their {key}, which "
                    f"would be {theirs} and {value}: make the optimizer with pack=False"
                )


def _with_rows(vector: Array, values: Mapping[int, Any]) -> Array:
    if any(is_traced(x) for x in [vector, *values.values()]):
        for row, value in values.items():
            vector = vector.at[row].set(_as_entry(value, vector.dtype))
        return vector
    host = np.array(vector)
    for row, value in values.items():
        host[row] = _as_entry(np.asarray(value), host.dtype)
    return in_place_of(vector, host)


def _as_entry(value: Any, dtype: Any) -> Any:
    """A count that saturates; other scalars as they are."""
    if not jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.integer):
        return value.astype(dtype)
    limit = jnp.iinfo(dtype).max
    xp = jnp if is_traced(value) else np
    return xp.where(value >= limit, limit, xp.minimum(value, limit - 128).astype(dtype))
