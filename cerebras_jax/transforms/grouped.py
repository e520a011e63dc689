"""Parameter groups as an optax pair."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from cerebras_jax.engine.trees import align, check_distinct, leaf_paths
from cerebras_jax.types import Params


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Names:
    """The dotted names of each group's parameters, in the order of the tree's leaves."""

    of_group: tuple[tuple[str, ...], ...]


class GroupedState(NamedTuple):
    """State of `grouped`.

    Attributes:
      states: the state of each group's pair, for a tree like the parameters with
        ``optax.MaskedNode`` in place of the other groups' leaves.
      names: static, which parameters each group has.
    """

    states: tuple[Any, ...]
    names: Names


def grouped(
    pairs: Sequence[optax.GradientTransformation], groups: Sequence[Sequence[str]]
) -> optax.GradientTransformationExtraArgs:
    """One pair for each group of parameters.

    ``update`` takes ``groups=``, a list with the overrides of each group; other extra arguments
    go to all pairs. A None gradient is passed on as None.

    Args:
      pairs: the pairs, each of which sees the tree of parameters with its own leaves only.
      groups: for each pair the dotted names of its parameters, which must be all there are.

    Raises:
      ValueError: from ``init`` and ``update``, if a parameter belongs to no group or to several,
        or a name is not in the tree.

    >>> import jax.numpy as jnp
    >>> from cerebras_jax import optim
    >>> params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    >>> tx = grouped([optim.sgd(lr=0.1), optim.sgd(lr=0.0)], [["w"], ["b"]])
    >>> updates, state = tx.update(params, tx.init(params), params, groups=[{"lr": 0.5}, {}])
    >>> updates
    {'b': Array([-0., -0.], dtype=float32), 'w': Array([-0.5, -0.5], dtype=float32)}
    """
    if len(pairs) != len(groups):
        raise ValueError(f"there must be as many pairs as groups, got {len(pairs)}, {len(groups)}")
    check_distinct([name for group in groups for name in group])
    group_of = {name: i for i, group in enumerate(groups) for name in group}
    pairs = [optax.with_extra_args_support(pair) for pair in pairs]

    def split(tree: Params) -> tuple[Any, list[str], list[int]]:
        names = leaf_paths(tree)
        check_distinct(names)
        unknown = [name for name in names if name not in group_of]
        if unknown:
            raise ValueError(f"parameters {unknown[:5]} belong to no group")
        # An outer optax.masked leaves a node in place of a parameter that is not trained.
        masked = leaf_paths(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
        missing = sorted(set(group_of) - set(masked))
        if missing:
            raise ValueError(f"the groups name parameters {missing[:5]}, which the tree has not")
        return jax.tree.structure(tree), names, [group_of[name] for name in names]

    def only(i: int, treedef: Any, leaves: Sequence[Any], owner: Sequence[int]) -> Any:
        return treedef.unflatten(
            [x if g == i else optax.MaskedNode() for x, g in zip(leaves, owner, strict=True)]
        )

    def init(params: Params) -> GroupedState:
        treedef, names, owner = split(params)
        leaves = jax.tree.leaves(params)
        states = tuple(pair.init(only(i, treedef, leaves, owner)) for i, pair in enumerate(pairs))
        of_group = tuple(
            tuple(n for n, g in zip(names, owner, strict=True) if g == i) for i in range(len(pairs))
        )
        return GroupedState(states, Names(of_group))

    def update(
        grads: Any,
        state: GroupedState,
        params: Params = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> tuple[Any, GroupedState]:
        if params is None:
            raise ValueError("update needs the parameters: call update(grads, state, params)")
        treedef, names, owner = split(params)
        p_leaves, g_leaves = (
            jax.tree.leaves(params),
            align(treedef, grads, "the gradients", lambda: names),
        )
        updates: list[Any] = [None] * len(names)
        states = []
        for i, (pair, s) in enumerate(zip(pairs, state.states, strict=True)):
            own = {**extra, **(groups[i] if groups is not None else {})}
            mine = (only(i, treedef, leaves, owner) for leaves in (g_leaves, p_leaves))
            g, p = mine
            u, s = pair.update(g, s, p, **own)
            states.append(s)
            for j, x in enumerate(treedef.flatten_up_to(u)):
                if owner[j] == i:
                    updates[j] = x
        return treedef.unflatten(updates), GroupedState(tuple(states), state.names)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore
