"""Parameter groups by name: globs on the dotted paths of a tree."""

import fnmatch
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import nnx

from cerebras_jax.messages import shown
from cerebras_jax.optim.sources import make_source


class ParamGroups(Sequence[Mapping[str, Any]]):
    """Groups of parameter names, together with the tree or module that the names belong to.

    It is a value: neither its groups nor its arrays change. Every optimizer that is made from it
    starts from the arrays it was made with. A module is no value: the optimizers of one
    `ParamGroups` all update the module itself, in place.

    Attributes:
      tree: the parameters: a pytree of arrays, or the module.
      names: their dotted names, in the order of the tree.

    Args:
      tree: a pytree of arrays or an nnx.Module.
      groups: dicts with the dotted names of their parameters as ``"params"``; every parameter is
        in one of them.

    >>> import jax.numpy as jnp
    >>> groups = ParamGroups({"w": jnp.ones(2)}, [{"params": ["w"], "lr": 0.1}])
    >>> groups[0]["lr"] = 0.2
    Traceback (most recent call last):
      ...
    TypeError: 'mappingproxy' object does not support item assignment
    """

    def __init__(self, tree: Any, groups: Sequence[Mapping[str, Any]]):
        self.names = names_of(tree)
        grouped = [name for group in groups for name in group["params"]]
        if sorted(grouped) != sorted(self.names):
            raise ValueError(
                f"the groups must hold each of {shown(self.names)} once, got {shown(grouped)}"
            )
        self.tree = tree if isinstance(tree, nnx.Module) else jax.tree.map(_own, tree)
        self._groups = tuple(
            {k: tuple(v) if isinstance(v, list) else v for k, v in group.items()}
            for group in groups
        )

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        groups = [MappingProxyType(group) for group in self._groups]
        return groups[index]

    def __len__(self) -> int:
        return len(self._groups)

    def __repr__(self) -> str:
        return repr([{**group, "params": list(group["params"])} for group in self._groups])


def names_of(tree: Any) -> list[str]:
    """The dotted names of all parameters of a tree or module."""
    return list(make_source(tree)[0].names)


def _own(x: Any) -> Any:
    """An array that nobody else can write to."""
    return x if isinstance(x, jax.Array) else jnp.array(x)


def param_groups(params: Any, groups: Sequence[Mapping[str, Any]]) -> ParamGroups:
    """Splits the parameters of a tree into groups by globs on their dotted paths.

    Args:
      params: a pytree of arrays or an nnx.Module.
      groups: ``{"params": pattern or patterns, **values}``; a parameter belongs to the first
        group with a pattern that matches its whole path (``*`` matches dots too). What no group
        takes forms a last group with the optimizer's defaults.

    Returns:
      Groups to give to an optimizer, which keeps the structure of ``params``.

    Raises:
      ValueError: if a pattern matches no parameter, or a group is left empty.

    >>> import jax.numpy as jnp
    >>> tree = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    >>> param_groups(tree, [{"params": ["*bias"], "weight_decay": 0.0}])
    [{'params': ['dense.bias'], 'weight_decay': 0.0}, {'params': ['dense.kernel']}]
    """
    if isinstance(groups, Mapping):
        raise TypeError(f"groups must be a list of dicts, got one dict: {shown(dict(groups))}")
    names = names_of(params)
    remaining = list(names)
    result: list[dict[str, Any]] = []
    for i, group in enumerate(groups):
        patterns = group_patterns(i, group)
        for pattern in patterns:
            if not matching(pattern, names):
                raise ValueError(
                    f"group {i}: pattern {pattern!r} matches none of the parameters {shown(names)}"
                )
        mine = [n for n in remaining if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
        if not mine:
            raise ValueError(f"group {i}: earlier groups already hold all of {patterns}")
        remaining = [n for n in remaining if n not in set(mine)]
        result.append({"params": mine, **{k: v for k, v in group.items() if k != "params"}})
    if remaining:
        result.append({"params": remaining})
    return ParamGroups(params, result)


def group_patterns(index: int, group: Mapping[str, Any]) -> list[str]:
    """The patterns of one group, checked."""
    if not isinstance(group, Mapping):
        raise TypeError(f"group {index} must be a dict, got {shown(group)}")
    patterns = group.get("params")
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list | tuple) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f'group {index}: "params" must be glob patterns, got {shown(patterns)}')
    return list(patterns)


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a glob matches."""
    return [n for n in names if fnmatch.fnmatchcase(n, pattern)]


def is_group_list(params: Any) -> bool:
    """Whether ``params`` is a list of group dicts rather than a tree of parameters."""
    return (
        isinstance(params, list | tuple)
        and len(params) > 0
        and all(isinstance(g, Mapping) and "params" in g for g in params)
    )
