"""Where an optimizer's parameters live: a pytree, or an nnx.Module that is updated in place.

Both show the same face: dotted names, the structure of a tree, and gradients in one fixed order.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from cerebras_jax.engine.trees import align, as_array, check_distinct, check_params, leaf_paths
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

    def align(self, grads: Any) -> list[Any]:
        """Gradients in the order of `names`; None where there is none."""
        return align(self.treedef, grads, "the gradients", lambda: self.names)

    def value_and_grad(
        self, closure: Callable[[Any], Any], values: Sequence[Array], has_aux: bool
    ) -> tuple[Any, Any]:
        """The closure's value and its gradients."""
        return jax.value_and_grad(closure, has_aux=has_aux)(self.tree(values))


class ModuleSource:
    """The ``nnx.Param`` variables of a module. They hold the arrays."""

    @classmethod
    def of(cls, module: Any) -> "ModuleSource":
        """The source of a module, or of something that holds its place."""
        return cls(module) if isinstance(module, nnx.Module) else cls.empty()

    @classmethod
    def empty(cls) -> "ModuleSource":
        """A source that holds the place of one."""
        source = object.__new__(cls)
        source.module, source.paths, source.names, source.variables = None, [], (), []
        return source

    def __init__(self, module: nnx.Module):
        state = nnx.state(module, nnx.Param)
        flat = nnx.to_flat_state(state)
        variables = {p: v for p, v in nnx.iter_graph(module) if isinstance(v, nnx.Param)}
        self.module = module
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

    def align(self, grads: Any) -> list[Any]:
        """Gradients from ``nnx.grad`` (a State or a module), in the order of `names`."""
        if isinstance(grads, nnx.Module):
            grads = nnx.state(grads, nnx.Param)
        if not isinstance(grads, nnx.State | dict):
            raise TypeError(
                f"the gradients of a module must be an nnx.State, found {type(grads).__name__}"
            )
        flat = dict(nnx.to_flat_state(nnx.State(grads)))
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
        wrt = nnx.DiffState(0, nnx.Param)
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
    if not leaves:
        raise ValueError("an optimizer got an empty parameter list")
    check_distinct(source.names)
    check_params(leaves, lambda: source.names)
    return source, [as_array(x) for x in leaves]
