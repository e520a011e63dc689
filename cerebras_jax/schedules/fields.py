"""The fields of a schedule: what they become when it is made, and which values are refused."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, dataclass_transform

import jax.numpy as jnp
import numpy as np

from cerebras_jax import checks
from cerebras_jax.schedules.arithmetic import INT32_MAX


@dataclass_transform(frozen_default=True)
def frozen(cls: type) -> Any:
    """A frozen dataclass whose sequences are tuples and whose scalars are Python numbers."""
    check = cls.__dict__.get("__post_init__")

    def __post_init__(self: Any) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        if check is not None:
            check(self)
        foreign = [f.name for f in dataclasses.fields(self) if _has_function(getattr(self, f.name))]
        if foreign:
            checks.check_start(foreign[0], self, "finite")

    cls.__post_init__ = __post_init__  # pyright: ignore
    return dataclasses.dataclass(frozen=True)(cls)


def _has_function(x: Any) -> bool:
    """Whether there is a function in it that is no schedule of `Schedule`'s kind."""
    if isinstance(x, tuple):
        return any(map(_has_function, x))
    return callable(x) and not hasattr(x, "probes")


def _plain(x: Any) -> Any:
    """Lists as tuples; scalars of NumPy and JAX as Python's; tracers stay."""
    if isinstance(x, list | tuple):
        return tuple(_plain_scalar(v) for v in x)
    return _plain_scalar(x)


def _plain_scalar(x: Any) -> Any:
    if isinstance(x, bool | np.bool_):
        return bool(x)
    if not checks.is_number(x) or checks.is_traced(x) or np.shape(x):
        return x
    is_int = isinstance(x, int) or jnp.issubdtype(getattr(x, "dtype", float), jnp.integer)
    # What int32 does not hold is a float; what no float holds is refused later.
    return int(x) if is_int and not INT32_MAX < abs(int(x)) < 2**1000 else float(x)


def check_fields(schedule: Any, **rules: Any) -> None:
    """Checks fields: numbers by a rule of `checks.check_number`, flags, one of several words."""
    for name, rule in rules.items():
        value = getattr(schedule, name)
        if rule is bool:
            checks.check_flag(name, value)
        elif isinstance(rule, tuple):
            checks.check_choice(name, value, rule)
        else:
            checks.check_number(name, value, rule)


def check_whole(name: str, value: Any, rule: str) -> None:
    """Refuses what is no whole number that int32 holds; a shape cannot depend on a tracer."""
    checks.check_number(name, value, rule)
    if checks.is_traced(value) or value != int(value) or abs(value) > INT32_MAX:
        raise ValueError(f"{name} must be a whole number up to 2**31 - 1, got {value!r}")


def check_milestones(milestones: Sequence[Any]) -> None:
    if not isinstance(milestones, tuple):
        raise TypeError(f"milestones must be a list of steps, got {checks.shown(milestones)}")
    for i, m in enumerate(milestones):
        checks.check_number(f"milestones[{i}]", m, ">= 0")
    known = [m for m in milestones if not checks.is_traced(m)]
    if any(a >= b for a, b in itertools.pairwise(known)):
        raise ValueError(f"milestones must be increasing, got {list(milestones)}")


def check_lengths(name: str, values: Sequence[Any], milestones: Sequence[Any]) -> None:
    if len(values) != len(milestones) + 1:
        raise ValueError(
            f"{name} must be one more than milestones, got {len(values)} and {len(milestones)}"
        )


def check_function(name: str, function: Any) -> None:
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"{name} must be a schedule, got {checks.shown(function)}")


def check_functions(name: str, functions: Any) -> None:
    if not isinstance(functions, tuple) or not functions:
        raise TypeError(
            f"{name} must be a list of at least one function, got {checks.shown(functions)}"
        )
    for i, function in enumerate(functions):
        check_function(f"{name}[{i}]", function)
