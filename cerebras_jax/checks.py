"""Range checks of hyper-parameters: one sentence with the name, the rule and the value."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

_RULES: dict[str, Callable[[float], bool]] = {
    ">= 0": lambda x: x >= 0,
    "> 0": lambda x: x > 0,
    "> 1": lambda x: x > 1,
    ">= 1": lambda x: x >= 1,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "in (0, 1)": lambda x: 0 < x < 1,
    "<= 0": lambda x: x <= 0,
    "finite": math.isfinite,
}


def is_number(x: Any) -> bool:
    """Whether ``x`` is a number that can be traced: not a bool, not a string, not a schedule."""
    if isinstance(x, bool | np.bool_):
        return False
    if isinstance(x, jax.Array | np.ndarray):
        return jax.numpy.issubdtype(x.dtype, jax.numpy.number)
    return isinstance(x, int | float | np.number)


def is_traced(x: Any) -> bool:
    """Whether the value of ``x`` is known only when a compiled program runs."""
    return isinstance(x, Tracer)


def check(name: str, value: Any, rule: str) -> None:
    """Refuses a hyper-parameter outside its range, NaN and infinity included.

    Schedules and traced values pass: what they will be is not known here.

    Args:
      name: what the message calls it, e.g. ``"betas[0]"``.
      value: a number, a schedule or a tracer.
      rule: one of the keys of ``_RULES``, e.g. ``">= 0"``.

    Raises:
      TypeError: if ``value`` is neither a number nor a schedule.
      ValueError: if the number is not a scalar, or outside its range.

    >>> check("betas[0]", 1.2, "in [0, 1)")
    Traceback (most recent call last):
      ...
    ValueError: betas[0] must be in [0, 1), got 1.2
    """
    if not is_number(value):
        if callable(value):
            return
        raise TypeError(f"{name} must be a number or a schedule, got {value!r}")
    if np.shape(value) != ():
        raise ValueError(f"{name} must be a scalar, got shape {np.shape(value)}")
    if not is_traced(value):
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, got {number:g}")
        if not _RULES[rule](number):
            raise ValueError(f"{name} must be {rule}, got {number:g}")


def check_pair(name: str, value: Any, *rules: str) -> None:
    """Checks a pair such as ``betas``: its length, then each member by its rule.

    >>> check_pair("betas", (0.9,), "in [0, 1)", "in [0, 1)")
    Traceback (most recent call last):
      ...
    ValueError: betas must be 2 numbers, got (0.9,)
    """
    if not isinstance(value, tuple | list) or len(value) != len(rules):
        raise ValueError(f"{name} must be {len(rules)} numbers, got {value!r}")
    for i, (member, rule) in enumerate(zip(value, rules, strict=True)):
        check(f"{name}[{i}]", member, rule)


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Refuses what is not a whole number in its range, or is known only when a program runs.

    >>> check_whole("split", 0, 1)
    Traceback (most recent call last):
      ...
    ValueError: split must be a whole number >= 1, got 0
    """
    rule = f">= {low}" if high is None else f"from {low} to {high}"
    if is_traced(value) or not is_number(value):
        kind = "a traced number" if is_traced(value) else repr(value)
        raise TypeError(f"{name} must be a whole number {rule}, fixed at construction, got {kind}")
    if np.shape(value) != () or value != int(value):
        raise ValueError(f"{name} must be a whole number {rule}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be a whole number {rule}, got {int(value)}")


def check_flag(name: str, value: Any) -> None:
    """Refuses anything but True and False: a flag is decided when the optimizer is made."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_state_dtype(names: Any, state_dtype: Any) -> None:
    """Refuses a ``state_dtype`` that is no floating point dtype, or names an unknown state."""
    if isinstance(state_dtype, dict):
        unknown = sorted(set(state_dtype) - set(names))
        if unknown:
            raise ValueError(f"state_dtype names {unknown}, the states are {list(names)}")
    dtypes = state_dtype.values() if isinstance(state_dtype, dict) else [state_dtype]
    for dtype in dtypes:
        if dtype is not None and not jax.numpy.issubdtype(
            jax.numpy.dtype(dtype), jax.numpy.floating
        ):
            raise ValueError(
                f"state_dtype must be a floating point dtype, got {jax.numpy.dtype(dtype)}"
            )
