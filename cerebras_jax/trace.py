"""Whole-graph compile: one training step, one XLA program, arguments updated in place."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cerebras_jax.checks import is_number
from cerebras_jax.optim.optimizer import Optimizer, as_argument
from cerebras_jax.optim.scheduler import Scheduler
from cerebras_jax.optim.sources import ModuleSource

P = ParamSpec("P")
R = TypeVar("R")


def trace(fn: Callable[P, R]) -> Callable[P, R]:
    """Compiles a training step as one program that updates its stateful arguments in place.

    Optimizers, schedulers and nnx modules, wherever they are in the arguments, are updated in
    place: inside, they are used as in ordinary Python. Their buffers are donated, so a step
    needs no second copy of parameters and state. A new learning rate, or any other number edited
    in a group between calls, does not recompile; another structure, shape or flag does.

    Numbers and arrays are traced; bool, str, None and other hashable arguments are static.
    Arrays that were given to an optimizer or read from it stay valid: they are copied once
    before their buffers would be given away. Arrays of an nnx module are donated as they are.

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
        try:
            out, arrays, changed = compiled(call, donated, numbers, inputs)
        finally:
            targets = call.release()
        _write_back(targets, arrays, changed)
        return out

    return traced


class _Call:
    """One call: the stateful objects in the arguments, and a key for the program it needs.

    Two calls are equal if the same program serves both. JAX keeps the key, so the objects are
    let go of when the call is over.
    """

    def __init__(self, arguments: Any):
        leaves, self.treedef = jax.tree.flatten(arguments, is_leaf=_is_stateful)
        self.objects: list[Any] = []
        self.modules: list[nnx.Module] = []
        positions = [self._register(x) if _is_stateful(x) else None for x in leaves]
        for obj in list(self.objects):
            if isinstance(obj, Scheduler):
                self._register(obj.optimizer)
        for obj in self.objects:
            if isinstance(obj, Optimizer):
                for module in obj.modules():
                    self._register(module)
        traced = [p is None and (is_number(x) or _is_array(x)) for p, x in zip(positions, leaves, strict=True)]
        self.leaves = [
            None if p is not None or is_traced else x
            for p, x, is_traced in zip(positions, leaves, traced, strict=True)
        ]
        self.positions = tuple(positions)
        self.traced = tuple(traced)
        self.arrays = [x for x, is_traced in zip(leaves, traced, strict=True) if is_traced]
        self.graphdef, self.module_state = nnx.split(tuple(self.modules))
        links = tuple(self._links(obj) for obj in self.objects)
        static = tuple(obj._static() for obj in self.objects)
        self.key = (
            self.treedef, self.positions, self.traced, tuple(self.leaves), links, static,
            self.graphdef,
        )
        try:
            self.hash = hash(self.key)
        except TypeError as error:
            raise TypeError(f"a static argument of a traced function must be hashable: {error}") from None

    def _register(self, obj: Any) -> Any:
        kind = self.modules if isinstance(obj, nnx.Module) else self.objects
        for i, known in enumerate(kind):
            if known is obj:
                break
        else:
            i = len(kind)
            kind.append(obj)
        return (isinstance(obj, nnx.Module), i)

    def _links(self, obj: Any) -> Any:
        """Which of the other objects this one refers to."""
        if isinstance(obj, Scheduler):
            return self._register(obj.optimizer)
        return tuple(self._register(m) for m in obj.modules())

    def inputs(self) -> tuple[Any, Any, Any]:
        """(arrays to donate, numbers, the function's own arrays)."""
        for obj in self.objects:
            if isinstance(obj, Optimizer):
                obj._check_groups()
                obj._own()
        arrays, numbers = zip(*(_split(obj) for obj in self.objects), strict=True) if self.objects else ((), ())
        return (list(arrays), self.module_state), list(numbers), self.arrays

    def release(self) -> Any:
        targets = self.objects, self.modules
        self.objects, self.modules, self.arrays, self.module_state = [], [], [], None
        return targets

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Call) and self.key == other.key


def _run(fn: Callable[..., Any], call: _Call, donated: Any, numbers: Any, inputs: Any) -> Any:
    """The traced body: puts tracers into the objects, runs fn, takes the results out again."""
    objects = call.objects
    before = [(obj._dynamic(), _shared_flags(obj)) for obj in objects]
    sources = [
        (source, source.module)
        for obj in objects if isinstance(obj, Optimizer)
        for source in obj._sources if isinstance(source, ModuleSource)
    ]
    arrays, module_state = donated
    modules = nnx.merge(call.graphdef, module_state)
    twins = {id(module): twin for module, twin in zip(call.modules, modules, strict=True)}
    try:
        for source, module in sources:
            source.attach(twins[id(module)])
        for obj, a, n in zip(objects, arrays, numbers, strict=True):
            _join(obj, a, n)
        given = [_split(obj) for obj in objects]
        statics = [obj._static() for obj in objects]
        own = iter(inputs)
        leaves = [
            (modules[p[1]] if p[0] else objects[p[1]]) if p is not None
            else next(own) if is_traced else static
            for p, is_traced, static in zip(call.positions, call.traced, call.leaves, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(call.treedef, leaves)
        out = fn(*args, **kwargs)
        if [obj._static() for obj in objects] != statics:
            raise RuntimeError("a traced function may not change the structure of its arguments")
        results = [_split(obj) for obj in objects]
        changed = [
            jax.tree.map(lambda new, old: None if new is old else jnp.asarray(new, old.dtype), r[1], g[1])
            for r, g in zip(results, given, strict=True)
        ]
        graphdef, new_state = nnx.split(tuple(modules))
        if graphdef != call.graphdef:
            raise RuntimeError("a traced function may not change the structure of a module")
        return out, ([r[0] for r in results], new_state), changed
    finally:
        for source, module in sources:
            source.attach(module)
        for obj, (dynamic, flags) in zip(objects, before, strict=True):
            obj._set_dynamic(dynamic)
            vars(obj).update(flags)


def _write_back(targets: Any, results: Any, changed: Any) -> None:
    objects, modules = targets
    arrays, module_state = results
    for obj, a, numbers in zip(objects, arrays, changed, strict=True):
        _, old = _split(obj, convert=False)
        kept = jax.tree.map(lambda n, o: o if n is None else n, numbers, old, is_leaf=lambda x: x is None)
        _join(obj, a, kept)
    if modules:
        nnx.update(tuple(modules), module_state)


def _split(obj: Any, convert: bool = True) -> tuple[Any, Any]:
    """An object's arrays (to donate) and its numbers (which stay the caller's)."""
    dynamic = obj._dynamic()
    if isinstance(obj, Scheduler):
        if convert:
            epoch, values = dynamic["last_epoch"], dynamic["last_lr"]
            dynamic = {"last_epoch": _as_step(epoch), "last_lr": [as_argument(v) for v in values]}
        return (), dynamic
    numbers = dynamic.pop("numbers")
    return dynamic, jax.tree.map(as_argument, numbers) if convert else numbers


def _join(obj: Any, arrays: Any, numbers: Any) -> None:
    if isinstance(obj, Scheduler):
        obj._set_dynamic(numbers)
    else:
        obj._set_dynamic({**arrays, "numbers": numbers})


def _as_step(x: Any) -> Any:
    return x if isinstance(x, jax.core.Tracer) else np.asarray(x, np.int32)


def _shared_flags(obj: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(obj).items() if k in ("_params_shared", "_state_shared")}


def _is_stateful(x: Any) -> bool:
    return isinstance(x, Optimizer | Scheduler | nnx.Module)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.bool_)
