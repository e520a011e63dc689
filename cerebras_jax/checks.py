"""Range checks of hyper-parameters: one sentence with the name, the rule and the value."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

import jax
import numpy as np
from jax.core import Tracer

from cerebras_jax.types import Scalar

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


def is_number(x: Any) -> TypeGuard[Scalar]:
    """Whether ``x`` is a real number that can be traced: not a bool, a string, a schedule."""
    if isinstance(x, (int, float)):  # a union would take three times as long
        return not isinstance(x, bool)
    if not isinstance(x, jax.Array | np.ndarray | np.generic):
        return False
    if isinstance(x, np.timedelta64 | np.ma.MaskedArray):
        return False
    kinds = (jax.numpy.floating, jax.numpy.integer)
    return any(jax.numpy.issubdtype(x.dtype, kind) for kind in kinds)


def is_traced(x: Any) -> bool:
    """Whether the value of ``x`` is known only when a compiled program runs."""
    return isinstance(x, Tracer)


def any_traced(values: Iterable[Any]) -> bool:
    """Whether one of many values `is_traced`; by their types, which are few."""
    return any(issubclass(kind, Tracer) for kind in set(map(type, values)))


def shown(value: Any) -> str:
    """``repr(value)`` for a message: of bounded length, whatever the value is."""
    try:
        text = repr(value)
    except Exception:  # a repr of somebody else's, or an int with too many digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:150]} ... {text[-30:]}"


# --- numbers --------------------------------------------------------------------------------------


def check_number(name: str, value: Any, rule: str) -> None:
    """Refuses a number outside its range, NaN and infinity included. Traced numbers pass.

    A number must also be in its range as compiled programs have it: in float32 (float64 under
    x64), where what is too small for a normal number is 0.

    Args:
      name: what the message calls it, e.g. ``"betas[0]"``.
      value: a number or a tracer.
      rule: one of ">= 0", "> 0", "> 1", ">= 1", "in [0, 1)", "in [0, 1]", "in (0, 1)", "<= 0"
        and "finite".

    Raises:
      TypeError: if ``value`` is not a number.
      ValueError: if the number is not a scalar, or outside its range.

    >>> check_number("betas[1]", 1 - 1e-8, "in [0, 1)")
    Traceback (most recent call last):
      ...
    ValueError: betas[1] must be in [0, 1), got 0.99999999, which is 1 in float32
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if not isinstance(value, int | float) and np.shape(value) != ():
        raise ValueError(f"{name} must be a scalar, got shape {np.shape(value)}")
    if not is_traced(value):
        refusal = _refusal(value, rule)
        if refusal:
            raise ValueError(f"{name} {refusal}")


def _refusal(value: Any, rule: str) -> str | None:
    """What is wrong with a concrete number, if anything: "must be >= 0, got -1"."""
    try:
        number = float(value)
    except OverflowError:  # an int that no float holds
        return f"must be finite, got {shown(value)}"
    if not math.isfinite(number):
        return f"must be finite, got {number:g}"
    in_range = _RULES[rule]
    if not in_range(number):
        return f"must be {rule}, got {_short(number)}"
    dtype = jax.dtypes.canonicalize_dtype(float)
    in_program = _in_program(number, dtype)
    if not math.isfinite(in_program) or not in_range(in_program):
        rule = rule if math.isfinite(in_program) else "finite"
        return f"must be {rule}, got {_short(number)}, which is {in_program:g} in {dtype}"
    return None


def _in_program(number: float, dtype: np.dtype) -> float:
    """A number as XLA computes with it: rounded to ``dtype``, subnormal ones as 0."""
    smallest, largest = _NORMAL[dtype]
    if abs(number) < smallest:
        return 0.0
    if abs(number) > largest:
        return math.copysign(math.inf, number)
    return float(dtype.type(number))


_NORMAL = {
    np.dtype(dtype): (float(np.finfo(dtype).tiny), float(np.finfo(dtype).max))
    for dtype in (np.float32, np.float64)
}


def _short(number: float) -> str:
    text = f"{number:g}"
    return text if float(text) == number else repr(number)


# --- numbers and schedules ------------------------------------------------------------------------


def check(name: str, value: Any, rule: str) -> None:
    """Refuses a hyper-parameter outside its range: a number, or a schedule that leaves it.

    A schedule of `cerebras_jax.schedules` is evaluated on the host where it starts, turns and
    ends. Any other function, and what is composed of one, is only asked for its value at step 0:
    how long it will be used is not known here. What depends on traced values passes.

    Args:
      name: what the message calls it, e.g. ``"betas[0]"``.
      value: a number, a tracer, or a function of the step.
      rule: as of `check_number`.

    Raises:
      TypeError: if ``value`` is neither a number nor a schedule of numbers.
      ValueError: if a number is not a scalar, or outside its range, or if the schedule raises.

    >>> check("betas[0]", 1.2, "in [0, 1)")
    Traceback (most recent call last):
      ...
    ValueError: betas[0] must be in [0, 1), got 1.2
    >>> from cerebras_jax import schedules
    >>> check("lr", schedules.linear(0.1, -0.1, 100), ">= 0")
    Traceback (most recent call last):
      ...
    ValueError: lr must be >= 0, got -0.1 at step 100 of linear(initial_learning_rate=0.1,
    end_learning_rate=-0.1, total_iters=100, cycle=False)
    """
    if is_number(value):
        check_number(name, value, rule)
    elif callable(value) and not isinstance(value, type):
        own = getattr(value, "probes", None)
        if own is None:
            check_start(name, value, rule)
        else:
            _check_values(name, value, rule, own)
    else:
        raise TypeError(f"{name} must be a number or a schedule, got {shown(value)}")


def check_start(name: str, schedule: Callable[[Any], Any], rule: str) -> None:
    """Checks a schedule as `check` does, but at step 0 only."""
    _check_values(name, schedule, rule, lambda: [(0, schedule(np.int32(0)))])


def _check_values(name: str, schedule: Any, rule: str, probes: Callable[[], Any]) -> None:
    """Checks the (step, value) pairs that ``probes`` returns, and says so if it fails."""
    try:
        with np.errstate(all="ignore"):
            pairs = probes()
    except Exception as error:
        raise ValueError(
            f"{name} must be a number or a schedule, got {shown(schedule)}, which "
            f"raises {type(error).__name__}: {error}"
        ) from error
    for step, value in pairs:
        where = f"at step {step} of {shown(schedule)}"
        if not is_number(value):
            raise TypeError(f"{name} must be a number at every step, got {shown(value)} {where}")
        if np.shape(value) != ():
            raise ValueError(f"{name} must be a scalar, got shape {np.shape(value)} {where}")
        refusal = None if is_traced(value) else _refusal(value, rule)
        if refusal:
            raise ValueError(f"{name} {refusal} {where}")


def check_pair(name: str, value: Any, *rules: str) -> None:
    """Checks a pair such as ``betas``: its length, then each member by its rule.

    >>> check_pair("betas", (0.9,), "in [0, 1)", "in [0, 1)")
    Traceback (most recent call last):
      ...
    ValueError: betas must be 2 numbers, got (0.9,)
    """
    if not isinstance(value, tuple | list) or len(value) != len(rules):
        raise ValueError(f"{name} must be {len(rules)} numbers, got {shown(value)}")
    for i, (member, rule) in enumerate(zip(value, rules, strict=True)):
        check(f"{name}[{i}]", member, rule)


# --- what is static -------------------------------------------------------------------------------


def check_flag(name: str, value: Any) -> None:
    """Refuses anything but True and False: a flag is decided when the optimizer is made."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Refuses what is not a whole number in its range, or is known only when a program runs.

    >>> check_whole("split", 0, 1)
    Traceback (most recent call last):
      ...
    ValueError: split must be a whole number >= 1, got 0
    """
    rule = f">= {low}" if high is None else f"from {low} to {high}"
    if not isinstance(value, int | np.integer) or isinstance(value, bool | np.timedelta64):
        kind = "a traced number" if is_traced(value) else shown(value)
        raise TypeError(f"{name} must be a whole number {rule}, fixed at construction, got {kind}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be a whole number {rule}, got {shown(value)}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuses anything but one of some words.

    >>> check_choice("mode", "zigzag", ("up", "down"))
    Traceback (most recent call last):
      ...
    ValueError: mode must be one of ['up', 'down'], got 'zigzag'
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {shown(value)}")


def check_state_dtype(names: Sequence[str] | None, state_dtype: Any) -> None:
    """Refuses what is no dtype for states: for all of them, or for some by name.

    Args:
      names: of the states that there are; None where that is not known yet.
      state_dtype: None, a floating point dtype, or ``{name: dtype or None}``.

    Raises:
      TypeError: if something is not a dtype.
      ValueError: if a name is not one of ``names``, or a dtype not floating point or not enabled.

    >>> check_state_dtype(["exp_avg", "exp_avg_sq"], {"exp_avg": "int8"})
    Traceback (most recent call last):
      ...
    ValueError: state_dtype['exp_avg'] must be a floating point dtype, got int8
    """
    if not isinstance(state_dtype, dict):
        _check_floating("state_dtype", state_dtype)
        return
    unknown = [name for name in state_dtype if names is not None and name not in names]
    if names is not None and unknown:
        raise ValueError(f"state_dtype names {shown(unknown)}, the states are {list(names)}")
    for name, dtype in state_dtype.items():
        _check_floating(f"state_dtype[{name!r}]", dtype)


def _check_floating(name: str, value: Any) -> None:
    if value is None or value is float:  # float: JAX's own choice
        return
    if not isinstance(value, str | type | np.dtype):
        raise TypeError(f"{name} must be a dtype, got {shown(value)}")
    try:
        dtype = np.dtype(value)
    except (TypeError, ValueError, SyntaxError):
        raise TypeError(f"{name} must be a dtype, got {shown(value)}") from None
    if not jax.numpy.issubdtype(dtype, jax.numpy.floating):
        raise ValueError(f"{name} must be a floating point dtype, got {dtype}")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name} must be a dtype that is enabled: {dtype} needs jax_enable_x64")
