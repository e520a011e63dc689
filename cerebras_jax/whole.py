"""Whole numbers that decide the program: static where other numbers are traced."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from cerebras_jax.checks import is_number, is_traced

F = TypeVar("F", bound=Callable[..., Any])


@jax.tree_util.register_static
class Whole(int):
    """An int that is a part of a tree's structure, and so is never traced."""


def static_whole(value: Any) -> Any:
    """A whole number as a `Whole`; everything else as it is."""
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return Whole(value) if is_whole else value


def whole_numbers(*names: str) -> Callable[[F], F]:
    """Decorates a pure optimizer whose arguments ``names`` are whole numbers known to the trace.

    The program depends on them, as a number of iterations or of pieces: another value is another
    program. They are no numbers to schedule or to override.
    """

    def decorate(pure: F) -> F:
        signature = inspect.signature(pure)

        @functools.wraps(pure)
        def optimizer(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return pure(*args, **kwargs)  # which says what does not fit
            bound.apply_defaults()
            for name in names:
                bound.arguments[name] = static_whole(bound.arguments[name])
            return pure(*bound.args, **bound.kwargs)

        optimizer.__signature__ = signature  # pyright: ignore
        optimizer.whole_numbers = names  # pyright: ignore
        return optimizer  # pyright: ignore

    return decorate


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Refuses what is not a whole number in its range, or is known only when a program runs.

    >>> check_whole("split", 0, 1)
    Traceback (most recent call last):
      ...
    ValueError: split must be a whole number >= 1, got 0
    """
    rule = f">= {low}" if high is None else f"from {low} to {high}"
    if is_traced(value) or callable(value) or not is_number(value):
        kind = "a traced number" if is_traced(value) else repr(value)
        raise TypeError(f"{name} must be a whole number {rule}, fixed at construction, got {kind}")
    if np.shape(value) != () or value != int(value):
        raise ValueError(f"{name} must be a whole number {rule}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be a whole number {rule}, got {int(value)}")
