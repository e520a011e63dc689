"""What of an object changes in a step, and what decides which program the step is.

`Stateful` is the one protocol that `cerebras_jax.trace`, pytree registration, copying and pickling
stand on; they know no class.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from cerebras_jax.checks import any_traced, is_traced

OUTSIDE = (
    "{name} from outside was changed in a traced function; make {name} an argument of a function "
    "decorated with cerebras_jax.trace"
)


DROPPED = (
    "a copy of the {name} was stepped in a function that JAX transforms, and nothing was made of "
    "it: jax.jit gives a function copies of its arguments; return it (opt = step(opt, batch)), or "
    "use cerebras_jax.trace, which updates its arguments in place"
)


class Fate:
    """What became of a copy that a transformation of JAX made; says so if a change was lost.

    Attributes:
      change: what to warn of, if nothing is made of a change; None: nothing was changed.
      lost: the same; None once the copy was taken. Copies of it inherit the change.
    """

    change: str | None = None
    lost: str | None = None

    def __del__(self) -> None:
        if self.lost is not None:
            warnings.warn(self.lost, stacklevel=2)


class Parts(NamedTuple):
    """An object taken apart.

    Attributes:
      arrays: a list of arrays, which a step replaces and whose buffers it may give away.
      numbers: a list of numbers: arguments of a step, which stay the caller's.
      static: a hashable value made of everything else. Objects with equal static parts, and
        arrays of equal shapes, share programs.
      refs: the other stateful objects and nnx modules that this one refers to.
    """

    arrays: list[Any]
    numbers: list[Any]
    static: Any
    refs: list[Any]


class Stateful:
    """Base class of what a traced step may change in place, beside nnx modules.

    As it is, every array in the attributes, also within lists, dicts and other pytrees, is
    changeable; everything else is static: two objects that differ in a flag, a float or a string
    never share a program. Instances are pytrees, and can be copied and pickled.

    >>> import jax.numpy as jnp
    >>> import cerebras_jax as cjax
    >>> class Mean(cjax.Stateful):
    ...     def __init__(self, decay):
    ...         self.decay, self.value = decay, jnp.zeros(())
    ...     def update(self, x):
    ...         self.value = self.decay * self.value + (1 - self.decay) * x
    >>> mean = Mean(0.5)
    >>> cjax.trace(lambda mean, x: mean.update(x))(mean, 4.0)
    >>> mean.value
    Array(2., dtype=float32)
    """

    transient: ClassVar[tuple[str, ...]] = ("_lock", "_fate")
    """Attributes that are neither state nor static: caches, which copies do without."""

    special: ClassVar[frozenset[str]] = frozenset()
    """Attributes that a subclass takes apart by itself."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_pytree_with_keys(
            cls,
            lambda obj: _flatten_with_keys(obj),
            lambda aux, children: _unflatten(aux, tuple(children)),
            lambda obj: _flatten(obj),
        )

    # --- the protocol --------------------------------------------------------------------------

    def parts(self) -> Parts:
        """Takes the object apart; nothing is copied, and no device value is read."""
        parts = Parts([], [], None, [])
        static = freeze(self._rest(), parts.arrays, parts.refs)
        return parts._replace(static=(type(self), static))

    def refs(self) -> list[Any]:
        """The references of `parts`, without taking the rest apart."""
        return self.parts().refs

    def restore(self, arrays: list[Any], numbers: list[Any], refs: list[Any] | None = None) -> None:
        """Puts other arrays and numbers, and other references if given, in their places."""
        fill = Fill(iter(arrays), None if refs is None else iter(refs))
        self._refill(fill)

    def array_names(self) -> list[str]:
        """A name for each of the arrays, for key paths and messages."""
        names = []
        for name, value in self._rest().items():
            found: list[Any] = []
            freeze(value, found, [])
            names += [name] if len(found) == 1 else [f"{name}.{i}" for i in range(len(found))]
        return names

    def check(self) -> None:
        """Hook: called before a traced step; refuses values that were edited to nonsense."""

    def as_arguments(self, numbers: list[Any], home: Sharding | None = None) -> list[Any]:
        """Hook: the numbers as arguments of a program, of one type whatever their values.

        They lie where a step leaves them, if that is given; see `home_of`.
        """
        return numbers

    def constants(self) -> list[Any]:
        """Hook: numbers that a step neither reads nor changes, but that copies must keep."""
        return []

    def set_constants(self, constants: list[Any]) -> None:
        """Hook: takes over what `constants` returned."""

    def live(self) -> frozenset[Any]:
        """Hook: which values are numbers of `parts`; if a traced step adds one, it starts over."""
        return frozenset()

    def set_live(self, live: frozenset[Any]) -> None:
        """Hook: takes over what `live` returned."""

    def hints(self) -> Any:
        """Hook: what a traced step may rely on beside the static part, hashable."""

    def take_hints(self, hints: Any) -> None:
        """Hook: takes over the hints as they are after a traced step."""

    def note_change(self, message: str) -> None:
        """Says that it was changed; it warns if it is such a copy, and nothing is made of it."""
        if fate := vars(self).get("_fate"):
            fate.change = fate.lost = message

    def note_use(self) -> None:
        """Says that what it is now is made use of."""
        if fate := vars(self).get("_fate"):
            fate.lost = None

    def _attributes(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in self.transient}

    def _rest(self) -> dict[str, Any]:
        """The attributes that are taken apart by what is in them."""
        apart = _taken_apart(type(self))
        return {k: v for k, v in vars(self).items() if k not in apart}

    def _refill(self, fill: "Fill") -> None:
        for name, value in self._rest().items():
            if (filled := fill(value)) is not value:
                setattr(self, name, filled)

    @property
    def lock(self) -> Any:
        """Held while the object is taken apart, stepped or read: a reentrant lock."""
        lock = self.__dict__.get("_lock")
        return lock if lock is not None else self.__dict__.setdefault("_lock", threading.RLock())

    # --- copies --------------------------------------------------------------------------------

    def skeleton(self) -> Any:
        """A copy without arrays that shares nothing mutable with this object, for `restore`."""
        twin = object.__new__(type(self))
        twin.__dict__.update({k: rebuild(v) for k, v in self._attributes().items()})
        arrays, numbers, _, refs = self.parts()
        twin.restore([_EMPTY] * len(arrays), [_EMPTY] * len(numbers), [_ABSENT] * len(refs))
        return twin

    def __copy__(self) -> Any:
        leaves, treedef = jax.tree.flatten(self)
        return treedef.unflatten(leaves)

    def __getstate__(self) -> dict[str, Any]:
        with self.lock:
            return self._attributes()


@contextlib.contextmanager
def locked(objects: Iterable[Any]) -> Iterator[None]:
    """Holds the locks of several objects at once; what has none, such as None, is passed over.

    They are taken in one order, the same for all callers: two threads that need the same objects
    never wait for each other. Who holds one of them already must not ask for more this way.

    >>> a, b = Stateful(), Stateful()
    >>> with locked([a, b, None]):
    ...     pass
    """
    mine = {id(x): x for x in objects if isinstance(x, Stateful)}
    with contextlib.ExitStack() as stack:
        for _, obj in sorted(mine.items()):
            stack.enter_context(obj.lock)
        yield


# --- attributes -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """Holds the place of an array or a number for something else, such as a sharding."""

    value: Any


_EMPTY = Slot(None)


class _Absent(Stateful):
    """Holds the place of a reference."""


_ABSENT = _Absent()


class _Mark:
    """Stands for an array or a reference among the static parts."""


_MARK = _Mark()


def is_reference(x: Any) -> bool:
    """Whether x is an object with parts of its own."""
    return _is_reference_type(type(x))


def is_nnx(x: Any) -> bool:
    """Whether x is an object of flax: a module, an optimizer, a metric, random streams.

    They are updated in place, like whatever is `Stateful`.
    """
    return isinstance(x, nnx.Pytree)


@functools.cache
def _taken_apart(kind: "type[Stateful]") -> frozenset[str]:
    return kind.special.union(kind.transient)


@functools.cache
def _is_reference_type(kind: type) -> bool:
    return issubclass(kind, Stateful | nnx.Pytree)


def is_array(x: Any) -> bool:
    """Whether x is, or holds the place of, an array."""
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct | Slot) or is_traced(x)


def unslotted(x: Any) -> Any:
    """What a slot holds; other values as they are."""
    return x.value if isinstance(x, Slot) else x


def slotted(x: Any) -> Any:
    """x, in a slot unless it is recognized as an array without one."""
    return x if is_array(x) else Slot(x)


_PLAIN = (type(None), bool, int, float, complex, str, bytes)
"""What there is nothing in: such values are themselves in a key."""


class _Identity:
    """An unhashable value in a key: equal only to itself, and kept alive."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def freeze(x: Any, arrays: list[Any], refs: list[Any]) -> Any:
    """A hashable value for a key; arrays and references are appended to the lists instead.

    Containers are compared by what is in them, so that one that was mutated is another key.
    """
    kind = type(x)
    if isinstance(x, _PLAIN):
        return (kind, x) if x == x else (kind, repr(x))  # NaN is equal to itself here
    if is_array(x):
        arrays.append(unslotted(x))
        return _MARK
    if is_reference(x):
        refs.append(x)
        return _MARK
    if isinstance(x, dict):
        return (kind, *((k, freeze(v, arrays, refs)) for k, v in x.items()))
    if isinstance(x, list | tuple):
        return (kind, *(freeze(v, arrays, refs) for v in x))
    if isinstance(x, set | frozenset):
        return (kind, frozenset(x))
    if not jax.tree_util.all_leaves([x]):
        leaves, treedef = jax.tree.flatten(x)
        return (treedef, *(freeze(v, arrays, refs) for v in leaves))
    try:
        hash(x)
    except TypeError:
        return _Identity(x)
    return (kind, x)


@dataclasses.dataclass
class Fill:
    """Puts other arrays, and other references, in the places where `freeze` found some.

    Mutable containers are kept, and filled.
    """

    arrays: Iterator[Any]
    refs: Iterator[Any] | None

    def __call__(self, x: Any) -> Any:
        if isinstance(x, _PLAIN):
            return x
        if is_array(x):
            return slotted(next(self.arrays))
        if is_reference(x):
            return x if self.refs is None else next(self.refs)
        if isinstance(x, dict):
            for k, v in x.items():
                x[k] = self(v)
            return x
        if isinstance(x, list):
            x[:] = [self(v) for v in x]
            return x
        if isinstance(x, tuple):
            values = [self(v) for v in x]
            return type(x)(*values) if hasattr(x, "_fields") else tuple(values)
        if jax.tree_util.all_leaves([x]):
            return x
        leaves, treedef = jax.tree.flatten(x)
        return treedef.unflatten([unslotted(self(v)) for v in leaves])


def rebuild(x: Any) -> Any:
    """A copy of the containers in x; everything else is shared."""
    if type(x) is dict:
        return {k: rebuild(v) for k, v in x.items()}
    if type(x) is list:
        return [rebuild(v) for v in x]
    if type(x) is tuple:
        return tuple(rebuild(v) for v in x)
    return copy.copy(x) if isinstance(x, dict | list | set) else x


class Memento:
    """What an object is now, containers in its attributes included; `undo` brings it back."""

    def __init__(self, obj: Any):
        self._saved: list[tuple[Any, Any]] = []
        self._note(vars(obj), getattr(obj, "transient", ()))

    def _note(self, container: Any, skip: tuple[str, ...] = ()) -> None:
        if isinstance(container, dict):
            self._saved.append((container, dict(container)))
            values = [v for k, v in container.items() if k not in skip]
        elif isinstance(container, list):
            self._saved.append((container, list(container)))
            values = container
        elif isinstance(container, set):
            self._saved.append((container, set(container)))
            return
        elif isinstance(container, tuple):
            values = container
        else:
            return
        for value in values:
            self._note(value)

    def undo(self) -> None:
        for container, before in self._saved:
            if isinstance(container, list):
                container[:] = before
            else:
                container.clear()
                container.update(before)


# --- pytrees --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Aux:
    """What of an object is not a leaf; two are equal if their keys are."""

    key: Any
    names: tuple[str, ...]
    skeleton: Any
    change: str | None  # of this copy; see `Fate`

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Aux) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def _flatten(obj: Stateful) -> tuple[tuple, _Aux]:
    with obj.lock:
        fate = vars(obj).get("_fate")
        change = None if fate is None else fate.change
        obj.note_use()
        arrays, numbers, static, refs = obj.parts()
        graphdef, modules = nnx.split([r for r in refs if is_nnx(r)])
        others = [r for r in refs if not is_nnx(r)]
        places = tuple(map(is_nnx, refs))
        numbers = [*numbers, *obj.constants()]
        # Without those that are empty: a map may take an empty container for a leaf.
        present = (bool(numbers), bool(others), any(places))
        key = (static, graphdef, places, present, len(arrays))
        aux = _Aux(key, tuple(obj.array_names()), obj.skeleton(), change)
    return (*arrays, *itertools.compress((numbers, others, modules), present)), aux


def _flatten_with_keys(obj: Stateful) -> tuple[tuple, _Aux]:
    children, aux = _flatten(obj)
    _, _, _, present, _ = aux.key
    names = [*aux.names, *itertools.compress(("numbers", "refs", "modules"), present)]
    keys = [jax.tree_util.DictKey(name) for name in names]
    return tuple(zip(keys, children, strict=True)), aux


def _unflatten(aux: _Aux, children: tuple) -> Any:
    _, graphdef, places, present, n = aux.key
    arrays, rest = children[:n], iter(children[n:])
    numbers, others, state = (next(rest) if is_there else [] for is_there in present)
    modules, others = iter(nnx.merge(graphdef, state) if any(places) else ()), iter(others)
    refs = [next(modules) if is_module else next(others) for is_module in places]
    twin = aux.skeleton.skeleton()
    constants = len(twin.constants())
    twin.restore(list(arrays), numbers[: len(numbers) - constants], refs)
    twin.set_constants(numbers[len(numbers) - constants :])
    if "_fate" in twin.transient:
        twin._fate = Fate()
        if aux.change is not None and any_traced(arrays[:1]):  # the result of a loop, say
            twin.note_change(aux.change)
    return twin
