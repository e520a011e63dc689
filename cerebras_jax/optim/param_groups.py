"""Parameter groups by name: globs on the dotted paths of a tree."""

import fnmatch
import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, overload

import jax
import jax.numpy as jnp
import optax

from cerebras_jax import schedules
from cerebras_jax.engine.trees import leaf_paths
from cerebras_jax.messages import shown
from cerebras_jax.optim.selection import Selection, map_leaves, taken
from cerebras_jax.optim.sources import make_source
from cerebras_jax.transforms.grouped import grouped


class ParamGroups(Sequence[Mapping[str, Any]]):
    """Groups of parameter names, together with the tree or module that the names belong to.

    It is a value: neither its groups nor its arrays change. Every optimizer that is made from it
    starts from the arrays it was made with. A module is no value: the optimizers of one
    `ParamGroups` all update the module itself, in place.

    Attributes:
      tree: the parameters: a pytree of arrays, or the module.
      names: their dotted names, in the order of the tree.

    Args:
      tree: a pytree of arrays, an nnx.Module, or what `select` made of one.
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
        self.tree = map_leaves(_own, tree)
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

    def transformation(self, pure: Any, **values: Any) -> optax.GradientTransformationExtraArgs:
        """The pure form of an optimizer with these groups: an optax pair for the whole tree.

        Args:
          pure: a function from hyper-parameters to an optax pair, such as ``optim.adamw``.
          **values: hyper-parameters of all groups. A group's own values come first, but where
            ``lr`` is a schedule it drives all groups, times their ``adjust_learning_rate``.

        >>> import jax.numpy as jnp
        >>> from cerebras_jax import optim
        >>> params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
        >>> groups = param_groups(params, [{"params": "bias", "weight_decay": 0.0}])
        >>> tx = groups.transformation(optim.sgd, lr=1.0, weight_decay=0.5)
        >>> grads = {"kernel": jnp.zeros(2), "bias": jnp.ones(2)}
        >>> tx.update(grads, tx.init(params), params)[0]
        {'bias': Array([-1., -1.], dtype=float32), 'kernel': Array([-0.5, -0.5], dtype=float32)}
        """
        known = inspect.signature(pure).parameters
        pairs = []
        for group in self:
            own = {**values, **{k: v for k, v in group.items() if k in known}}
            if callable(values.get("lr")):
                factor = group.get("adjust_learning_rate", 1.0)
                own["lr"] = values["lr"] if factor == 1 else schedules.scaled(values["lr"], factor)
            pairs.append(pure(**own))
        names = [group["params"] for group in self]
        if isinstance(self.tree, Selection):
            frozen = sorted(set(leaf_paths(self.tree.tree)) - set(self.names))
            return grouped([*pairs, optax.set_to_zero()], [*names, frozen])
        return grouped(pairs, names)


def names_of(tree: Any) -> list[str]:
    """The dotted names of all parameters of a tree or module."""
    return list(make_source(tree)[0].names)


def _own(x: Any) -> Any:
    """An array that nobody else can write to; a shape stays one."""
    return x if isinstance(x, jax.Array | jax.ShapeDtypeStruct) else jnp.array(x)


def param_groups(
    params: Any, groups: Sequence[Mapping[str, Any]], order: Sequence[str] | None = None
) -> ParamGroups:
    """Splits the parameters of a tree into groups by their dotted paths and arrays.

    Args:
      params: a pytree of arrays, an nnx.Module, or what `select` made of one.
      groups: ``{"params": filter or filters, **values}``. A filter is a glob that matches whole
        paths (``*`` matches dots too), or a predicate ``(path, array) -> bool``; a parameter
        belongs to the first group with a filter that takes it. What no group takes forms a last
        group with the optimizer's defaults.
      order: all dotted names in the order that the members of each group shall have, and with
        them the state dict; for instance torch's. None: the order of the tree, where the keys of
        dicts are sorted.

    Returns:
      Groups to give to an optimizer, which keeps the structure of ``params``.

    Raises:
      TypeError: if a group is no dict of this form, or a predicate returns no bool.
      ValueError: if a filter takes no parameter, a group is left empty, or order does not hold
        every name once.

    >>> import jax.numpy as jnp
    >>> tree = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    >>> param_groups(tree, [{"params": ["*bias"], "weight_decay": 0.0}])
    [{'params': ['dense.bias'], 'weight_decay': 0.0}, {'params': ['dense.kernel']}]
    >>> param_groups(tree, [{"params": lambda path, x: x.ndim == 2, "lr": 0.1}])
    [{'params': ['dense.kernel'], 'lr': 0.1}, {'params': ['dense.bias']}]
    """
    if isinstance(groups, Mapping):
        raise TypeError(f"groups must be a list of dicts, got one dict: {shown(dict(groups))}")
    source, values = make_source(params)
    named = list(zip(source.names, values, strict=True))
    remaining = _ordered(order, source.names)
    result: list[dict[str, Any]] = []
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping):
            raise TypeError(f"group {i} must be a dict, got {shown(group)}")
        filters = group.get("params")
        takes = set(taken(f'group {i}: "params"', filters, named))
        mine = [n for n in remaining if n in takes]
        if not mine:
            raise ValueError(f"group {i}: earlier groups already hold all of {shown(filters)}")
        remaining = [n for n in remaining if n not in takes]
        result.append({"params": mine, **{k: v for k, v in group.items() if k != "params"}})
    if remaining:
        result.append({"params": remaining})
    return ParamGroups(params, result)


def _ordered(order: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """The names in the order that was asked for."""
    if order is None:
        return list(names)
    order = list(order)
    if sorted(order) != sorted(names):
        missing, unknown = sorted(set(names) - set(order)), sorted(set(order) - set(names))
        raise ValueError(
            f"order must hold every parameter once; missing: {missing[:5]}, unknown: {unknown[:5]}"
        )
    return order


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
