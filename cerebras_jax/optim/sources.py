"""Where an optimizer's parameters live: a pytree, or an nnx.Module that is updated in place.

Both show the same face: dotted names and a flat list of arrays in one fixed order.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from cerebras_jax.rule import align, as_array, check_params, leaf_paths
from cerebras_jax.types import Array

FROM_OUTSIDE = (
    "step was called in a traced function on an optimizer from outside it; make the optimizer an "
    "argument of a function decorated with cerebras_jax.trace"
)


class TreeSource:
    """A pytree of arrays. The source holds the current arrays; ``tree()`` builds the tree."""

    def __init__(self, tree: Any):
        if isinstance(tree, Iterator):
            raise TypeError(
                "the parameters must be a tree of arrays, an nnx.Module, or a list of groups, "
                f"found {type(tree).__name__}"
            )
        leaves, self.treedef = jax.tree.flatten(tree)
        self.names = leaf_paths(tree)
        check_params(leaves, lambda: self.names)
        self.values: list[Array] = [as_array(x) for x in leaves]

    def without_arrays(self) -> "TreeSource":
        """The same source, to be filled by assigning `values`."""
        empty = object.__new__(TreeSource)
        empty.treedef, empty.names, empty.values = self.treedef, self.names, []
        return empty

    def tree(self) -> Any:
        return self.treedef.unflatten(self.values)

    def align(self, grads: Any) -> list[Any]:
        """Gradients in the order of `names`; None where there is none."""
        return align(self.treedef, grads, "the gradients")

    def value_and_grad(self, closure: Callable[[Any], Any], has_aux: bool) -> tuple[Any, Any]:
        return jax.value_and_grad(closure, has_aux=has_aux)(self.tree())

    def __getstate__(self) -> dict[str, Any]:
        # A PyTreeDef with custom nodes cannot be pickled, the tree it describes can.
        state = self.__dict__.copy()
        state["treedef"] = self.treedef.unflatten(range(self.treedef.num_leaves))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, treedef=jax.tree.structure(state["treedef"]))


class ModuleSource:
    """The ``nnx.Param`` variables of a module. They hold the arrays."""

    def __init__(self, module: nnx.Module):
        self.attach(module)
        check_params(self.values, lambda: self.names)

    def attach(self, module: nnx.Module) -> None:
        """Takes ``module``'s variables, which must be those of the module it had before."""
        self.module = module
        flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
        variables = _variables(module)
        self.paths = [path for path, _ in flat]
        self.names = [".".join(map(str, path)) for path in self.paths]
        self.variables = [variables[path] for path in self.paths]

    def without_arrays(self) -> "ModuleSource":
        """A source without a module, to be filled by `attach`."""
        return object.__new__(ModuleSource)

    @property
    def values(self) -> list[Array]:
        return [v.get_value() for v in self.variables]

    @values.setter
    def values(self, values: Sequence[Array]) -> None:
        for variable, value in zip(self.variables, values, strict=True):
            variable.set_value(value)

    def tree(self) -> nnx.Module:
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

    def value_and_grad(self, closure: Callable[[Any], Any], has_aux: bool) -> tuple[Any, Any]:
        wrt = nnx.DiffState(0, nnx.Param)
        try:
            return nnx.value_and_grad(closure, argnums=wrt, has_aux=has_aux)(self.module)
        except ValueError as error:
            if "different trace level" not in str(error):
                raise
            raise RuntimeError(FROM_OUTSIDE) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attach(state["module"])


Source = TreeSource | ModuleSource


def make_source(tree: Any) -> Source:
    """The source for a pytree or a module."""
    return ModuleSource(tree) if isinstance(tree, nnx.Module) else TreeSource(tree)


def _variables(module: nnx.Module) -> dict[tuple, nnx.Variable]:
    """The module's own Param objects by path; ``nnx.state`` gives copies of them."""
    return {path: v for path, v in nnx.iter_graph(module) if isinstance(v, nnx.Param)}
