"""Pickles read without running anything that is in them.

A pickle is a program for a small stack machine, and two kinds of its instructions reach code: those
that name an object of a module, and those that call what was named. This is that machine without
the two: a name becomes a `Global`, a call a `Record` of the call, and nothing is imported, called
or looked up. `interpret` then reads those records that mean data, by their names, and leaves out
the rest.

>>> import io, os, pickle
>>> class Evil:
...     def __reduce__(self):
...         return os.system, ("echo this would run",)
>>> root = load(io.BytesIO(pickle.dumps({"lr": 0.1, "hook": Evil()})))
>>> root["hook"].name, root["hook"].args
('posix.system', ('echo this would run',))
>>> interpret(root)
({'lr': 0.1}, ['hook'])
"""

import math
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

_LARGEST = 10_000_000  # nodes of a tree; references that are followed again count again


class Global(NamedTuple):
    """A name that the file asks for; what would be found under it is not looked up."""

    name: str


class Record:
    """A call that the file asks for, and what it would do with the result.

    Attributes:
      name: what would be called, e.g. ``"collections.OrderedDict"``.
      args: the arguments.
      state: what the result's ``__setstate__`` would get.
      items: what would be set by key.
      values: what would be appended or added.
    """

    __slots__ = ("args", "items", "name", "state", "values")

    def __init__(self, name: str, args: tuple = ()):
        self.name, self.args = name, args
        self.state: Any = None
        self.items: Any = {}
        self.values: Any = []

    def __repr__(self) -> str:
        return f"<{self.name}, not called>"


class _Left:
    """Stands for what is not read."""


LEFT = _Left()


def load(file: BinaryIO, persistent: Callable[[Any], Any] | None = None) -> Any:
    """One pickle, from where the file stands to the pickle's end.

    Args:
      file: an open binary file; it stands behind the pickle afterwards.
      persistent: what a persistent id becomes; by default such ids are an error.

    Returns:
      Numbers, strings, bytes, lists, tuples, dicts and sets as they are; names as `Global`, calls
      as `Record`.

    Raises:
      ValueError: if this is no pickle, or not a whole one.
    """
    machine = _Machine(persistent)
    try:
        for opcode, arg, _ in pickletools.genops(file):
            machine.run(opcode.name, arg)
        (root,) = machine.stack
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a pickle that can be read: {error}") from None
    return root


_CONSTANTS = {
    "NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (),
}  # fmt: skip
_NUMBER_OF_ITEMS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ARGUMENTS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_NEW = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_NOTHING = {"PROTO", "FRAME", "STOP", "READONLY_BUFFER"}


class _Machine:
    def __init__(self, persistent: Callable[[Any], Any] | None):
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.persistent = persistent

    def run(self, name: str, arg: Any) -> None:
        push = self.stack.append
        if name in _ARGUMENTS:
            push(arg)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _NUMBER_OF_ITEMS:
            push(self.pop_many(len(self.stack) - _NUMBER_OF_ITEMS[name]))
        elif name in _NEW:
            push(_NEW[name]())
        elif name in _METHODS:
            _METHODS[name](self, arg)
        elif name not in _NOTHING:
            raise ValueError(f"instruction {name} is not supported")

    def pop_many(self, start: int) -> tuple:
        if start < (self.marks[-1] if self.marks else 0):
            raise IndexError("the stack is too short")
        items = tuple(self.stack[start:])
        del self.stack[start:]
        return items

    def pop(self) -> Any:
        return self.pop_many(len(self.stack) - 1)[0]

    def pop_mark(self) -> tuple:
        items = self.pop_many(self.marks[-1])
        self.marks.pop()
        return items

    # --- the stack and the memo ------------------------------------------------------------------

    def op_mark(self, arg: Any) -> None:
        self.marks.append(len(self.stack))

    def op_pop(self, arg: Any) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def op_pop_mark(self, arg: Any) -> None:
        self.pop_mark()

    def op_dup(self, arg: Any) -> None:
        self.stack.append(self.stack[-1])

    def op_put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def op_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def op_memoize(self, arg: Any) -> None:
        self.op_put(len(self.memo))

    op_binput = op_long_binput = op_put
    op_binget = op_long_binget = op_get

    def op_persid(self, arg: str) -> None:
        if self.persistent is None:
            raise ValueError("it has persistent ids")
        self.stack.append(self.persistent(arg))

    def op_binpersid(self, arg: Any) -> None:
        self.op_persid(self.pop())

    # --- containers ------------------------------------------------------------------------------

    def op_tuple(self, arg: Any) -> None:
        self.stack.append(self.pop_mark())

    def op_list(self, arg: Any) -> None:
        self.stack.append(list(self.pop_mark()))

    def op_dict(self, arg: Any) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.set_items(items)

    def op_frozenset(self, arg: Any) -> None:
        self.stack.append(frozenset(map(_key, self.pop_mark())))

    def op_append(self, arg: Any) -> None:
        self.add_values((self.pop(),))

    def op_appends(self, arg: Any) -> None:
        self.add_values(self.pop_mark())

    op_additems = op_appends

    def op_setitem(self, arg: Any) -> None:
        self.set_items(self.pop_many(len(self.stack) - 2))

    def op_setitems(self, arg: Any) -> None:
        self.set_items(self.pop_mark())

    def add_values(self, values: tuple) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(map(_key, values))
        else:
            (target.values if isinstance(target, Record) else _a(list, target)).extend(values)

    def set_items(self, items: tuple) -> None:
        target = self.stack[-1]
        target = target.items if isinstance(target, Record) else _a(dict, target)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    # --- names and calls, of which only a record is kept -----------------------------------------

    def op_global(self, arg: str) -> None:
        self.stack.append(Global(arg.replace(" ", ".", 1)))

    def op_stack_global(self, arg: Any) -> None:
        module, name = self.pop_many(len(self.stack) - 2)
        self.stack.append(Global(f"{_a(str, module)}.{_a(str, name)}"))

    def op_reduce(self, arg: Any) -> None:
        called, args = self.pop_many(len(self.stack) - 2)
        self.stack.append(Record(_a(Global, called).name, _a(tuple, args)))

    op_newobj = op_reduce

    def op_newobj_ex(self, arg: Any) -> None:
        called, args, kwargs = self.pop_many(len(self.stack) - 3)
        self.stack.append(Record(_a(Global, called).name, _a(tuple, args)))
        self.set_items(tuple(x for item in _a(dict, kwargs).items() for x in item))

    def op_inst(self, arg: str) -> None:
        self.stack.append(Record(arg.replace(" ", ".", 1), self.pop_mark()))

    def op_obj(self, arg: Any) -> None:
        called, *args = self.pop_mark()
        self.stack.append(Record(_a(Global, called).name, tuple(args)))

    def op_build(self, arg: Any) -> None:
        state = self.pop()
        _a(Record, self.stack[-1]).state = state


_METHODS: dict[str, Callable[[_Machine, Any], None]] = {
    name.removeprefix("op_").upper(): method
    for name, method in vars(_Machine).items()
    if name.startswith("op_")
}


def _a(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected a {kind.__name__}, found a {type(value).__name__}")
    return value


def _key(key: Any, depth: int = 4) -> Any:
    """A key of a dict or a set; hashing a deeply nested tuple would overflow the stack."""
    if isinstance(key, tuple) and not isinstance(key, Global):
        if not depth:
            raise ValueError("a key is nested too deeply")
        for part in key:
            _key(part, depth - 1)
    elif isinstance(key, frozenset) or not hasattr(key, "__hash__") or key.__hash__ is None:
        raise TypeError(f"a {type(key).__name__} cannot be a key")
    return key


def _is_data(key: Any) -> bool:
    if isinstance(key, tuple) and not isinstance(key, Global):
        return all(map(_is_data, key))
    return not isinstance(key, Global | Record)


# --- what records mean ---------------------------------------------------------------------------

Meanings = Mapping[str, Callable[[Record], Any]]
"""By name, a function from a record (its parts interpreted already) to the data it means; `LEFT`
where it means none."""


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
    return {**{_key(k): v for k, v in pairs}, **record.items}


def _as_list(record: Record) -> list:
    return [*(record.args[0] if record.args else ()), *record.values]


def _as_set(record: Record) -> set:
    return set(map(_key, _as_list(record)))


def _as_plain_bytes(record: Record) -> bytes:
    (data,) = record.args or (b"",)
    return bytes(_a(bytes, data))


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
