"""Hyper-parameters: numbers are traced, flags are static, schedules become numbers."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cerebras_jax import checks
from cerebras_jax.engine.rule import has_term
from cerebras_jax.types import Array


class _Number:
    """Marks, among the static leaves, the place of a traced number."""

    def __repr__(self) -> str:
        return "number"

    def __reduce__(self) -> str:
        return "NUMBER"  # there is only one, in copies and pickles too


NUMBER = _Number()


@jax.tree_util.register_static
class Whole(int):
    """A whole number that decides the program: part of a tree's structure, and never traced."""


def whole_arguments(factory: Callable[..., Any]) -> frozenset[str]:
    """The arguments that are annotated ``int``: they decide the program."""
    parameters = inspect.signature(factory).parameters.values()
    return frozenset(p.name for p in parameters if p.annotation in (int, "int"))


def fix_whole(factory: Callable[..., Any], hyper: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters with the whole numbers among them made static."""
    names = whole_arguments(factory)
    return {
        k: Whole(v) if k in names and isinstance(v, int | np.integer) else v
        for k, v in hyper.items()
    }


def is_leaf(x: Any) -> bool:
    """Whether a hyper-parameter is one value to `jax.tree`: None and schedules are."""
    return x is None or callable(x)


def bind(
    factory: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a factory by name, defaults included.

    Raises:
      TypeError: what does not fit, and the name of what was called.
    """
    signature = inspect.signature(factory)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        hints = [
            ("learning_rate", "lr", "the learning rate is called lr"),
            ("lr", "learning_rate", "the learning rate is called learning_rate"),
            ("b1", "betas", "betas=(b1, b2)"),
        ]
        hint = "".join(
            f"; {text}"
            for given, ours, text in hints
            if given in kwargs
            and given not in signature.parameters
            and ours in signature.parameters
        )
        raise TypeError(f"{name}: {error}{hint}") from None
    bound.apply_defaults()
    return bound.arguments


def normalize(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Values in the form in which programs take them.

    Lists become tuples, so that ``betas`` from YAML and from Python are the same structure; whole
    numbers beyond those of a program become floats.
    """
    return {k: tuple(v) if isinstance(v, list) else _narrowed(v) for k, v in hyper.items()}


def _narrowed(x: Any) -> Any:
    is_large = isinstance(x, int) and not isinstance(x, Whole) and abs(x) >= 2**31
    return float(x) if is_large and abs(x) < 2**1023 else x


def partition(
    hyper: Mapping[str, Any], is_number: Callable[[Any], bool] = checks.is_number
) -> tuple[tuple, Any]:
    """Splits hyper-parameters into traced numbers and a hashable static rest."""
    leaves, treedef = jax.tree.flatten(dict(hyper), is_leaf=is_leaf)
    traced = [is_number(x) for x in leaves]
    numbers = tuple(x for x, is_traced in zip(leaves, traced, strict=True) if is_traced)
    static = tuple(NUMBER if is_traced else x for x, is_traced in zip(leaves, traced, strict=True))
    return numbers, (treedef, static)


def combine(numbers: Sequence[Any], static: Any) -> dict[str, Any]:
    """The inverse of `partition`."""
    treedef, leaves = static
    remaining = iter(numbers)
    return jax.tree.unflatten(treedef, [next(remaining) if x is NUMBER else x for x in leaves])


def is_constant_zero(x: Any) -> bool:
    """Whether a term multiplied by x can be left out of the program."""
    return isinstance(x, int | float) and not isinstance(x, bool) and x == 0


def is_live_number(x: Any) -> bool:
    """Whether x is an argument of the program: a number, but not a constant zero."""
    return checks.is_number(x) and not is_constant_zero(x)


def map_schedules(fn: Callable[[Any], Any], hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Applies ``fn`` to every schedule."""
    return jax.tree.map(lambda x: fn(x) if callable(x) else x, dict(hyper), is_leaf=is_leaf)


def schedules_of(hyper: Mapping[str, Any]) -> list[Callable[[Any], Any]]:
    """The schedules among the hyper-parameters."""
    return [x for x in jax.tree.leaves(dict(hyper), is_leaf=is_leaf) if callable(x)]


def at_step(hyper: Mapping[str, Any], count: Any) -> dict[str, Any]:
    """Replaces every schedule by its value at step ``count``."""
    return map_schedules(lambda schedule: as_number(schedule(count)), hyper)


def as_number(x: Any) -> Array:
    """A number as hyper-parameters are kept: float32, or float64 under x64, never less."""
    return jnp.asarray(x, dtype=float)


def saturating_increment(count: Array) -> Array:
    """Adds 1 to a step count, which stays at its largest value instead of overflowing."""
    return jnp.where(count < jnp.iinfo(count.dtype).max, count + 1, count)


def needs_other_buffers(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether states made for ``old`` might lack what ``new`` needs: a flag or a zero changed."""
    before, after = (jax.tree.leaves(dict(h), is_leaf=is_leaf) for h in (old, new))
    return len(before) != len(after) or not all(
        (has_term(a) == has_term(b)) if checks.is_number(a) and checks.is_number(b) else a is b
        for a, b in zip(before, after, strict=True)
    )
