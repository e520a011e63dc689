"""Whole-graph compile: one training step, one XLA program, arguments updated in place."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import Sharding

from cerebras_jax.checks import any_traced, is_number, is_traced
from cerebras_jax.donation import Donate, Donor
from cerebras_jax.engine.placement import Placement, Placements
from cerebras_jax.programs import Programs
from cerebras_jax.signals import deferred_signals
from cerebras_jax.stateful import OUTSIDE, Memento, Stateful, is_nnx, is_reference, locked

P = ParamSpec("P")
R = TypeVar("R")


def trace(fn: Callable[P, R], donate: Donate = "auto", scan: bool = False) -> Callable[P, R]:
    """Compiles a training step as one program that updates its stateful arguments in place.

    Optimizers, schedulers, modules and other objects of flax's nnx, and whatever else is
    `Stateful`, wherever they are in the arguments, are updated in place: inside, they are used as
    in ordinary Python. Their buffers
    are donated, so a step needs no second copy of parameters and state. A new learning rate, or
    any other number edited in a group between calls, does not recompile; another structure, shape
    or flag does. Nothing waits for the device: the host may run ahead.

    Numbers and arrays are traced; bool, str, None and other hashable arguments are static.
    Arrays of an optimizer or a module that somebody else still holds stay valid: they are copied
    before their buffers would be given away. Calls on the same objects from several threads
    follow one another.

    Args:
      fn: a function that may call ``optimizer.step`` and ``scheduler.step``. It runs in Python
        only while it is compiled.
      donate: whether the old buffers are given away: "auto", those that nobody else holds; True,
        all of them; False, none.
      scan: one call takes several steps, in one loop on the device: every array among the
        arguments has a leading axis, of which each step gets one entry, and results are stacked.
        Python's numbers are the same in all steps.

    Returns:
      A function with fn's signature and result. If fn raises, every argument is as before. If the
      compiled program fails while it runs, what it was given is lost with it, unless donate=False.

    Raises:
      RuntimeError: if fn changes the structure of an argument, e.g. adds a parameter group, or an
        object that is no argument.
      ValueError: if ``scan`` finds no array among the arguments, or leading axes that differ.

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
    donor, placements = Donor(donate), Placements()
    programs: Programs[_Key, _Program] = Programs(functools.partial(_Program, fn, scan))

    @functools.wraps(fn)
    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        call = _Call((args, kwargs))
        with locked(call.objects):
            while True:
                call.take_apart(placements)
                try:
                    return programs.get(call.key, call.owners()).run(call, donor)
                except _BecameLive as change:
                    for obj, live in zip(call.objects, change.live, strict=True):
                        obj.set_live(live)

    return traced


class _Slot(NamedTuple):
    """What stands at one place of the arguments."""

    kind: str  # "object", "module", "array" or "static"
    value: Any  # index of the object or module; None for an array; the static value


_ARRAY = _Slot("array", None)


class _Key:
    """What decides which program serves a call; its hash is worked out once."""

    def __init__(self, *parts: Any, placement: Placement):
        self.placement = placement
        self.parts = (*parts, placement)
        try:
            self.hash = hash(parts)
        except TypeError as error:
            raise TypeError(f"a static argument of a traced function: {error}") from None

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.parts == other.parts


class _Call:
    """One call: the stateful objects in the arguments, taken apart."""

    def __init__(self, arguments: Any):
        leaves, self.treedef = jax.tree.flatten(arguments, is_leaf=is_reference)
        self.objects: list[Stateful] = []
        self.modules: list[Any] = []  # and other objects of flax
        is_input = [_is_array_type(type(x)) or is_number(x) for x in leaves]
        self.inputs = list(itertools.compress(leaves, is_input))
        kinds = zip(leaves, is_input, strict=True)
        self.slots = tuple([_ARRAY if is_array else self._slot(x) for x, is_array in kinds])
        self.links: list[tuple] = []
        for obj in self.objects:  # grows on the way: what the arguments refer to takes part too
            self.links.append(tuple(self._index(ref) for ref in obj.refs()))

    def _slot(self, x: Any) -> _Slot:
        if is_reference(x):
            return _Slot(*self._index(x))
        return _Slot("static", x)

    def _index(self, x: Any) -> tuple[str, int]:
        if is_nnx(x):
            return "module", _index_of(x, self.modules)
        return "object", _index_of(x, self.objects)

    def owners(self) -> list[Any]:
        return [*self.objects, *self.modules]

    def take_apart(self, placements: Placements) -> None:
        """Sets the arrays, the numbers, and the key of the program."""
        for obj in self.objects:
            obj.check()
        parts = [obj.parts() for obj in self.objects]
        self.arrays = [p.arrays for p in parts]
        self.given = [p.numbers for p in parts]
        self.hints = [obj.hints() for obj in self.objects]
        self.graphdef, self.module_state = _split(self.modules)
        home, placement = self._settle(placements)
        given = zip(self.objects, self.given, strict=True)
        self.numbers = [obj.as_arguments(numbers, home) for obj, numbers in given]
        self.key = _Key(
            self.treedef,
            self.slots,
            tuple(self.links),
            tuple(p.static for p in parts),
            tuple(self.hints),
            self.graphdef,
            placement=placement,
        )

    def _settle(self, placements: Placements) -> tuple[Sharding | None, Placement]:
        """Where numbers lie, and where the arrays stay; what lay nowhere lies beside the others."""
        state, treedef = jax.tree.flatten(self.module_state)
        (*self.arrays, state), home, placement = placements.settle(
            *self.arrays, state, names=lambda: self._names(len(state))
        )
        self.module_state = treedef.unflatten(state)
        return home, placement

    def _names(self, of_modules: int) -> list[str]:
        """Of all arrays, for messages."""
        names = [
            f"{name} of object {i}, {type(x).__name__}"
            for i, x in enumerate(self.objects)
            for name in x.array_names()
        ]
        return [*names, *["a state of a module"] * of_modules]

    def donated(self, donor: Donor) -> tuple[list[list[Any]], Any]:
        """The arrays, of which nobody else holds one."""
        state, treedef = jax.tree.flatten(self.module_state)
        self.module_state = None
        donor.meet(self.owners())
        arrays, self.arrays = self.arrays, []
        counts = [len(a) for a in arrays]
        flat = [x for a in arrays for x in a]
        del arrays
        # Their homes hold each of them once: a list of the object, a variable of the module.
        flat, state = donor.ready(flat, state, owners=(1, 1))
        remaining = iter(flat)
        return [[next(remaining) for _ in range(n)] for n in counts], treedef.unflatten(state)

    def held(self) -> list[Any]:
        """The arrays that the objects and modules hold now."""
        arrays = [obj.parts().arrays for obj in self.objects]
        return jax.tree.leaves((arrays, _split(self.modules)[1]))

    def refs_of(self, i: int, modules: Sequence[Any]) -> list[Any]:
        """What object i refers to, with these modules."""
        return [modules[k] if kind == "module" else self.objects[k] for kind, k in self.links[i]]

    def arguments(self, modules: Sequence[Any], inputs: Sequence[Any]) -> Any:
        """The arguments again, with other modules and arrays in them."""
        remaining = iter(inputs)
        filled = {
            "object": lambda value: self.objects[value],
            "module": lambda value: modules[value],
            "array": lambda value: next(remaining),
            "static": lambda value: value,
        }
        return self.treedef.unflatten([filled[slot.kind](slot.value) for slot in self.slots])


class _BecameLive(Exception):
    """A constant zero that was left out of the program was set in it: it must be an argument."""

    def __init__(self, live: list[Any]):
        super().__init__()
        self.live = live


class _Program:
    """A compiled training step."""

    def __init__(self, fn: Callable[..., Any], scan: bool, key: _Key):
        self.fn, self.key = fn, key
        self.call: _Call | None = None  # while it is traced
        self.hints: list[Any] = []  # of the objects after the step
        self.structure: Any = None  # of the results that replace what was given away
        placement = key.placement
        where: Any = {} if placement is None else {"out_shardings": ([*placement], None, None)}
        body = self._steps if scan else self._body
        self.compiled = jax.jit(body, donate_argnums=0, **where)

    def run(self, call: _Call, donor: Donor) -> Any:
        """Runs the step, and puts the results into the objects."""
        was_traced = any_traced(x for arrays in call.arrays for x in arrays[:1])
        if call.objects and not was_traced and any_traced(call.inputs):
            raise RuntimeError(OUTSIDE.format(name="an argument of a traced function"))
        donated = call.donated(donor)
        with deferred_signals():
            self.call = call
            try:
                results, changed, out = self.compiled(donated, call.numbers, call.inputs)
            except Exception as error:
                lost = [x for x in call.held() if not is_traced(x) and x.is_deleted()]
                if lost:
                    error.add_note(
                        f"{len(lost)} arrays of the arguments were given to the failed program and "
                        "are lost: restore a checkpoint; trace(fn, donate=False) keeps them"
                    )
                raise
            finally:
                self.call = None
            if not was_traced and any_traced(jax.tree.leaves((results, changed))):
                raise RuntimeError(OUTSIDE.format(name="an argument of a traced function"))
            self._write_back(call, self.structure.unflatten(results), changed)
        return out

    def _write_back(self, call: _Call, results: Any, changed: Any) -> None:
        """Numbers that the function did not set stay what the caller made them."""
        arrays, module_state = results
        given = zip(call.objects, call.given, arrays, changed, self.hints, strict=True)
        for obj, old, a, new, hints in given:
            obj.restore(a, _merged(new, old))
            obj.take_hints(hints)
        if call.modules:
            nnx.update(tuple(call.modules), module_state)

    def _steps(self, donated: Any, numbers: Any, inputs: Any) -> Any:
        """The traced body of several steps."""
        objects = self._call().objects
        with _borrowed(objects):
            while True:
                hints = [obj.hints() for obj in objects]
                result = self._loop(donated, numbers, inputs)
                if self.hints == hints:
                    return result
                for obj, hint in zip(objects, self.hints, strict=True):
                    obj.take_hints(hint)  # what a step relies on must hold in all of them

    def _loop(self, donated: Any, numbers: Any, inputs: Any) -> Any:
        moves = [_is_array_type(type(x)) for x in self._call().inputs]
        arrays = list(itertools.compress(inputs, moves))
        _check_axes(arrays)
        is_changed: list[list[bool]] = []

        def step(carry: Any, entries: list[Any]) -> tuple[Any, Any]:
            donated, numbers = carry
            remaining = iter(entries)
            mine = [next(remaining) if m else x for x, m in zip(inputs, moves, strict=True)]
            results, changed, out = self._body(donated, numbers, mine)
            is_changed[:] = [[x is not None for x in new] for new in changed]
            return (self.structure.unflatten(results), [*map(_merged, changed, numbers)]), out

        (results, new), out = jax.lax.scan(step, (donated, numbers), arrays)
        changed = [
            [x if is_new else None for x, is_new in zip(*pair, strict=True)]
            for pair in zip(new, is_changed, strict=True)
        ]
        return jax.tree.leaves(results), changed, out

    def _call(self) -> _Call:
        assert self.call is not None  # traced only within `run`
        return self.call

    def _body(self, donated: Any, numbers: Any, inputs: Any) -> Any:
        """The traced body: puts tracers into the objects, runs fn, takes the results out again."""
        call = self._call()
        arrays, module_state = donated
        modules = nnx.merge(call.graphdef, module_state) if call.modules else ()
        with _borrowed(call.objects):
            for i, obj in enumerate(call.objects):
                obj.restore(list(arrays[i]), list(numbers[i]), call.refs_of(i, modules))
            before = [obj.parts() for obj in call.objects]
            live = [obj.live() for obj in call.objects]
            args, kwargs = call.arguments(modules, inputs)
            _check_no_variables((args, kwargs))
            out = self.fn(*args, **kwargs)
            graphdef, new_module_state = _split(modules)
            after = [obj.parts() for obj in call.objects]
            if (now_live := [obj.live() for obj in call.objects]) != live:
                raise _BecameLive(now_live)
            for obj, old, new in zip(call.objects, before, after, strict=True):
                _check_structure(obj, old, new)
            if graphdef != call.graphdef:
                raise RuntimeError("a traced function may not change the structure of a module")
            changed = [
                [
                    None if x is y else jnp.asarray(x, y.dtype)
                    for x, y in zip(new.numbers, old.numbers, strict=True)
                ]
                for new, old in zip(after, before, strict=True)
            ]
            self.hints = [obj.hints() for obj in call.objects]
            # The donated arrays come first: JAX pairs buffers with results by shape and order.
            kept = ([p.arrays for p in after], new_module_state)
            results, self.structure = jax.tree.flatten(kept)
            return results, changed, out


def _split(modules: Sequence[Any]) -> tuple[Any, Any]:
    """The static part and the state of modules; flax takes its time even without any."""
    return nnx.split(tuple(modules)) if modules else (None, ())


def _merged(changed: Sequence[Any], numbers: Sequence[Any]) -> list[Any]:
    """The numbers of an object, with those that were set in their places."""
    return [old if new is None else new for new, old in zip(changed, numbers, strict=True)]


def _check_axes(arrays: Sequence[Any]) -> None:
    """Refuses arrays that a loop cannot take apart along their first axes."""
    shapes = [jnp.shape(x) for x in arrays]
    if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            "with scan=True the arrays among the arguments must have one leading axis, of the "
            f"steps, got shapes {shapes}"
        )


def _check_no_variables(arguments: Any) -> None:
    """A variable of flax alone is rebuilt from its array, and what is written to it is lost."""
    kinds = nnx.Variable | nnx.State | nnx.Pytree | Stateful
    leaves = jax.tree.leaves(arguments, is_leaf=lambda x: isinstance(x, kinds))
    if any(isinstance(x, nnx.Variable) for x in leaves):
        raise TypeError("a traced function cannot update an nnx.Variable alone; pass its module")


def _check_structure(obj: Stateful, old: Any, new: Any) -> None:
    def shapes(parts: Any) -> list[Any]:
        return [(jnp.shape(x), x.dtype) for x in parts.arrays]

    if new.static == old.static and shapes(new) == shapes(old) and new.refs == old.refs:
        return
    raise RuntimeError(
        f"a traced function may not change the structure of its arguments: that of "
        f"{type(obj).__name__} changed (a group, a flag, a name, a shape)"
    )


@contextlib.contextmanager
def _borrowed(objects: Sequence[Stateful]) -> Iterator[None]:
    """Afterwards every object is as it was, whatever happens in between."""
    before = [Memento(obj) for obj in objects]
    try:
        yield
    finally:
        for memento in before:
            memento.undo()


@functools.cache
def _is_array_type(kind: type) -> bool:
    return issubclass(kind, jax.Array | np.ndarray | np.bool_ | Tracer)


def _index_of(x: Any, known: list[Any]) -> int:
    """The place of an object, by identity, in a list; it is appended if it is new."""
    for i, other in enumerate(known):
        if other is x:
            return i
    known.append(x)
    return len(known) - 1
