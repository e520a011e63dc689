"""Where an optimizer's parameters live: a pytree, or an nnx.Module that is updated in place.

Both show the same face: dotted names, the structure of a tree, and gradients in one fixed order.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from cerebras_jax.engine.trees import align, as_array, check_distinct, check_params, leaf_paths
from cerebras_jax.optim.selection import Named, Selection
from cerebras_jax.stateful import OUTSIDE
from cerebras_jax.types import Array


class TreeSource:
    """The structure of a pytree of arrays; its owner holds the arrays."""

    module = None

    def __init__(self, treedef: Any, names: Sequence[str]):
        self.treedef, self.names = treedef, tuple(names)

    @property
    def key(self) -> Any:
        return self.treedef

    def tree(self, values: Sequence[Array]) -> Any:
        """The values in the structure that was given."""
        return self.treedef.unflatten(values)

    def given(self, values: Sequence[Any]) -> Any:
        """What the source was made of, with other values."""
        return self.tree(values)

    def align(self, grads: Any) -> list[Any]:
        """Gradients in the order of `names`; None where there is none."""
        return align(self.treedef, grads, "the gradients", lambda: self.names)

    def value_and_grad(
        self, closure: Callable[[Any], Any], values: Sequence[Array], has_aux: bool
    ) -> tuple[Any, Any]:
        """The closure's value and its gradients."""
        return jax.value_and_grad(closure, has_aux=has_aux)(self.tree(values))


class PartSource(TreeSource):
    """The structure of a pytree of which some leaves are trained.

    Where it takes values of a tree, those of the frozen leaves come after the others.
    """

    def __init__(self, whole: Any, paths: Sequence[str], names: Sequence[str]):
        self.whole, self.paths = whole, tuple(paths)
        chosen = set(names)
        self.is_mine = tuple(path in chosen for path in paths)
        marks = whole.unflatten([0 if mine else None for mine in self.is_mine])
        super().__init__(jax.tree.structure(marks), names)

    @property
    def key(self) -> Any:
        return self.whole, self.is_mine

    def tree(self, values: Sequence[Any]) -> Any:
        """The whole tree."""
        n = len(self.names)
        mine, others = iter(values[:n]), iter(values[n:])
        return self.whole.unflatten([next(mine if is_mine else others) for is_mine in self.is_mine])

    def given(self, values: Sequence[Any]) -> Any:
        """The selection that the source was made of, with other values."""
        return Selection(self.tree(values), self.names)

    def align(self, grads: Any) -> list[Any]:
        """Gradients of what is trained, from a tree like the whole; the others may be None."""
        found = align(self.whole, grads, "the gradients", lambda: self.paths)
        return [g for g, is_mine in zip(found, self.is_mine, strict=True) if is_mine]

    def value_and_grad(
        self, closure: Callable[[Any], Any], values: Sequence[Array], has_aux: bool
    ) -> tuple[Any, Any]:
        """The closure's value and the gradients of what is trained."""
        n = len(self.names)

        def of_mine(mine: Sequence[Any]) -> Any:
            return closure(self.tree([*mine, *values[n:]]))

        value, grads = jax.value_and_grad(of_mine, has_aux=has_aux)(list(values[:n]))
        return value, self.tree([*grads, *[None] * (len(self.is_mine) - n)])


class ModuleSource:
    """Variables of a module, all of ``nnx.Param`` or those of some names. They hold the arrays."""

    def on(self, module: Any) -> "ModuleSource":
        """The same variables of another module, or of something that holds its place."""
        if isinstance(module, nnx.Module):
            return ModuleSource(module, self.wrt)
        source = object.__new__(ModuleSource)
        source.module, source.paths, source.names, source.variables = None, [], (), []
        source.wrt = self.wrt
        return source

    def __init__(self, module: nnx.Module, wrt: Any = nnx.Param):
        state = nnx.state(module, wrt)
        flat = nnx.to_flat_state(state)
        variables = {p: v for p, v in nnx.iter_graph(module) if isinstance(v, nnx.Variable)}
        self.module, self.wrt = module, wrt
        self.paths = [path for path, _ in flat]
        self.names = tuple(".".join(map(str, path)) for path in self.paths)
        self.variables = [variables[path] for path in self.paths]
        self.treedef = jax.tree.structure(state)

    @property
    def key(self) -> Any:
        return self.names

    @property
    def values(self) -> list[Array]:
        return [v.get_value() for v in self.variables]

    @values.setter
    def values(self, values: Sequence[Array]) -> None:
        for variable, value in zip(self.variables, values, strict=True):
            variable.set_value(value)

    def tree(self, values: Sequence[Array]) -> nnx.Module:
        """The module."""
        return self.module

    def given(self, values: Sequence[Any]) -> Any:
        """What the source was made of."""
        return Selection(self.module, self.names) if isinstance(self.wrt, Named) else self.module

    def align(self, grads: Any) -> list[Any]:
        """Gradients from ``nnx.grad`` (a State or a module), in the order of `names`."""
        if isinstance(grads, nnx.Module):
            grads = nnx.state(grads, self.wrt)
        if not isinstance(grads, nnx.State | dict):
            raise TypeError(
                f"the gradients of a module must be an nnx.State, found {type(grads).__name__}"
            )
        flat = dict(nnx.to_flat_state(nnx.State(grads)))
        if isinstance(self.wrt, Named):  # gradients of frozen variables do not matter
            variables = {p for p, v in nnx.iter_graph(self.module) if isinstance(v, nnx.Variable)}
            frozen = variables - set(self.paths)
            flat = {p: g for p, g in flat.items() if p not in frozen}
        missing = [n for n, p in zip(self.names, self.paths, strict=True) if p not in flat]
        extra = [".".join(map(str, p)) for p in flat if p not in set(self.paths)]
        if missing or extra:
            raise ValueError(
                "the gradients must have the structure of the parameters; "
                f"missing: {missing[:5]}; unexpected: {extra[:5]}"
            )
        values = [flat[path] for path in self.paths]
        return [v.get_value() if isinstance(v, nnx.Variable) else v for v in values]

    def value_and_grad(
        self, closure: Callable[[Any], Any], values: Sequence[Array], has_aux: bool
    ) -> tuple[Any, Any]:
        """The closure's value and its gradients."""
        wrt = nnx.DiffState(0, self.wrt)
        try:
            return nnx.value_and_grad(closure, argnums=wrt, has_aux=has_aux)(self.module)
        except ValueError as error:
            if "different trace level" not in str(error):
                raise
            raise RuntimeError(OUTSIDE.format(name="the optimizer")) from error


Source = TreeSource | ModuleSource


def make_source(tree: Any) -> tuple[Source, list[Array]]:
    """The source for a pytree or a module, and its values.

    Raises:
      TypeError: if a leaf is not a floating point or complex array.
      ValueError: if there are no parameters, or two have the same dotted name.
    """
    if isinstance(tree, Selection):
        return _of_selection(tree)
    if isinstance(tree, nnx.Module):
        source = ModuleSource(tree)
        leaves = source.values
    elif tree is None or isinstance(tree, Iterator):
        raise TypeError(
            "the parameters must be a tree of arrays, an nnx.Module, or a list of groups, "
            f"found {type(tree).__name__}"
        )
    else:
        leaves, treedef = jax.tree.flatten(tree)
        source = TreeSource(treedef, leaf_paths(tree))
    return _checked(source, leaves)


def _of_selection(selection: Selection) -> tuple[Source, list[Array]]:
    if isinstance(selection.tree, nnx.Module):
        source = ModuleSource(selection.tree, Named(frozenset(selection.names)))
        return _checked(source, source.values)
    leaves, treedef = jax.tree.flatten(selection.tree)
    source = PartSource(treedef, leaf_paths(selection.tree), selection.names)
    check_distinct(source.paths)
    mine = [x for x, is_mine in zip(leaves, source.is_mine, strict=True) if is_mine]
    return _checked(source, mine)


def _checked(source: Source, leaves: list[Any]) -> tuple[Source, list[Array]]:
    if not leaves:
        raise ValueError("an optimizer got an empty parameter list")
    check_distinct(source.names)
    check_params(leaves, lambda: source.names)
    return source, [as_array(x) for x in leaves]
