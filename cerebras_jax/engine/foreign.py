"""Any optax factory with the manners of ours: live numbers, None gradients, its name in errors."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cerebras_jax.checks import is_number
from cerebras_jax.engine.trees import align, as_array, check_grads, check_params, leaf_paths
from cerebras_jax.types import Params

Factory = Callable[..., optax.GradientTransformation]

_NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
_PROBE = {"matrix": jax.ShapeDtypeStruct((4, 4), jnp.float32)}


def check_is_pair(tx: Any) -> None:
    """Refuses what is no optax transformation, such as a function that was not called."""
    if not isinstance(tx, optax.GradientTransformation):
        kind = type(tx).__name__
        raise TypeError(f"tx must be an optax pair, such as optim.adamw(lr=1e-3), got {kind}")


def name_of(factory: Factory) -> str:
    """What messages call a factory: ``optax.nadamw``."""
    if isinstance(factory, functools.partial):  # as optax.nadamw is
        factory = factory.func
    module = getattr(factory, "__module__", "").split(".")[0]
    return f"{module}.{getattr(factory, '__name__', repr(factory))}".lstrip(".")


def live_numbers(factory: Factory, hyper: Mapping[str, Any]) -> frozenset[str]:
    """The arguments whose numbers can be traced, so that a new value is no new program.

    An argument that is a whole number by its default or annotation, or that the factory branches
    on in Python, cannot.

    Raises:
      TypeError: if an update cannot be made from gradients, state and parameters alone.
    """
    parameters = inspect.signature(factory).parameters
    candidates = [
        k for k, v in hyper.items() if _has_number(v) and not _is_whole(parameters.get(k), v)
    ]

    def works(traced: list[str]) -> bool:
        def update(numbers: dict[str, Any], g: Any, p: Any) -> Any:
            tx = factory(**{**hyper, **numbers})
            return tx.update(g, tx.init(p), p)

        numbers = {k: jax.tree.map(lambda x: jnp.float32(x), hyper[k]) for k in traced}
        try:
            jax.eval_shape(update, numbers, _PROBE, _PROBE)
        except _NOT_TRACEABLE:
            return False
        except TypeError as error:
            raise TypeError(
                f"{name_of(factory)} cannot be stepped with gradients alone: {error}"
            ) from None
        return True

    if works(candidates):
        return frozenset(candidates)
    return frozenset(k for k in candidates if works([k]))


def _has_number(value: Any) -> bool:
    values = value if isinstance(value, tuple) else (value,)
    return bool(values) and all(is_number(v) for v in values)


def _is_whole(parameter: inspect.Parameter | None, value: Any) -> bool:
    if parameter is None:
        return False
    default = parameter.default
    by_default = isinstance(default, int) and not isinstance(default, bool)
    annotation = str(parameter.annotation)
    return by_default or (
        isinstance(value, int) and "int" in annotation and "float" not in annotation
    )


def adopt(factory: Factory, hyper: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
    """The pair of an optax factory, in which a None gradient holds its parameter and states back.

    Shared scalars, such as optax's step count, belong to the whole tree and move on, unless no
    parameter has a gradient.
    """
    tx = optax.with_extra_args_support(factory(**hyper))

    def init(params: Params) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        check_params(leaves, lambda: leaf_paths(params))
        return tx.init(treedef.unflatten([as_array(x) for x in leaves]))

    def update(grads: Any, state: Any, params: Params = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("update needs the parameters: call update(grads, state, params)")
        names = functools.cache(lambda: leaf_paths(params))
        p_leaves, treedef = jax.tree.flatten(params)
        p_leaves = [as_array(p) for p in p_leaves]
        params = treedef.unflatten(p_leaves)
        g_leaves = align(treedef, grads, "the gradients", names)
        check_grads(g_leaves, p_leaves, names)
        absent = [g is None for g in g_leaves]
        if all(absent) and absent:
            return treedef.unflatten([-jnp.zeros_like(p) for p in p_leaves]), state
        pairs = zip(g_leaves, p_leaves, strict=True)
        filled = treedef.unflatten(
            [jnp.zeros_like(p) if g is None else as_array(g) for g, p in pairs]
        )
        updates, new = tx.update(filled, state, params, **extra)
        if any(absent):
            positions = treedef.unflatten(range(len(absent)))
            mine = _owners(tx, new, positions)
            if mine is None:
                raise TypeError(
                    f"{name_of(factory)} cannot hold a parameter without a gradient back: its init "
                    "computes with the parameters; give it zeros, or its own parameter group"
                )
            leaves, structure = jax.tree.flatten(new)
            before = structure.flatten_up_to(state)
            new = structure.unflatten(
                [
                    old if i is not None and absent[i] else x
                    for i, x, old in zip(mine, leaves, before, strict=True)
                ]
            )
            moved = zip(treedef.flatten_up_to(updates), absent, strict=True)
            updates = treedef.unflatten([-jnp.zeros_like(u) if held else u for u, held in moved])
        return updates, new

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore


class _Owner:
    """Marks a leaf of a state with what it belongs to."""

    def __init__(self, mark: Any):
        self.mark = mark


def _owners(tx: Any, state: Any, marks: Any) -> list[Any] | None:
    """For each leaf of a state the mark of the parameter it belongs to, or None if to none.

    ``marks`` is a tree like the parameters. The result is None if ``tx.init`` computes with the
    parameters, so that optax cannot tell.
    """
    try:
        marked = optax.tree.map_params(
            tx,
            lambda _, mark: _Owner(mark),
            state,
            marks,
            transform_non_params=lambda _: _Owner(None),
        )
    except Exception:  # whatever an init does with a placeholder
        return None
    return [x.mark for x in jax.tree.leaves(marked)]


def owners(factory: Factory, hyper: Mapping[str, Any], state: Any, names: Any) -> list[str | None]:
    """For each leaf of a state the name of the parameter that it belongs to; None: to none.

    Args:
      factory: the factory whose pair made the state.
      hyper: its arguments.
      state: the state, of arrays or shapes.
      names: a tree like the parameters, of their names.
    """
    return _owners(factory(**hyper), state, names) or [None] * len(jax.tree.leaves(state))
