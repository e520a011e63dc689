"""The numbers among a parameter group's values: arguments of a program, not parts of its key."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from cerebras_jax.checks import is_number, is_traced
from cerebras_jax.engine.hyper import NUMBER, is_constant_zero
from cerebras_jax.engine.placement import beside, copy_to
from cerebras_jax.stateful import Slot, freeze, unslotted
from cerebras_jax.types import Array

LEARNING_RATES = ("lr", "learning_rate")

IsLive = Callable[[str, Any], bool]
"""Whether a number under this key is an argument of the program."""


def is_live(key: str, value: Any, was_live: bool) -> bool:
    """Whether a value is an argument of the program.

    Every number is, but for a constant zero that was never another number: its term is left out.
    A learning rate of 0 is about to change.
    """
    if isinstance(value, Slot):
        return True
    if not is_number(value):
        return False
    return not is_constant_zero(value) or was_live or key in LEARNING_RATES


def split(values: Mapping[str, Any], is_live: IsLive) -> tuple[list[Any], tuple]:
    """The live numbers, and a hashable value made of the rest."""
    numbers: list[Any] = []
    static = []
    for key, value in values.items():
        if isinstance(value, tuple):
            static.append((key, tuple(_mark(key, v, is_live, numbers) for v in value)))
        else:
            static.append((key, _mark(key, value, is_live, numbers)))
    return numbers, tuple(static)


class Splits:
    """Remembers how the groups' values were split: from one step to the next few of them change."""

    def __init__(self) -> None:
        self._live: set[Any] = set()
        self._known: dict[tuple[int, str], tuple[Any, list[Any], tuple]] = {}

    def split(
        self, i: int, values: Mapping[str, Any], live: set[tuple[int, str]], is_live: IsLive
    ) -> tuple[list[Any], tuple]:
        """`split` for group ``i``; adds to ``live`` what is an argument from now on."""
        if self._live != live:
            self._live, self._known = set(live), {}
        numbers: list[Any] = []
        marks: list[tuple] = []
        for key, value in values.items():
            hit = self._known.get((i, key))
            if hit is None or hit[0] is not value:
                hit = (value, *split({key: value}, is_live))
                if hit[1]:
                    live.add((i, key))
                if _stays(value):
                    self._known[i, key] = hit
            numbers += hit[1]
            marks += hit[2]
        return numbers, tuple(marks)


def _stays(value: Any) -> bool:
    """Whether a value is split alike as long as it is the same object; tracers are not kept."""
    values = value if type(value) is tuple else (value,)
    return all(isinstance(x, _UNCHANGING) and not is_traced(x) for x in values)


_UNCHANGING = (type(None), bool, int, float, str, jax.Array)


def _mark(key: str, value: Any, is_live: IsLive, numbers: list[Any]) -> Any:
    if is_live(key, value):
        numbers.append(unslotted(value))
        return NUMBER
    if value is None or isinstance(value, bool | str):
        return value
    return Static(value)


class Static:
    """A value that takes part in a key by what it is, and comes back as it was."""

    def __init__(self, value: Any):
        self.value = value
        self.key = freeze(value, [], [])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def join(numbers: Iterable[Any], static: tuple) -> dict[str, Any]:
    """The inverse of `split`."""
    remaining = iter(numbers)

    def value(mark: Any) -> Any:
        if mark is NUMBER:
            x = next(remaining)
            return x if is_number(x) else Slot(x)
        return mark.value if isinstance(mark, Static) else mark

    return {
        key: tuple(value(m) for m in mark) if isinstance(mark, tuple) else value(mark)
        for key, mark in static
    }


def as_argument(x: Any, home: Sharding | None = None) -> Any:
    """A number as an argument of a compiled step: always the same type, whatever the value.

    It lies where those do that a step returns, if that is given; see `home_of`.
    """
    if is_traced(x):
        return x
    dtype = jax.dtypes.canonicalize_dtype(float)
    if isinstance(x, jax.Array):
        return beside(x.astype(dtype), home)
    if home is not None:
        return _at_home(float(x), dtype, home)
    if not jax.sharding.get_abstract_mesh().empty:
        return np.asarray(x, dtype)  # an array made now would belong to the mesh in force
    cached = _on_device(float(x), dtype)
    if cached.is_deleted():
        _on_device.cache_clear()
        cached = _on_device(float(x), dtype)
    return cached


@functools.lru_cache(maxsize=1024)
def _at_home(x: float, dtype: Any, home: Sharding) -> Array:
    with jax.ensure_compile_time_eval():
        return copy_to(np.asarray(x, dtype), home)


@functools.lru_cache(maxsize=1024)
def _on_device(x: float, dtype: Any) -> Array:
    """A constant as an array; learning rates change, most other numbers come again."""
    with jax.ensure_compile_time_eval():
        return jnp.asarray(x, dtype)
