"""Classes of optimizers, made of pure functions."""

import copyreg
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, cast

import optax

from cerebras_jax.engine.lift import PureOptimizer
from cerebras_jax.optim.makers import ForeignMaker, RuleMaker
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.optim.shell import ShellOptimizer
from cerebras_jax.stateful import freeze

P = ParamSpec("P")


def optimizer_of(
    factory: Callable[..., optax.GradientTransformation],
) -> "type[ShellOptimizer[...]]":
    """The class form of any optax factory: parameter groups, live numbers, state dicts, `trace`.

    The hyper-parameters keep the factory's names. Its numbers are values of the parameter groups
    that take effect at the next step without recompiling, unless the factory needs them as
    Python numbers; schedulers write to ``lr`` or ``learning_rate``, whichever there is.

    Args:
      factory: hyper-parameters -> optax pair, such as ``optax.nadamw`` or one of your own.

    Returns:
      A subclass of `Optimizer`, which takes the parameters and then the factory's arguments; the
      same one for the same factory. Its instances can be pickled if the factory can.

    Raises:
      TypeError: when an optimizer is made, if its update needs more than gradients, state and
        parameters, such as ``value`` or ``value_fn``.

    >>> import jax.numpy as jnp
    >>> opt = optimizer_of(optax.nadamw)({"w": jnp.array([1.0])}, learning_rate=0.1)
    >>> opt.step({"w": jnp.array([1.0])})
    >>> opt.param_groups[0]["learning_rate"] = 0.01
    >>> opt.step({"w": jnp.array([1.0])})
    """
    if not callable(factory):
        raise TypeError(
            f"optimizer_of takes a function that returns an optax pair, got {factory!r}"
        )
    key = _key_of(factory)
    if key is None:
        return _class_of(factory)
    found = _MADE.get(key)
    if found is None:
        found = _MADE[key] = _class_of(factory)
    return found


def _key_of(factory: Any) -> Any:
    """What factories of one class have in common; None: it has no class to share.

    Each copy of a partial is another object, so what is in it counts; 1, 1.0 and True are three.
    """
    parts = factory
    if isinstance(factory, functools.partial):
        parts = factory.func, factory.args, factory.keywords
    arrays: list[Any] = []
    key = freeze(parts, arrays, arrays)
    try:
        hash(key)
    except TypeError:
        return None
    return None if arrays else key


_MADE: weakref.WeakValueDictionary[Any, type[ShellOptimizer]] = weakref.WeakValueDictionary()


def _class_of(factory: Callable[..., Any]) -> type[ShellOptimizer]:
    def reduce(self: Any) -> tuple:
        if type(self) is made:  # pickle cannot look it up by name
            return _blank, (factory,), self.__getstate__()
        return copyreg.__newobj__, (type(self),), self.__getstate__()  # pyright: ignore

    pickled = {"__reduce__": reduce}
    if hasattr(factory, "rule"):
        base = shell_of(ShellOptimizer, cast(Any, factory))
        made = type(base.__name__, (base,), pickled)
        return made
    name = getattr(factory, "__name__", "optimizer")
    attributes = {
        "maker": ForeignMaker(factory),
        "pure": staticmethod(factory),
        "__module__": getattr(getattr(factory, "func", factory), "__module__", __name__),
        "__doc__": f"`{name}` as a class that owns its parameters; see `optimizer_of`.\n\n"
        f"{inspect.getdoc(factory) or ''}",
    }
    made = type(name, (ShellOptimizer,), attributes | pickled)
    return made


def _blank(factory: Callable[..., Any]) -> ShellOptimizer:
    """An instance for `pickle` to fill."""
    return object.__new__(optimizer_of(factory))


def shell_of(
    base: type[Optimizer], pure: PureOptimizer[P], enable_global_step: bool = False
) -> "type[ShellOptimizer[P]]":
    """The base class of the optimizer that applies a pure one; see `Optimizer.of`."""
    base = base if issubclass(base, ShellOptimizer) else ShellOptimizer
    attributes = {
        "pure": staticmethod(pure),
        "maker": RuleMaker(pure.rule),
        "counts_steps": enable_global_step,
    }
    return cast(Any, type(f"{base.__name__}Of{pure.__name__}", (base,), attributes))


Optimizer.class_of = staticmethod(shell_of)
