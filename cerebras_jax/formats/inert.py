"""Pickles read without running anything that is in them.

A pickle is a program for a small stack machine, and two kinds of its instructions reach code: those
that name an object of a module, and those that call what was named. This is that machine without
the two: a name becomes a `Global`, a call a `Record` of the call, and nothing is imported, called
or looked up. `records.interpret` then reads what means data, and leaves out the rest.

>>> import io, os, pickle
>>> class Evil:
...     def __reduce__(self):
...         return os.system, ("echo this would run",)
>>> root = load(io.BytesIO(pickle.dumps({"lr": 0.1, "hook": Evil()})))
>>> root["hook"].name, root["hook"].args
('posix.system', ('echo this would run',))
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, Protocol, cast


class Global(NamedTuple):
    """A name that the file asks for; what would be found under it is not looked up."""

    name: str


class Readable(Protocol):
    """What pickles are read from: an open file, or one that is mapped, which cannot be asked for
    more than there is."""

    def read(self, n: int = ..., /) -> bytes: ...
    def readline(self) -> bytes: ...


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


def load(file: Readable, persistent: Callable[[Any], Any] | None = None) -> Any:
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
        for opcode, arg, _ in pickletools.genops(cast(BinaryIO, file)):
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
        self.stack.append(frozenset(map(as_key, self.pop_mark())))

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
            target.update(map(as_key, values))
        else:
            (target.values if isinstance(target, Record) else expect(list, target)).extend(values)

    def set_items(self, items: tuple) -> None:
        target = self.stack[-1]
        target = target.items if isinstance(target, Record) else expect(dict, target)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[as_key(key)] = value

    # --- names and calls, of which only a record is kept -----------------------------------------

    def op_global(self, arg: str) -> None:
        self.stack.append(Global(arg.replace(" ", ".", 1)))

    def op_stack_global(self, arg: Any) -> None:
        module, name = self.pop_many(len(self.stack) - 2)
        self.stack.append(Global(f"{expect(str, module)}.{expect(str, name)}"))

    def op_reduce(self, arg: Any) -> None:
        called, args = self.pop_many(len(self.stack) - 2)
        self.stack.append(Record(expect(Global, called).name, expect(tuple, args)))

    op_newobj = op_reduce

    def op_newobj_ex(self, arg: Any) -> None:
        called, args, kwargs = self.pop_many(len(self.stack) - 3)
        self.stack.append(Record(expect(Global, called).name, expect(tuple, args)))
        self.set_items(tuple(x for item in expect(dict, kwargs).items() for x in item))

    def op_inst(self, arg: str) -> None:
        self.stack.append(Record(arg.replace(" ", ".", 1), self.pop_mark()))

    def op_obj(self, arg: Any) -> None:
        called, *args = self.pop_mark()
        self.stack.append(Record(expect(Global, called).name, tuple(args)))

    def op_build(self, arg: Any) -> None:
        state = self.pop()
        expect(Record, self.stack[-1]).state = state


_METHODS: dict[str, Callable[[_Machine, Any], None]] = {
    name.removeprefix("op_").upper(): method
    for name, method in vars(_Machine).items()
    if name.startswith("op_")
}


def expect(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected a {kind.__name__}, found a {type(value).__name__}")
    return value


def as_key(key: Any, depth: int = 4) -> Any:
    """A key of a dict or a set; hashing a deeply nested tuple would overflow the stack."""
    if isinstance(key, tuple) and not isinstance(key, Global):
        if not depth:
            raise ValueError("a key is nested too deeply")
        for part in key:
            as_key(part, depth - 1)
    elif isinstance(key, frozenset) or not hasattr(key, "__hash__") or key.__hash__ is None:
        raise TypeError(f"a {type(key).__name__} cannot be a key")
    return key
