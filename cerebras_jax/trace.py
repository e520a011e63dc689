"""Whole-graph compile: one training step, one XLA program, arguments updated in place."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cerebras_jax.checks import is_number, is_traced
from cerebras_jax.interrupts import deferred_interrupts
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.optim.scheduler import Scheduler
from cerebras_jax.optim.sources import ModuleSource
from cerebras_jax.optim.step import as_argument
from cerebras_jax.ownership import unshared

P = ParamSpec("P")
R = TypeVar("R")


def trace(fn: Callable[P, R]) -> Callable[P, R]:
    """Compiles a training step as one program that updates its stateful arguments in place.

    Optimizers, schedulers and nnx modules, wherever they are in the arguments, are updated in
    place: inside, they are used as in ordinary Python. Their buffers are donated, so a step
    needs no second copy of parameters and state. A new learning rate, or any other number edited
    in a group between calls, does not recompile; another structure, shape or flag does.

    Numbers and arrays are traced; bool, str, None and other hashable arguments are static.
    Arrays of an optimizer or a module that somebody else still holds stay valid: they are copied
    before their buffers would be given away.

    Args:
      fn: a function that may call ``optimizer.step`` and ``scheduler.step``. It runs in Python
        only while it is compiled.

    Returns:
      A function with fn's signature and result. If fn raises, every argument is as before.

    Raises:
      RuntimeError: if fn changes the structure of an argument, e.g. adds a parameter group.

    >>> from cerebras_jax import optim
    >>> opt = optim.SGD({"w": jnp.array([1.0, 2.0])}, lr=0.5)
    >>> @trace
    ... def train_step(opt, batch):
    ...     return opt.step(lambda params: (params["w"] * batch).sum())
    >>> float(train_step(opt, jnp.array([1.0, 1.0])))
    3.0
    >>> opt.params["w"]
    Array([0.5, 1.5], dtype=float32)
    """
    compiled = jax.jit(functools.partial(_run, fn), static_argnums=0, donate_argnums=1)

    @functools.wraps(fn)
    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        call = _Call((args, kwargs))
        donated, numbers, inputs = call.inputs()
        with deferred_interrupts():
            try:
                arrays, changed, out = compiled(call, donated, numbers, inputs)
            finally:
                targets = call.release()
            _write_back(targets, arrays, changed)
        return out

    return traced


class _Slot(NamedTuple):
    """What stands at one place of the arguments."""

    kind: str  # "object", "module", "array" or "static"
    value: Any  # index of the object or module; None for an array; the static value


_ARRAY = _Slot("array", None)


class _Call:
    """One call: the stateful objects in the arguments, and a key for the program it needs.

    Two calls are equal if the same program serves both. JAX keeps the key, so the objects are
    let go of when the call is over.
    """

    def __init__(self, arguments: Any):
        leaves, treedef = jax.tree.flatten(arguments, is_leaf=_is_stateful)
        self.objects: list[Optimizer | Scheduler] = []
        self.modules: list[nnx.Module] = []
        self.arrays: list[Any] = []
        self.treedef = treedef
        self.slots = tuple(self._slot(x) for x in leaves)
        # What the arguments refer to takes part too; the links say which refers to which.
        links = tuple(self._links(obj) for obj in self.objects)
        self.graphdef, self.module_state = nnx.split(tuple(self.modules))
        static = tuple(obj._static() for obj in self.objects)
        self.key = (treedef, self.slots, links, static, self.graphdef)
        try:
            self.hash = hash(self.key)
        except TypeError as error:
            raise TypeError(f"a static argument of a traced function: {error}") from None

    def _slot(self, x: Any) -> _Slot:
        if isinstance(x, jax.Array | np.ndarray | np.bool_) or is_number(x):
            self.arrays.append(x)
            return _ARRAY
        if isinstance(x, nnx.Module):
            return _Slot("module", _index_of(x, self.modules))
        if _is_stateful(x):
            return _Slot("object", _index_of(x, self.objects))
        return _Slot("static", x)

    def _links(self, obj: Any) -> Any:
        # Appends to the list that is being walked, so that an optimizer's modules come too.
        if isinstance(obj, Scheduler):
            return _index_of(obj.optimizer, self.objects)
        return tuple(_index_of(module, self.modules) for module in obj.modules())

    def optimizers(self) -> list[Optimizer]:
        return [obj for obj in self.objects if isinstance(obj, Optimizer)]

    def inputs(self) -> tuple[Any, Any, Any]:
        """(arrays to donate, numbers, the function's own arrays)."""
        for opt in self.optimizers():
            opt._check_groups()
        parts = [_split(obj) for obj in self.objects]
        donated = unshared(([arrays for arrays, _ in parts], self.module_state))
        return donated, [numbers for _, numbers in parts], self.arrays

    def arguments(self, modules: Sequence[nnx.Module], arrays: Sequence[Any]) -> Any:
        """The arguments again, with other modules and arrays in them."""
        remaining = iter(arrays)
        filled = {
            "object": lambda value: self.objects[value],
            "module": lambda value: modules[value],
            "array": lambda value: next(remaining),
            "static": lambda value: value,
        }
        return self.treedef.unflatten([filled[slot.kind](slot.value) for slot in self.slots])

    def release(self) -> Any:
        """Lets go of everything but the key; returns the objects and modules."""
        targets = self.objects, self.modules
        self.objects, self.modules, self.arrays, self.module_state = [], [], [], None
        return targets

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Call) and self.key == other.key


def _run(fn: Callable[..., Any], call: _Call, donated: Any, numbers: Any, inputs: Any) -> Any:
    """The traced body: puts tracers into the objects, runs fn, takes the results out again."""
    arrays, module_state = donated
    modules = nnx.merge(call.graphdef, module_state)
    with _borrowed(call, modules):
        for obj, a, n in zip(call.objects, arrays, numbers, strict=True):
            _join(obj, a, n)
        given = [_split(obj)[1] for obj in call.objects]
        static = [obj._static() for obj in call.objects]
        args, kwargs = call.arguments(modules, inputs)
        out = fn(*args, **kwargs)
        graphdef, new_module_state = nnx.split(tuple(modules))
        if [obj._static() for obj in call.objects] != static or graphdef != call.graphdef:
            raise RuntimeError("a traced function may not change the structure of its arguments")
        parts = [_split(obj) for obj in call.objects]
        changed = jax.tree.map(
            lambda new, old: None if new is old else jnp.asarray(new, old.dtype),
            [n for _, n in parts],
            given,
        )
        # The donated arrays come first: JAX pairs buffers with results by shape and order.
        return ([a for a, _ in parts], new_module_state), changed, out


@contextlib.contextmanager
def _borrowed(call: _Call, modules: Sequence[nnx.Module]) -> Iterator[None]:
    """Afterwards every object is as it was, whatever happens in between."""
    before = [(obj, obj._dynamic()) for obj in call.objects]
    sources = [
        (source, source.module)
        for opt in call.optimizers()
        for source in opt._sources
        if isinstance(source, ModuleSource)
    ]
    try:
        for source, module in sources:
            source.attach(modules[_index_of(module, call.modules)])
        yield
    finally:
        for source, module in sources:
            source.attach(module)
        for obj, dynamic in before:
            obj._set_dynamic(dynamic)


def _write_back(targets: Any, results: Any, changed: Any) -> None:
    """Numbers that the function did not set stay what the caller made them."""
    objects, modules = targets
    arrays, module_state = results
    for obj, a, numbers in zip(objects, arrays, changed, strict=True):
        kept = jax.tree.map(
            lambda new, old: old if new is None else new,
            numbers,
            _numbers(obj),
            is_leaf=lambda x: x is None,
        )
        _join(obj, a, kept)
    if modules:
        nnx.update(tuple(modules), module_state)


def _split(obj: Any) -> tuple[Any, Any]:
    """An object's arrays (to donate) and its numbers, as arguments (which stay the caller's)."""
    dynamic, numbers = obj._dynamic(), _numbers(obj)
    if isinstance(obj, Scheduler):
        epoch, values = numbers["last_epoch"], numbers["last_lr"]
        epoch = epoch if is_traced(epoch) else np.asarray(epoch, np.int32)
        return (), {"last_epoch": epoch, "last_lr": [as_argument(v) for v in values]}
    del dynamic["numbers"]
    return dynamic, jax.tree.map(as_argument, numbers)


def _numbers(obj: Any) -> Any:
    return obj._dynamic() if isinstance(obj, Scheduler) else obj._dynamic()["numbers"]


def _join(obj: Any, arrays: Any, numbers: Any) -> None:
    if isinstance(obj, Scheduler):
        obj._set_dynamic(numbers)
    else:
        obj._set_dynamic({**arrays, "numbers": numbers})


def _is_stateful(x: Any) -> bool:
    return _is_stateful_type(type(x))


@functools.cache
def _is_stateful_type(kind: type) -> bool:
    return issubclass(kind, Optimizer | Scheduler | nnx.Module)


def _index_of(x: Any, known: list[Any]) -> int:
    """The place of an object, by identity, in a list; it is appended if it is new."""
    for i, other in enumerate(known):
        if other is x:
            return i
    known.append(x)
    return len(known) - 1
