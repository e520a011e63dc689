"""Small parameters in one vector for each dtype, so that one kernel updates them all."""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cerebras_jax.checks import is_traced
from cerebras_jax.engine.foreign import check_is_pair
from cerebras_jax.engine.lift import RuleState, why_whole
from cerebras_jax.engine.trees import align, as_array, check_distinct, check_grads, leaf_paths
from cerebras_jax.transforms.parts import Part, cut, is_spread
from cerebras_jax.types import Params

SMALL = 4096
"""How many elements a parameter has at least that is not packed by default."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Packs:
    """Which parameters are packed, and how; static.

    Attributes:
      names: the dotted names of all leaves, in the order of the tree.
      vectors: per vector its name, and per parameter in it the name and the place.
    """

    names: tuple[str, ...]
    vectors: tuple[tuple[str, tuple[tuple[str, Part], ...]], ...]

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.names, self.vectors))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:  # in every call of a compiled program
            return True
        return isinstance(other, Packs) and (self.names, self.vectors) == (
            other.names,
            other.vectors,
        )

    def __reduce__(self) -> Any:
        return Packs, (self.names, self.vectors)  # a hash is good for one process

    @functools.cached_property
    def _keys(self) -> frozenset[str]:
        packed = {name for _, parts in self.vectors for name, _ in parts}
        return frozenset({key for key, _ in self.vectors} | {*self.names} - packed)

    def is_joined(self, x: Any) -> bool:
        """Whether this is a dict as `join` makes them."""
        return isinstance(x, dict) and x.keys() == self._keys

    def rows(self) -> list[list[str]]:
        """Per leaf of what the wrapped pair sees, in its order, whose it is."""
        of = dict(self.vectors)
        return [[name for name, _ in of[key]] if key in of else [key] for key in sorted(self._keys)]

    def join(self, leaves: Mapping[str, Any], absent: Any = None) -> dict[str, Any]:
        """What the wrapped pair sees: a dict from names to leaves and vectors.

        A vector without any of its leaves is None.

        Args:
          leaves: by name.
          absent: makes what stands for a leaf that is None, from its shape.
        """
        result = {name: leaves[name] for name in self.names}
        for key, parts in self.vectors:
            given = [(result.pop(name), part.shape) for name, part in parts]
            if all(x is None for x, _ in given):
                result[key] = None
            else:
                result[key] = _joined([absent(shape) if x is None else x for x, shape in given])
        return result

    def split(self, joined: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `join`."""
        result = dict(joined)
        for key, parts in self.vectors:
            vector = result.pop(key)
            starts: Any = [np.int32(part.start) for _, part in parts]
            if is_traced(vector):
                starts = _known_late(starts)
            for (name, part), start in zip(parts, starts, strict=True):
                result[name] = None if vector is None else cut(vector, start, part.shape)
        return {name: result[name] for name in self.names}


class PackedState(NamedTuple):
    """State of `packed`.

    Attributes:
      inner: the state of the wrapped pair, for a dict of the parameters by dotted name, in which
        one vector for each dtype stands for all that are packed.
      packs: static, which those are.
    """

    inner: Any
    packs: Packs


def packed(
    tx: optax.GradientTransformation,
    below: int = SMALL,
    *,
    apart: Collection[str] = (),
    elementwise: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the states of small parameters in one vector, and updates them in one kernel.

    The numbers are those of the wrapped pair, which has to treat every element alike. A step
    gathers the gradients and the parameters once, which takes the memory of two vectors, and
    hands updates out. With a thousand small parameters AdamW takes half to two thirds of the time,
    SGD two thirds to three quarters; with few it gains nothing, and with large ones it loses.
    `unpacked` shows the state as it would be without.

    Packed are parameters of fewer than ``below`` elements, if two or more of one dtype are, but
    those that are split over devices. In `jax.jit`, ``init`` sees how they are split only on a mesh
    with explicit axes: call it outside, or use `sharding.init`. Parameters of a vector share
    a step count, so in a step all of them have a gradient, or none has.

    Args:
      tx: the pair: `optim.adamw` and others of our own that are elementwise; wrappers that look at
        norms go around.
      below: the number of elements from which on a parameter is left alone, >= 1.
      apart: dotted names of parameters to leave alone.
      elementwise: says of another pair, such as ``optax.adamw(1e-3)``, that it is elementwise,
        which nothing can check. It sees the dict that is said at `PackedState`.

    Raises:
      TypeError: if the pair is not known to be elementwise, with its name.
      ValueError: from ``init``, if there is no parameter with a name in ``apart``. From ``update``,
        if the parameters have other names or shapes than those that the state was made for, if
        those of one vector have different dtypes, or if one of several has no gradient.

    >>> from cerebras_jax import optim
    >>> params = {"w": jnp.ones((2, 2)), "b": jnp.zeros(2)}
    >>> tx = packed(optim.sgd(lr=0.5, momentum=0.9))
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> updates
    {'b': Array([-0., -0.], dtype=float32), 'w': Array([[-0.5, -0.5],
           [-0.5, -0.5]], dtype=float32)}
    >>> state.inner.states.momentum_buffer
    {'packed float32': Array([0., 0., 1., 1., 1., 1.], dtype=float32)}
    """
    _check_below("below", below)
    check_is_pair(tx)
    if isinstance(apart, str):
        raise TypeError(f"apart must be a list of names, got {apart!r}")
    _check_elementwise(tx, elementwise)
    pair = joined(tx, below, apart)

    def init(params: Params) -> Any:
        if unknown := sorted({*apart} - {*leaf_paths(params)}):
            raise ValueError(f"apart: there are no parameters {unknown[:5]}")
        return pair.init(params)

    return optax.GradientTransformationExtraArgs(init, pair.update)  # pyright: ignore


def joined(
    tx: optax.GradientTransformation, below: int, apart: Collection[str]
) -> optax.GradientTransformationExtraArgs:
    """`packed` of what is known to be elementwise, for some of the parameters."""
    inner = optax.with_extra_args_support(tx)
    apart = frozenset(apart)

    def init(params: Params) -> PackedState:
        names = leaf_paths(params)
        check_distinct(names)
        arrays = dict(zip(names, map(as_array, jax.tree.leaves(params)), strict=True))
        packs = Packs(tuple(names), tuple(_vectors(arrays, below, apart)))
        return PackedState(inner.init(packs.join(arrays)), packs)

    def update(
        grads: Any, state: PackedState, params: Params = None, **extra: Any
    ) -> tuple[Any, PackedState]:
        if params is None:
            raise ValueError("update needs the parameters: call update(grads, state, params)")
        if not isinstance(state, PackedState):
            raise TypeError(f"the state must be one of `packed`, got {type(state).__name__}")
        packs, names = state.packs, leaf_paths(params)
        p_leaves, treedef = jax.tree.flatten(params)
        if tuple(names) != packs.names:
            unlike = sorted(set(names) ^ set(packs.names))
            raise ValueError(f"the state was made for other parameters, these differ: {unlike[:5]}")
        p_leaves = [as_array(p) for p in p_leaves]
        old = dict(zip(names, p_leaves, strict=True))
        _check_fit(packs, old)
        g_leaves = align(treedef, grads, "the gradients", lambda: names)
        check_grads(g_leaves, p_leaves, lambda: names)
        g_leaves = [None if g is None else as_array(g) for g in g_leaves]
        given = dict(zip(names, g_leaves, strict=True))
        _check_present(packs, given)
        updates: Any
        updates, new = inner.update(packs.join(given), state.inner, packs.join(old), **extra)
        return treedef.unflatten(packs.split(updates).values()), PackedState(new, packs)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore


def unpacked(state: Any, params: Params) -> Any:
    """A state in which that of `packed` is what the wrapped pair would have by itself.

    Args:
      state: of any optax transformation.
      params: the parameters, or anything in their structure.

    Raises:
      ValueError: if the state has a parameter that ``params`` has not.

    >>> from cerebras_jax import optim
    >>> params = {"w": jnp.ones((2, 2)), "b": jnp.zeros(2)}
    >>> unpacked(packed(optim.lion(lr=0.5)).init(params), params).states.exp_avg
    {'b': Array([0., 0.], dtype=float32), 'w': Array([[0., 0.],
           [0., 0.]], dtype=float32)}
    """
    paths, treedef = leaf_paths(params), jax.tree.structure(params)

    def visit(node: Any) -> Any:
        if not isinstance(node, PackedState):
            return node
        packs = node.packs
        if unknown := sorted({*packs.names} - {*paths}):
            raise ValueError(f"the state is of parameters {unknown[:5]}, which params has not")
        rows = {name: i for i, names in enumerate(packs.rows()) for name in names}
        order = np.array([rows[name] for name in packs.names], int)

        def is_joined(x: Any) -> bool:
            return isinstance(x, RuleState) or packs.is_joined(x)

        def plain(x: Any) -> Any:
            if isinstance(x, RuleState):
                states = jax.tree.map(plain, x.states, is_leaf=is_joined)
                clocks = (x.count, x.clock)
                count, clock = jax.tree.map(lambda c: c[order] if c.ndim else c, clocks)
                bits = None if x.low_bits is None else plain(x.low_bits)
                return RuleState(count, clock, states, bits)
            if not is_joined(x):
                return x
            mine = packs.split(x)  # others belong to other groups
            return treedef.unflatten([mine.get(path, optax.MaskedNode()) for path in paths])

        return jax.tree.map(plain, node.inner, is_leaf=is_joined)

    return jax.tree.map(visit, state, is_leaf=lambda x: isinstance(x, PackedState))


def below_which(pack: Any) -> int:
    """The number of elements that ``pack=`` stands for; 0: no parameter is packed."""
    if isinstance(pack, bool):
        return SMALL if pack else 0
    _check_below("pack", pack)
    return int(pack)


def _check_below(name: str, below: Any) -> None:
    if isinstance(below, bool) or not isinstance(below, int | np.integer):
        raise TypeError(f"{name} must be a number of elements, an integer, got {below!r}")
    if below < 1:
        raise ValueError(f"{name} must be a number of elements >= 1, got {below}")


# --- helpers --------------------------------------------------------------------------------------


def _check_elementwise(tx: Any, is_said: bool) -> None:
    why = why_whole(tx)
    if why:
        raise TypeError(f"packed joins parameters, so their update must be elementwise; {why}")
    if why is None and not is_said:
        raise TypeError(
            "packed takes a pair of this package, such as packed(optim.adamw(lr=1e-3)), inside of "
            "chains and wrappers; of another one say packed(tx, elementwise=True), if it is"
        )


def _vectors(
    arrays: Mapping[str, Any], below: int, apart: Collection[str]
) -> Iterator[tuple[str, tuple[tuple[str, Part], ...]]]:
    """The vectors for these parameters, in which those of one shape stand together."""
    small: dict[str, list[str]] = {}
    for name, x in arrays.items():
        if x.size < below and name not in apart and not is_spread(x):
            small.setdefault(str(x.dtype), []).append(name)
    for dtype, names in sorted(small.items()):
        if len(names) < 2:
            continue
        key = f"packed {dtype}"
        while key in arrays:
            key += "'"
        start, parts = 0, []
        for name in names:
            part = Part(start, tuple(arrays[name].shape))
            parts.append((name, part))
            start = part.stop
        yield key, tuple(parts)


def _check_fit(packs: Packs, params: Mapping[str, Any]) -> None:
    for _, parts in packs.vectors:
        dtypes = {}
        for name, part in parts:
            p = params[name]
            if p.shape != part.shape:
                raise ValueError(
                    f"the state was made for {name!r} of shape {part.shape}, got {p.shape}"
                )
            dtypes.setdefault(p.dtype, name)
        if len(dtypes) > 1:
            unlike = {name: str(dtype) for dtype, name in dtypes.items()}
            raise ValueError(f"parameters that are packed together must have one dtype: {unlike}")


def _check_present(packs: Packs, grads: Mapping[str, Any]) -> None:
    for _, parts in packs.vectors:
        absent = [name for name, _ in parts if grads[name] is None]
        if absent and len(absent) < len(parts):
            raise ValueError(
                f"parameters {absent[:5]} have no gradient, but share a step count with the "
                f"{len(parts) - len(absent)} that they are packed with: give them zeros, or do not "
                "pack them (pack=False; packed(..., apart=[...]))"
            )


def _joined(leaves: Sequence[Any]) -> Any:
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        return jax.ShapeDtypeStruct((sum(x.size for x in leaves),), leaves[0].dtype)
    return jnp.concatenate([x.ravel() for x in leaves])


def _known_late(starts: Sequence[Any]) -> list[Any]:
    """Numbers that XLA's CPU backend cannot write into kernels.

    So the parts of one shape have one kernel, which is compiled once: with a thousand parameters,
    seconds in place of minutes. A constant of two different numbers stays outside of kernels.
    """
    pairs = [jnp.asarray(np.array([start, -1], np.int32)) for start in starts]
    return [pair[0] for pair in jax.lax.optimization_barrier(pairs)]
