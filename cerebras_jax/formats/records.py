"""What the calls in a pickle mean, as far as they are data.

`inert.load` notes every call that a pickle asks for. Those that make dicts, lists, bytes and
NumPy's arrays are read here by their names, as are those that a format adds; the rest is left out.

>>> import io, pickle
>>> from collections import OrderedDict
>>> root = inert.load(io.BytesIO(pickle.dumps({"a": OrderedDict(b=1), "c": print})))
>>> interpret(root)
({'a': {'b': 1}}, ['c'])
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cerebras_jax.formats import inert
from cerebras_jax.formats.inert import Global, Record

_LARGEST = 10_000_000  # nodes of a tree; references that are followed again count again


class _Left:
    """Stands for what is not read."""


LEFT = _Left()


Meanings = Mapping[str, Callable[[Record], Any]]
"""By name, a function from a record (its parts interpreted already) to the data it means; `LEFT`
where it means none."""


def _is_data(key: Any) -> bool:
    if isinstance(key, tuple) and not isinstance(key, Global):
        return all(map(_is_data, key))
    return not isinstance(key, Global | Record)


def interpret(root: Any, meanings: Meanings | None = None) -> tuple[Any, list[str]]:
    """The tree with its records read as data, and the paths of those that were left out.

    Args:
      root: what `load` returned.
      meanings: of more names than the standard library's and NumPy's.

    Raises:
      ValueError: if the tree contains itself, is nested too deeply or is unreasonably large.
    """
    reader = _Interpreter({**PLAIN, **(meanings or {})})
    try:
        return reader.read(root, ""), reader.left
    except RecursionError:
        raise ValueError("not data: nested too deeply") from None


class _Interpreter:
    def __init__(self, meanings: Meanings):
        self.meanings = meanings
        self.left: list[str] = []
        self.done: dict[Any, tuple[Any, int]] = {}
        self.active: set[Any] = set()
        self.count = 0

    def read(self, x: Any, path: str, keep_globals: bool = False) -> Any:
        if isinstance(x, Global):
            return x if keep_globals else self.leave(path)
        if not isinstance(x, dict | list | tuple | set | frozenset | Record):
            self.count += 1
            return x
        key = id(x), keep_globals
        if key in self.active:
            raise ValueError(f"not data: {path or 'the tree'} contains itself")
        if key not in self.done:
            self.active.add(key)
            before = self.count
            self.count += 1
            value = self.read_inside(x, path, keep_globals)
            self.done[key] = value, self.count - before
            self.active.discard(key)
        else:
            self.count += self.done[key][1]
        if self.count > _LARGEST:
            raise ValueError(f"not data: more than {_LARGEST:,} values")
        return self.done[key][0]

    def read_inside(self, x: Any, path: str, keep_globals: bool) -> Any:
        below = f"{path}." if path else ""
        if isinstance(x, Record):
            if x.name not in self.meanings:
                return self.leave(path)
            found = Record(x.name)
            found.args = self.read(x.args, path, keep_globals=True)
            found.state = self.read(x.state, path, keep_globals=True)
            found.items = self.read(x.items, path)
            found.values = self.read(x.values, path)
            try:
                value = self.meanings[x.name](found)
            except (TypeError, LookupError, AttributeError) as error:
                raise ValueError(f"{path}: not a {x.name}: {error}") from None
            return self.leave(path) if value is LEFT else value
        if isinstance(x, dict):
            known = {k: v for k, v in x.items() if _is_data(k) or self.leave(f"{below}{k}") is None}
            pairs = ((k, self.read(v, f"{below}{k}")) for k, v in known.items())
            return {k: v for k, v in pairs if v is not LEFT}
        if isinstance(x, set | frozenset):
            return {v for v in x if _is_data(v) or self.leave(path) is None}
        values = [self.read(v, f"{below}{i}", keep_globals) for i, v in enumerate(x)]
        values = [None if v is LEFT and not keep_globals else v for v in values]
        return tuple(values) if isinstance(x, tuple) else values

    def leave(self, path: str) -> _Left:
        self.left = [p for p in self.left if not p.startswith(f"{path}.")] + [path]
        return LEFT


def _as_dict(record: Record) -> dict:
    given = [a for a in record.args if not isinstance(a, Global) and a is not None]
    pairs = given[0].items() if given and isinstance(given[0], dict) else given[0] if given else ()
    return {**{inert.as_key(k): v for k, v in pairs}, **record.items}


def _as_list(record: Record) -> list:
    return [*(record.args[0] if record.args else ()), *record.values]


def _as_set(record: Record) -> set:
    return set(map(inert.as_key, _as_list(record)))


def _as_plain_bytes(record: Record) -> bytes:
    (data,) = record.args or (b"",)
    return bytes(inert.expect(bytes, data))


def _as_dtype(record: Record) -> Any:
    name = record.args[0]
    if not isinstance(name, str) or not re.fullmatch(r"[biufc]\d{1,2}", name):
        return LEFT
    order = record.state[1] if record.state else "="
    return np.dtype(name).newbyteorder(order if order in "<>" else "=")


def _as_bytes(record: Record) -> bytes:
    text, encoding = record.args
    if encoding not in ("latin1", "latin-1"):
        raise TypeError(f"encoding {encoding!r}")
    return text.encode("latin1")


def _from_buffer(data: Any, dtype: Any, shape: tuple, fortran: bool) -> Any:
    if not isinstance(dtype, np.dtype) or isinstance(data, list):
        return LEFT
    data = data.encode("latin1") if isinstance(data, str) else data
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise TypeError(f"{len(data)} bytes for shape {shape} of {dtype}")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="))


def _as_array(record: Record) -> Any:
    _, shape, dtype, fortran, data = record.state
    return _from_buffer(data, dtype, shape, fortran)


def _as_contiguous_array(record: Record) -> Any:
    data, dtype, shape, order = record.args
    return _from_buffer(data, dtype, shape, order == "F")


def _as_scalar(record: Record) -> Any:
    dtype, data = record.args
    array = _from_buffer(data, dtype, (), False)
    return array if array is LEFT else array[()]


PLAIN: Meanings = {
    "collections.OrderedDict": _as_dict,
    "collections.defaultdict": _as_dict,
    "collections.Counter": _as_dict,
    "_codecs.encode": _as_bytes,
    "numpy.dtype": _as_dtype,
    **{
        f"{module}.{name}": meaning
        for module in ("builtins", "__builtin__")
        for name, meaning in (
            ("list", _as_list),
            ("tuple", lambda record: tuple(_as_list(record))),
            ("set", _as_set),
            ("frozenset", _as_set),
            ("bytes", _as_plain_bytes),
            ("bytearray", _as_plain_bytes),
        )
    },
    **{
        f"numpy.{core}.{name}": meaning
        for core in ("core", "_core")
        for name, meaning in (
            ("multiarray._reconstruct", _as_array),
            ("multiarray.scalar", _as_scalar),
            ("numeric._frombuffer", _as_contiguous_array),
        )
    },
}
"""What some names of the standard library and of NumPy mean."""
