"""Arithmetic of steps that loses nothing, and the shapes between two values."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

INT32_MAX = int(np.iinfo(np.int32).max)


def as_float(x: Any, xp: Any) -> Any:
    return xp.asarray(x, float)


def whole(x: Any) -> Any:
    """A number of steps as an int where int32 holds it, so that differences are exact."""
    if isinstance(x, float) and x.is_integer():
        x = int(x)
    return float(x) if isinstance(x, int) and abs(x) > INT32_MAX else x


def progress(t: Any, total: Any, xp: Any) -> tuple[Any, Any]:
    """(fraction done, fraction left) of ``total`` steps, each exact to rounding, in [0, 1]."""
    total = whole(total)
    done = xp.clip(t, 0, total)
    return as_float(done, xp) / total, as_float(total - done, xp) / total


def power(base: Any, exponent: Any, xp: Any) -> Any:
    """base**exponent for base >= 0; the logarithm of a constant is taken in float64."""
    exponent = as_float(exponent, xp)
    if xp is np or not isinstance(base, int | float):
        return xp.power(base, exponent)
    if base == 0:
        return xp.where(exponent == 0, 1.0, 0.0)
    return xp.exp(exponent * log(base, xp))


def log(x: Any, xp: Any) -> Any:
    """The logarithm of x >= 0; of a constant in float64."""
    if isinstance(x, int | float):
        return math.log(x) if x > 0 else -math.inf
    return xp.log(x)


def cosine(start: Any, end: Any, done: Any, left: Any, xp: Any) -> Any:
    """Half a cosine from start to end, as sin^2 of both fractions: accurate at both ends."""
    return start * xp.sin(np.pi / 2 * left) ** 2 + end * xp.sin(np.pi / 2 * done) ** 2


def line(start: Any, end: Any, done: Any, left: Any, xp: Any) -> Any:
    return start * left + end * done


def one_minus_sqrt(start: Any, end: Any, done: Any, left: Any, xp: Any) -> Any:
    root = xp.sqrt(done)
    return start * (1 - root) + end * root


def geometric(start: Any, end: Any, done: Any, left: Any, xp: Any) -> Any:
    return power(start, left, xp) * power(end, done, xp)


SHAPES: dict[str, Callable[[Any, Any, Any, Any, Any], Any]] = {
    "linear": line,
    "cosine": cosine,
    "1-sqrt": one_minus_sqrt,
    "exponential": geometric,
}
