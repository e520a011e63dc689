"""Where an optimizer's parameters live: a pytree, or an nnx.Module that is updated in place.

Both show the same face: dotted names, the structure of a tree, and gradients in one fixed order.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cerebras_jax.engine.trees import align, check_distinct, check_params, leaf_paths, own_array
from cerebras_jax.optim.selection import Named, Selection
from cerebras_jax.stateful import OUTSIDE
from cerebras_jax.transforms.accumulate import Accumulation
from cerebras_jax.transforms.loss_scale import scale_loss
from cerebras_jax.types import Array


class TreeSource:
    """The structure of a pytree of arrays; its owner holds the arrays."""

    module = None

    def __init__(self, treedef: Any, names: Sequence[str]):
        self.treedef, self.names = treedef, tuple(names)

    @property
    def marks(self) -> tuple[bool, ...]:
        """For each leaf of the tree, whether it is trained."""
        return (True,) * len(self.names)

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
    def marks(self) -> tuple[bool, ...]:
        return self.is_mine

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

    def others(self) -> list[tuple[nnx.Variable, Any]]:
        """All other variables of the module, with their values: statistics, random streams."""
        mine = set(map(id, self.variables))
        found = (v for _, v in nnx.iter_graph(self.module) if isinstance(v, nnx.Variable))
        return [(v, v.get_value()) for v in found if id(v) not in mine]

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


def hold_back(before: Sequence[tuple[nnx.Variable, Any]], took_step: Any) -> None:
    """Brings variables back to their values before a step, where that is not taken.

    Those that were no arrays, or have another shape now, stay as they are.
    """
    changed = [(v, new, old) for v, old in before if (new := v.get_value()) is not old]
    changed = [(v, new, old) for v, new, old in changed if _kind(new) and _kind(new) == _kind(old)]
    if changed:
        variables, *values = zip(*changed, strict=True)
        for variable, value in zip(variables, _chosen(took_step, *values), strict=True):
            variable.set_value(value)


def _kind(x: Any) -> Any:
    return (x.shape, x.dtype) if isinstance(x, jax.Array) else None


@jax.jit
def _chosen(took_step: Any, new: Sequence[Array], old: Sequence[Array]) -> list[Array]:
    return [jnp.where(took_step, a, b) for a, b in zip(new, old, strict=True)]


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
    return source, [own_array(x) for x in leaves]


# --- the loss ------------------------------------------------------------------------------------


def is_closure(x: Any) -> bool:
    """A function, as opposed to a tree of gradients, which may be callable too."""
    return isinstance(x, functools.partial | jax.tree_util.Partial) or (
        callable(x) and jax.tree_util.all_leaves([x])
    )


def value_and_grad(
    closure: Callable[[Any], Any],
    sources: Sequence[Source],
    leaves: Sequence[Sequence[Any]],
    has_aux: bool,
    loss_scale: Any = None,
    is_list: bool = False,
) -> tuple[Any, list[Any]]:
    """The closure's value and its gradients, of the loss times ``loss_scale`` if that is given.

    Args:
      closure: a function of the parameters, or what `accumulate` returned.
      sources: where the parameters live: one of any kind, or several trees.
      leaves: for each source the values in the order of its tree; those of modules are not read.
      has_aux: the closure returns ``(loss, aux)``.
      loss_scale: see `GradScaler`.
      is_list: whether the closure takes a list of trees, also if there is but one.

    Returns:
      The value, and the gradients of all that is trained in the order of the sources' names.

    Raises:
      TypeError: if the closure does not take the parameters, or there is a module among several.
    """
    if not isinstance(closure, Accumulation):
        _check_closure(closure)
    modules = [s for s in sources if isinstance(s, ModuleSource)]
    if modules and (is_list or len(sources) > 1):
        raise TypeError("a closure over several parameter trees takes no modules")

    def scaled(params: Any) -> Any:
        value = closure(params)
        loss = jnp.asarray(value[0] if has_aux else value)
        return scale_loss(loss, loss_scale), value

    objective, with_aux = (closure, has_aux) if loss_scale is None else (scaled, True)
    if modules:
        if isinstance(closure, Accumulation):
            value, grads = closure.value_and_grad(modules[0].module, loss_scale, modules[0].wrt)
            return value, modules[0].align(grads)
        value, grads = _of_module(objective, modules[0], with_aux)
        return (value if loss_scale is None else value[1]), modules[0].align(grads)

    counts = [len(source.names) for source in sources]

    def whole(mine: Sequence[Sequence[Any]]) -> Any:
        parts = zip(sources, mine, leaves, counts, strict=True)
        trees = [s.tree([*own, *values[n:]]) for s, own, values, n in parts]
        return trees if is_list else trees[0]

    trained = [list(values[:n]) for values, n in zip(leaves, counts, strict=True)]
    if isinstance(closure, Accumulation):
        marks = tuple(mark for source in sources for mark in source.marks)  # pyright: ignore
        value, grads = closure.value_and_grad(whole(trained), loss_scale, marks)
        return value, jax.tree.leaves(grads)
    value, grads = jax.value_and_grad(lambda mine: objective(whole(mine)), has_aux=with_aux)(
        trained
    )
    return (value if loss_scale is None else value[1]), [g for own in grads for g in own]


def _of_module(objective: Callable[[Any], Any], source: ModuleSource, has_aux: bool) -> Any:
    wrt = nnx.DiffState(0, source.wrt)
    try:
        return nnx.value_and_grad(objective, argnums=wrt, has_aux=has_aux)(source.module)
    except ValueError as error:
        if "different trace level" not in str(error):
            raise
        raise RuntimeError(OUTSIDE.format(name="the optimizer")) from error


def _check_closure(closure: Callable[..., Any]) -> None:
    try:
        inspect.signature(closure).bind(None)
    except ValueError:  # no signature to be had
        return
    except TypeError:
        raise TypeError(
            "the closure of step is a function of the parameters, e.g. lambda params: loss(params)"
        ) from None
