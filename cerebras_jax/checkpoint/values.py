"""Values as JSON: what is no array, and where the arrays are.

Nothing in a file is ever run: of a function, such as a schedule, the repr is stored.
"""

import base64
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from cerebras_jax.messages import shown

# What JSON lacks, as {mark: content}.
_TUPLE, _ITEMS, _BYTES, _COMPLEX, _FLOAT, _ARRAY, _TEXT = (
    f"${kind}" for kind in ("tuple", "items", "bytes", "complex", "float", "array", "repr")
)


def is_array(x: Any) -> bool:
    """Whether a value is stored as an array: NumPy's scalars too, shapes stand for arrays."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def is_plain(x: Any) -> bool:
    """Whether a value is stored as it is."""
    return x is None or isinstance(x, bool | int | float | complex | str | bytes)


def pack(value: Any, where: str, arrays: dict[str, Any] | None) -> Any:
    """A value as JSON; its arrays are added to ``arrays``, by path.

    Args:
      value: numbers, strings, bytes, arrays, and dicts, lists and tuples of them.
      where: the path of the value, for arrays and errors.
      arrays: is added to; None: arrays of one element become numbers, and functions and
        whatever else has a repr becomes that.

    Raises:
      TypeError: names the path of what can not be stored.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(float(value))}
    if isinstance(value, bool | int | float | str) or value is None:
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, complex):
        return {_COMPLEX: [value.real, value.imag]}
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, np.generic) and arrays is None:
        return pack(value.item(), where, arrays)
    if is_array(value):
        if arrays is None:
            return pack(np.asarray(value).tolist(), where, None)
        arrays[where] = value
        return {_ARRAY: where}
    if isinstance(value, list | tuple):
        items = [pack(v, f"{where}.{i}", arrays) for i, v in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: pack(v, f"{where}.{k}", arrays) for k, v in value.items()}
        keys = [pack(k, where, None) for k in value]
        values = [pack(v, f"{where}.{k}", arrays) for k, v in value.items()]
        return {_ITEMS: [list(pair) for pair in zip(keys, values, strict=True)]}
    if arrays is None or callable(value):
        return {_TEXT: repr(value)}
    raise TypeError(
        f"{where} can not be stored: it must be made of numbers, strings, bytes and arrays, "
        f"got {shown(value)}"
    )


def unpack(packed: Any, array: Callable[[str], Any]) -> Any:
    """The value again; ``array`` gives the array of a path. A repr comes back as a `Text`."""
    if isinstance(packed, list):
        return [unpack(x, array) for x in packed]
    if not isinstance(packed, dict):
        return packed
    if len(packed) == 1:
        ((mark, content),) = packed.items()
        makers: dict[str, Callable[[Any], Any]] = {
            _TUPLE: lambda x: tuple(unpack(v, array) for v in x),
            _ITEMS: lambda x: {unpack(k, array): unpack(v, array) for k, v in x},
            _BYTES: base64.b64decode,
            _COMPLEX: lambda x: complex(*x),
            _FLOAT: float,
            _ARRAY: array,
            _TEXT: Text,
        }
        if mark in makers:
            return makers[mark](content)
    return {k: unpack(v, array) for k, v in packed.items()}


class Text(str):
    """The repr of a value that a file can not hold, such as a schedule or a function."""


def shown_packed(packed: Any) -> str:
    """A packed value in messages."""
    value = unpack(packed, str)
    return str(value) if isinstance(value, Text) else shown(value)
