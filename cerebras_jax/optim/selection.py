"""Which parameters an optimizer trains, and which are frozen."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from cerebras_jax.engine.trees import leaf_paths, own_array
from cerebras_jax.messages import shown

Filter = str | Callable[[str, Any], bool]
"""A glob on dotted paths (``*`` matches dots too), or a predicate of the path and the array."""


class Selection:
    """The parameters that an optimizer trains, and the tree or module around them; see `select`.

    Attributes:
      tree: the whole tree or module.
      names: the dotted names of what is trained, in the order of the tree.
    """

    def __init__(self, tree: Any, names: Sequence[str]):
        self.tree, self.names = tree, tuple(names)

    def __repr__(self) -> str:
        return f"Selection of {shown(list(self.names))}"


def select(params: Any, wrt: Any) -> Selection:
    """Freezes all parameters but some.

    The result goes where parameters go: to an optimizer, `param_groups` or `muon_groups`. Frozen
    parameters have no state and no step count, need no gradient, and do not count in norms. They
    stay in ``opt.params``, which is what a closure gets, and may be of any dtype.

    Args:
      params: a pytree of arrays or an nnx.Module.
      wrt: what to train: a glob on dotted paths, a predicate ``(path, array) -> bool``, a list of
        these, one of which has to hold, or, for a module, a type of variables as
        ``nnx.LoRAParam``, or an nnx filter made of such.

    Raises:
      TypeError: if wrt is none of these, or params are a selection already.
      ValueError: if a glob matches nothing, or nothing is selected.

    >>> import jax.numpy as jnp
    >>> from cerebras_jax import optim
    >>> params = {"body": jnp.ones(2), "head": {"kernel": jnp.ones(2)}}
    >>> opt = optim.SGD(optim.select(params, "head*"), lr=0.5)
    >>> opt.step(lambda p: (p["body"] * p["head"]["kernel"]).sum())
    Array(2., dtype=float32)
    >>> opt.params
    {'body': Array([1., 1.], dtype=float32), 'head': {'kernel': Array([0.5, 0.5], dtype=float32)}}
    """
    if isinstance(params, Selection):
        raise TypeError("select takes a tree or module, got what it returned; give it one filter")
    if isinstance(params, nnx.Module):
        is_nnx = isinstance(wrt, type) or type(wrt).__module__ == nnx.filterlib.__name__
        flat = nnx.to_flat_state(nnx.state(params, wrt if is_nnx else nnx.Param))
        named = [(_dotted(path), variable.get_value()) for path, variable in flat]
        chosen = [name for name, _ in named] if is_nnx else taken("wrt", wrt, named)
    else:
        named = list(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))
        chosen = taken("wrt", wrt, named)
    if not chosen:
        raise ValueError(f"wrt selects none of the parameters {shown([n for n, _ in named])}")
    return Selection(params, chosen)


def taken(what: str, filters: Any, named: Sequence[tuple[str, Any]]) -> list[str]:
    """The names that at least one of the filters takes, in their order.

    Args:
      what: the name of the argument, for errors.
      filters: a `Filter`, or a list of them.
      named: dotted paths and values.

    Raises:
      TypeError: if a filter is neither a string nor a function, or a predicate returns no bool.
      ValueError: if a filter takes nothing.
    """
    many = filters if isinstance(filters, list | tuple) else [filters]
    if not many or not all(
        isinstance(f, str) or (callable(f) and not isinstance(f, type)) for f in many
    ):
        raise TypeError(
            f"{what} must be glob patterns or predicates (path, array) -> bool, got "
            f"{shown(filters)}"
        )
    found: set[str] = set()
    for one in many:
        mine = [name for name, value in named if _takes(what, one, name, value)]
        if not mine:
            kind = f"pattern {one!r} matches" if isinstance(one, str) else "the predicate takes"
            names = shown([name for name, _ in named])
            raise ValueError(f"{what}: {kind} none of the parameters {names}")
        found.update(mine)
    return [name for name, _ in named if name in found]


def _takes(what: str, one: Filter, name: str, value: Any) -> bool:
    if isinstance(one, str):
        return fnmatch.fnmatchcase(name, one)
    result = one(name, value)
    if not isinstance(result, bool | np.bool_):
        raise TypeError(f"{what}: a predicate must return a bool, got {shown(result)} for {name!r}")
    return bool(result)


def whole(params: Any) -> Any:
    """The tree or module, also of a selection."""
    return params.tree if isinstance(params, Selection) else params


def module_of(params: Any) -> nnx.Module | None:
    """The module that the parameters are in; None for a tree."""
    tree = whole(params)
    return tree if isinstance(tree, nnx.Module) else None


def map_leaves(fn: Callable[[Any], Any], params: Any) -> Any:
    """Maps over the arrays that are selected of a tree; a module stays what it is."""
    if module_of(params) is not None:
        return params
    if not isinstance(params, Selection):
        return jax.tree.map(fn, params)
    names, chosen = leaf_paths(params.tree), set(params.names)
    leaves, treedef = jax.tree.flatten(params.tree)
    new = [fn(x) if n in chosen else x for n, x in zip(names, leaves, strict=True)]
    return Selection(treedef.unflatten(new), params.names)


def frozen_leaves(params: Any) -> list[Any]:
    """The leaves of a selection's tree that are not trained."""
    if not isinstance(params, Selection) or module_of(params) is not None:
        return []
    chosen = set(params.names)
    pairs = zip(leaf_paths(params.tree), jax.tree.leaves(params.tree), strict=True)
    return [own_array(x) if isinstance(x, np.ndarray) else x for n, x in pairs if n not in chosen]


@dataclasses.dataclass(frozen=True)
class Named:
    """The nnx filter of variables with certain dotted names."""

    names: frozenset[str]

    def __call__(self, path: Sequence[Any], value: Any) -> bool:
        return _dotted(path) in self.names


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))
