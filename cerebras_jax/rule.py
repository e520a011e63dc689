"""The engine: an algorithm is written for one parameter, and lifted here to whole trees.

An algorithm's file holds a *factory*: a function from hyper-parameters to a `Rule`, which
knows how to initialise and update one array. Everything that is the same for all of them
happens once, in this file: flattening, the dtype policy, complex parameters, schedules and
overrides, None gradients, errors with the path in them.

The factory is cheap and is called again inside the trace with the numbers in force, so every
hyper-parameter may be a float, an array, a tracer or a schedule, and a new value never
recompiles. Flags (bool, str, None) are static.

Two forms use it:

* `per_parameter` makes the pure form, an optax pair with one clock for the whole tree.
* `init_group` and `update_group` serve the stateful `Optimizer`: one clock for every
  parameter, kept as one vector per group.
"""

import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, ParamSpec, Protocol, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from cerebras_jax import checks, fusion
from cerebras_jax.types import Array, Params

P = ParamSpec("P")
P_co = ParamSpec("P_co")

StateDtype = Any
"""A dtype for every state, or ``{"exp_avg": dtype}`` for some of them; None: the parameter's."""


def _same_clock(clock: Any, t: Array) -> tuple[Array, Any]:
    return t, clock


class Rule(NamedTuple):
    """An optimization algorithm for one parameter.

    Attributes:
      init: ``init(p) -> state``. ``state`` is a NamedTuple; its field names are the keys in a
        checkpoint; a buffer that is not needed is None.
      update: ``update(g, state, now, p) -> (u, state)``. The next parameter is ``p + u``.
        All arrays come in at least float32; ``now`` is what ``tick`` made for this step.
      clock: a NamedTuple of scalars that depend on the steps taken only, such as
        ``beta1_power``; its values before the first step. Its fields are checkpoint keys too.
      tick: ``tick(clock, t) -> (now, clock)`` with ``t`` = 1, 2, ... the number of this step, a
        float scalar. By default ``now`` is ``t``.
      supports_complex: whether treating a complex parameter as pairs of reals makes sense.
      written_last: states that ``u`` reads as they were before the step. They are overwritten
        one after the other when the parameter is done, or XLA would have to copy them first.
    """

    init: Callable[[Any], Any]
    update: Callable[[Array, Any, Any, Array], tuple[Array, Any]]
    clock: Any = ()
    tick: Callable[[Any, Array], tuple[Any, Any]] = _same_clock
    supports_complex: bool = True
    written_last: tuple[str, ...] = ()


class RuleState(NamedTuple):
    """State of the pure form.

    Attributes:
      count: int32 scalar, the number of steps taken; it saturates instead of overflowing.
      clock: the rule's own scalars, floats.
      states: the rule's NamedTuple; every field a tree like the parameters (or None).
    """

    count: Array
    clock: Any
    states: Any


# --- hyper-parameters: numbers are traced, flags are static ------------------------------------


class _Number:
    """Marks, among the static leaves, the place of a traced number."""

    def __repr__(self) -> str:
        return "number"


NUMBER = _Number()


def _is_hyper_leaf(x: Any) -> bool:
    return x is None or callable(x)


def bind(
    factory: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a factory by name, defaults included.

    Raises:
      TypeError: what does not fit, and the name of what was called.
    """
    try:
        bound = inspect.signature(factory).bind(*args, **kwargs)
    except TypeError as error:
        hints = {"learning_rate": "the learning rate is called lr", "b1": "betas=(b1, b2)"}
        hint = "".join(f"; {hints[key]}" for key in hints if key in kwargs)
        raise TypeError(f"{name}: {error}{hint}") from None
    bound.apply_defaults()
    return bound.arguments


def normalize(hyper: dict[str, Any]) -> dict[str, Any]:
    """Lists become tuples, so that ``betas`` from YAML and from Python are the same structure."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in hyper.items()}


def partition(hyper: dict[str, Any], static_zeros: bool = False) -> tuple[tuple, Any]:
    """Splits hyper-parameters into traced numbers and a hashable static rest.

    Args:
      hyper: names to numbers, flags, or tuples of them.
      static_zeros: keep a Python zero as a constant, so that a term multiplied by it is left
        out of the program.
    """
    leaves, treedef = jax.tree.flatten(hyper, is_leaf=_is_hyper_leaf)
    traced = [
        checks.is_number(x) and not (static_zeros and isinstance(x, int | float) and x == 0)
        for x in leaves
    ]
    numbers = tuple(x for x, is_traced in zip(leaves, traced, strict=True) if is_traced)
    static = tuple(NUMBER if is_traced else x for x, is_traced in zip(leaves, traced, strict=True))
    return numbers, (treedef, static)


def combine(numbers: Sequence[Any], static: Any) -> dict[str, Any]:
    """The inverse of `partition`."""
    treedef, leaves = static
    remaining = iter(numbers)
    return jax.tree.unflatten(treedef, [next(remaining) if x is NUMBER else x for x in leaves])


def at_step(hyper: dict[str, Any], count: Any) -> dict[str, Any]:
    """Replaces every schedule by its value at step ``count``."""
    return jax.tree.map(
        lambda x: as_number(x(count)) if callable(x) else x, hyper, is_leaf=_is_hyper_leaf
    )


def as_number(x: Any) -> Array:
    """A number as hyper-parameters are kept: float32, or float64 under x64, never less."""
    return jnp.asarray(x, dtype=float)


def saturating_increment(count: Array) -> Array:
    """Adds 1 to a step count, which stays at its largest value instead of overflowing."""
    return jnp.where(count < jnp.iinfo(count.dtype).max, count + 1, count)


# --- one leaf ----------------------------------------------------------------------------------


def add_weight_decay(g: Array, weight_decay: Any, p: Array) -> Array:
    """L2 penalty: ``g + weight_decay * p``; nothing when it is the constant zero."""
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return g
    return g + weight_decay * p


def bias_correction(beta: Any, t: Array) -> Array:
    """``1 - beta**t`` without cancellation where beta is near 1."""
    return -jnp.expm1(t * jnp.log(beta))


def zeros_without_axis(p: Any, axis: int) -> Array:
    """Zeros of p's shape without one axis, sharded as p is along the others."""
    if checks.is_traced(p):
        return jnp.zeros_like(p).sum(axis)
    shape = tuple(np.delete(p.shape, axis))
    sharding = getattr(p, "sharding", None)
    if isinstance(sharding, NamedSharding):
        spec = [*sharding.spec, *[None] * (len(p.shape) - len(sharding.spec))]
        del spec[axis]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return jnp.zeros(shape, p.dtype, device=sharding)


def has_term(number: Any) -> bool:
    """Whether a buffer that only a non-zero ``number`` needs must be allocated.

    Only a zero that is certain to stay zero, a Python or NumPy constant, needs no buffer; an
    array, a tracer or a schedule may change later.
    """
    return not (isinstance(number, int | float | np.number) and number == 0)


def _is_inexact(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def _is_complex(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


def _as_pairs(x: Array) -> Array:
    return jnp.stack([x.real, x.imag], axis=-1)


def _from_pairs(x: Array, dtype: Any) -> Array:
    return jax.lax.complex(x[..., 0], x[..., 1]).astype(dtype)


def _init_leaf(rule: Rule, state_dtype: StateDtype, p: Any) -> Any:
    """Initialises the states of one parameter, each stored in its own dtype."""
    if not _is_complex(p):
        state = rule.init(p)
        if state_dtype is None:
            return state
        return type(state)(*(_cast_state(state_dtype, *item) for item in _fields(state)))
    if not rule.supports_complex:
        raise TypeError("this optimizer does not support complex parameters")
    if state_dtype is not None:
        raise TypeError("state_dtype is not supported for complex parameters")
    if not isinstance(p, jax.Array):
        p = jnp.zeros_like(p)
    pairs = _as_pairs(p)
    return jax.tree.map(
        lambda s: _from_pairs(s, p.dtype) if s.shape == pairs.shape else s, rule.init(pairs)
    )


def _fields(state: Any) -> list[tuple[str, Any]]:
    return list(zip(state._fields, state, strict=True))


def _cast_state(state_dtype: StateDtype, name: str, value: Any) -> Any:
    if value is None:
        return None
    dtype = state_dtype.get(name) if isinstance(state_dtype, dict) else state_dtype
    return value if dtype is None else value.astype(dtype)


def _update_leaf(
    factory: Callable[..., Rule], static: Any, numbers: tuple, now: Any, g: Array, s: Any, p: Array
) -> tuple[Array, Any]:
    """One gradient, one state, one parameter.

    The dtype policy: arithmetic in at least float32, each state stored in its own dtype, the
    update in the parameter's dtype. A complex array is a pair of real ones.
    """
    is_complex = _is_complex(p)
    compute = jnp.promote_types(p.real.dtype if is_complex else p.dtype, jnp.float32)

    def widen(x: Array) -> Array:
        return _cast(_as_pairs(x) if _is_complex(x) else x, compute)

    def run(numbers: tuple, now: Any, g: Array) -> tuple[Rule, Array, Any]:
        rule = factory(**combine([_cast(x, compute) for x in numbers], static))
        now = jax.tree.map(lambda x: _cast(x, compute), now)
        result = rule.update(widen(g), jax.tree.map(widen, s), now, widen(p))
        return rule, *_checked_update(factory, result, s, widen(p))

    def store(x: Array, like: Array) -> Array:
        return _from_pairs(x, like.dtype) if _is_complex(like) else _cast(x, like.dtype)

    g = g.astype(p.dtype) if is_complex else g
    rule, u, new = run(numbers, now, g)
    u = store(u, p)
    on_one_cpu = _is_on_one_cpu(p)  # XLA's other backends fuse several results by themselves
    if on_one_cpu and fusion.is_enabled():
        # Each result on its own: none waits for what another also needs, and XLA makes one loop.
        for k, name in enumerate(new._fields):
            own_numbers, own_now = _after(g, (numbers, now), k + 1)
            _, _, apart = run(own_numbers, own_now, g)
            new = new._replace(**{name: getattr(apart, name)})
    elif on_one_cpu and rule.written_last:
        done = p + u
        for name in rule.written_last:
            _, _, later = run(*_after(done, (numbers, now, g)))
            done = getattr(later, name)
            new = new._replace(**{name: done})
    return u, jax.tree.map(store, new, s)


_update_leaf_of_a_kind = jax.jit(_update_leaf, static_argnums=(0, 1))  # traced once per type


def _leaf_updates(params: Sequence[Array]) -> list[Callable[..., Any]]:
    """For each parameter the function that updates it.

    Jitted, except within a trace for the only parameter of its type, where that would not pay.
    """
    types = [(p.shape, p.dtype) for p in params]
    count = collections.Counter(types)
    return [
        _update_leaf if count[t] == 1 and checks.is_traced(p) else _update_leaf_of_a_kind
        for t, p in zip(types, params, strict=True)
    ]


def _cast(x: Array, dtype: Any) -> Array:
    """``astype``, which is slow where it has nothing to do."""
    return x if x.dtype == dtype and not x.aval.weak_type else x.astype(dtype)


def _is_on_one_cpu(p: Array) -> bool:
    """Whether an element of p is at hand for `_after`: p is neither empty nor known as sharded."""
    return p.size > 0 and jax.default_backend() == "cpu" and jax.typeof(p).sharding.mesh.empty


def _after(done: Array, tree: Any, k: int = 0) -> Any:
    """The same values, but known only when the array ``done`` is, and another expression for
    every k, so that XLA does not see that they are the same.

    An optimization barrier would say both, but XLA's CPU backend drops it before it decides what
    to fuse and what to copy.
    """
    bits = jax.lax.bitcast_convert_type(done.real.ravel()[0].astype(jnp.float32), jnp.uint32)
    one = 1 + (bits >> (31 - k) >> (1 + k))  # whatever the bits: all 32 are shifted out
    return jax.tree.map(lambda x: x / one.astype(x.dtype), tree)


def _checked_update(factory: Callable[..., Rule], result: Any, s: Any, p: Array) -> Any:
    """What a rule returned, if it is an update of the parameter's shape and a state like s."""
    name = getattr(factory, "__name__", "rule")
    if not isinstance(result, tuple) or len(result) != 2 or type(result[1]) is not type(s):
        raise TypeError(f"{name}: update must return (update, {type(s).__name__}), got {result!r}")
    u, new = result
    if jnp.shape(u) != p.shape:
        raise ValueError(f"{name}: the update has shape {jnp.shape(u)}, its parameter {p.shape}")
    if jax.tree.structure(new) != jax.tree.structure(s):
        raise ValueError(f"{name}: update must keep the structure of the state {s}, got {new}")
    return jnp.asarray(u), new


def _tick(factory: Callable[..., Rule], hyper: dict[str, Any], count: Any, clock: Any) -> Any:
    """Scalars of the step after ``count`` steps: (what ``update`` gets as ``now``, new clock)."""
    t = as_number(count + 1)
    now, new = factory(**hyper).tick(clock, t)
    return now, jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), new, clock)


# --- errors that name the path -----------------------------------------------------------------

Names = Callable[[], Sequence[str]]
"""The paths of the leaves, worked out only if an error needs them."""


def leaf_paths(tree: Any) -> list[str]:
    """Dotted path of every leaf: ``"decoder.layers.0.kernel"``; the root leaf is ``""``."""
    return [
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def check_params(leaves: Sequence[Any], names: Names) -> None:
    """Refuses parameters that are not floating point or complex arrays, naming the path."""
    for i, p in enumerate(leaves):
        dtype = getattr(p, "dtype", type(p))
        if not (isinstance(p, float) or _is_inexact(p)):
            raise TypeError(
                f"parameter {names()[i]!r} must be a floating point or complex array, "
                f"found {getattr(dtype, '__name__', dtype)}"
            )


def check_grads(grads: Sequence[Any], params: Sequence[Any], names: Names) -> None:
    """Refuses gradients that do not fit their parameters: path, found, expected."""
    for i, (g, p) in enumerate(zip(grads, params, strict=True)):
        if g is None:
            continue
        if not hasattr(g, "dtype") and not isinstance(g, float):
            raise TypeError(
                f"gradient {names()[i]!r} must be an array or None, found {type(g).__name__}"
            )
        if np.shape(g) != np.shape(p):
            raise ValueError(
                f"gradient {names()[i]!r} has shape {np.shape(g)}, its parameter {np.shape(p)}"
            )
        dtype = getattr(g, "dtype", np.dtype(float))
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(f"gradient {names()[i]!r} must be floating point, found {dtype}")
        if jnp.issubdtype(dtype, jnp.complexfloating) and not _is_complex(p):
            raise TypeError(f"gradient {names()[i]!r} is {dtype}, its parameter {p.dtype}")


def align(treedef: Any, tree: Any, what: str) -> list[Any]:
    """The leaves of ``tree``, which must have the structure ``treedef``; None may be a leaf.

    Raises:
      ValueError: names the first paths that are missing or unexpected.
    """
    try:
        return treedef.flatten_up_to(tree)
    except (ValueError, TypeError, KeyError) as error:
        expected = leaf_paths(treedef.unflatten(range(treedef.num_leaves)))
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
        found = [
            jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
            for path, _ in leaves
        ]
        missing = [x for x in expected if x not in found]
        extra = [x for x in found if x not in expected]
        detail = "; ".join(
            f"{word}: {', '.join(map(repr, names[:5]))}{' ...' if len(names) > 5 else ''}"
            for word, names in (("missing", missing), ("unexpected", extra))
            if names
        )
        raise ValueError(
            f"{what} must have the structure of the parameters; {detail or error}"
        ) from None


def _check_state_dtype(names: Sequence[str], state_dtype: StateDtype) -> None:
    if isinstance(state_dtype, dict):
        unknown = sorted(set(state_dtype) - set(names))
        if unknown:
            raise ValueError(f"state_dtype names {unknown}, the states are {list(names)}")
    dtypes = state_dtype.values() if isinstance(state_dtype, dict) else [state_dtype]
    for dtype in dtypes:
        if dtype is not None and not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            raise ValueError(f"state_dtype must be a floating point dtype, got {jnp.dtype(dtype)}")


def check_buffers(
    factory: Callable[..., Rule], old: dict[str, Any], new: dict[str, Any], present: set[str]
) -> None:
    """Refuses a value that needs a state which was not allocated at construction.

    Args:
      factory: the rule's factory.
      old: the hyper-parameters that the states were made for.
      new: the hyper-parameters now.
      present: names of the states and clock scalars that exist.
    """
    before, after = (jax.tree.leaves(h, is_leaf=_is_hyper_leaf) for h in (old, new))
    same_terms = len(before) == len(after) and all(
        (has_term(a) == has_term(b)) if checks.is_number(a) and checks.is_number(b) else a is b
        for a, b in zip(before, after, strict=True)
    )
    if same_terms:
        return
    made, needed = (_all_names(factory(**at_step(hyper, 0))) for hyper in (old, new))
    missing = [name for name in needed if name not in made and name not in present]
    if missing:
        changed = {k: v for k, v in new.items() if v is not old[k]}
        raise ValueError(
            f"{changed} needs the state {missing}, which was not allocated at construction; "
            "no step creates state"
        )


# --- the pure form -----------------------------------------------------------------------------


class PureOptimizer(Protocol, Generic[P_co]):
    """A function from hyper-parameters to an optax pair; `rule` is the factory it lifts."""

    rule: Callable[..., Rule]
    __name__: str
    __doc__: str | None

    @overload
    def __call__(
        self, *args: P_co.args, **kwargs: P_co.kwargs
    ) -> optax.GradientTransformationExtraArgs: ...
    @overload
    def __call__(
        self, *args: Any, state_dtype: StateDtype, **kwargs: Any
    ) -> optax.GradientTransformationExtraArgs: ...


def per_parameter(factory: Callable[P, Rule]) -> PureOptimizer[P]:
    """Lifts a one-parameter algorithm to an optax pair.

    Args:
      factory: hyper-parameters -> `Rule`. It checks ranges with `cerebras_jax.checks`, which let
        schedules and tracers pass, and computes with the numbers only inside the rule's
        functions.

    Returns:
      A function with the factory's signature plus the keyword ``state_dtype``, which returns an
      ``optax.GradientTransformationExtraArgs``. Its ``update`` takes every number of the
      signature as a keyword that overrides it for that step, without recompiling.

    >>> class NoState(NamedTuple):
    ...     pass
    >>> @per_parameter
    ... def sign_descent(lr=1e-2):
    ...     checks.check("lr", lr, ">= 0")
    ...     return Rule(lambda p: NoState(), lambda g, s, now, p: (-lr * jnp.sign(g), s))
    >>> tx = sign_descent(lr=0.5)
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> tx.update({"w": jnp.array([3.0, -4.0])}, tx.init(params), params)[0]
    {'w': Array([-0.5,  0.5], dtype=float32)}
    """
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def optimizer(*args: Any, state_dtype: StateDtype = None, **kwargs: Any) -> Any:
        hyper = normalize(bind(factory, factory.__name__, args, kwargs))
        factory(**hyper)  # pyright: ignore - checks ranges now, at the earliest call
        return optax.GradientTransformationExtraArgs(
            functools.partial(_init_tree, factory, hyper, state_dtype),
            functools.partial(_update_tree, factory, hyper),  # pyright: ignore
        )

    dtype_parameter = inspect.Parameter("state_dtype", inspect.Parameter.KEYWORD_ONLY, default=None)
    optimizer.__signature__ = signature.replace(  # pyright: ignore
        parameters=[*signature.parameters.values(), dtype_parameter],
        return_annotation=optax.GradientTransformationExtraArgs,
    )
    optimizer.rule = factory  # pyright: ignore
    return optimizer  # pyright: ignore


def _init_tree(
    factory: Callable[..., Rule], hyper: dict[str, Any], state_dtype: StateDtype, params: Params
) -> RuleState:
    leaves, treedef = jax.tree.flatten(params)
    check_params(leaves, lambda: leaf_paths(params))
    rule = factory(**at_step(hyper, 0))
    names = state_names(rule)
    _check_state_dtype(names, state_dtype)
    rows = [_init_leaf(rule, state_dtype, as_array(p)) for p in leaves]
    return RuleState(
        count=jnp.zeros((), jnp.int32),
        clock=jax.tree.map(as_number, rule.clock),
        states=_columns(rule, names, treedef, rows),
    )


def as_array(p: Any) -> Any:
    """A parameter as an array with a type of its own; abstract arrays stay abstract.

    ``jnp.array(0.5)`` is weakly typed; states like it would change their type in the first step.
    """
    if isinstance(p, jax.Array) and not p.aval.weak_type:
        return p
    if isinstance(p, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding)
    dtype = getattr(p, "dtype", None)
    return jnp.asarray(p, None if dtype is None else jax.dtypes.canonicalize_dtype(dtype))


def state_names(rule: Rule) -> list[str]:
    """Names of the arrays that the rule keeps for a scalar or for a matrix."""
    probes = [
        jax.eval_shape(rule.init, jax.ShapeDtypeStruct(shape, jnp.float32))
        for shape in ((), (2, 2))
    ]
    if not hasattr(probes[0], "_fields"):
        raise TypeError(f"a rule's init must return a NamedTuple, got {type(probes[0]).__name__}")
    return [
        name
        for name, *values in zip(probes[0]._fields, *probes, strict=True)
        if any(v is not None for v in values)
    ]


def _all_names(rule: Rule) -> list[str]:
    return [*state_names(rule), *getattr(rule.clock, "_fields", ())]


def _columns(rule: Rule, names: list[str], treedef: Any, rows: list[Any]) -> Any:
    """Turns one NamedTuple per parameter into one NamedTuple of trees."""
    kind = type(jax.eval_shape(rule.init, jax.ShapeDtypeStruct((), jnp.float32)))
    return kind(
        *(
            treedef.unflatten([getattr(row, name) for row in rows]) if name in names else None
            for name in kind._fields
        )
    )


def _update_tree(
    factory: Callable[..., Rule],
    hyper: dict[str, Any],
    grads: Any,
    state: RuleState,
    params: Params = None,
    **overrides: Any,
) -> tuple[Any, RuleState]:
    if params is None:
        raise ValueError("update needs the parameters: call update(grads, state, params)")
    hyper = {**hyper, **_checked_overrides(factory, hyper, overrides, state)}
    p_leaves, treedef = jax.tree.flatten(params)
    p_leaves = [as_array(p) for p in p_leaves]
    g_leaves = align(treedef, grads, "the gradients")
    check_params(p_leaves, lambda: leaf_paths(params))
    check_grads(g_leaves, p_leaves, lambda: leaf_paths(params))

    hyper = at_step(hyper, state.count)
    numbers, static = partition(hyper, static_zeros=True)
    numbers = tuple(as_number(x) for x in numbers)
    now, clock = _tick(factory, combine(numbers, static), state.count, state.clock)

    kind = type(state.states)
    columns = [
        [None] * len(p_leaves) if tree is None else align(treedef, tree, f"state {name!r}")
        for name, tree in _fields(state.states)
    ]
    rows = (
        [kind(*row) for row in zip(*columns, strict=True)] if columns else [kind()] * len(p_leaves)
    )
    new_rows, updates = [], []
    leaf_updates = _leaf_updates(p_leaves)
    for update_leaf, g, s, p in zip(leaf_updates, g_leaves, rows, p_leaves, strict=True):
        if g is None:
            u, new = jnp.zeros_like(p), s
        else:
            u, new = update_leaf(factory, static, numbers, now, as_array(g), s, p)
        updates.append(u)
        new_rows.append(new)
    states = kind(
        *(
            None if tree is None else treedef.unflatten([getattr(row, name) for row in new_rows])
            for name, tree in _fields(state.states)
        )
    )
    count = saturating_increment(state.count)
    return treedef.unflatten(updates), RuleState(count, clock, states)


def _checked_overrides(
    factory: Callable[..., Rule],
    hyper: dict[str, Any],
    overrides: dict[str, Any],
    state: RuleState,
) -> dict[str, Any]:
    """The overrides that name a number of this rule; others are for other links of a chain."""
    mine = normalize({k: v for k, v in overrides.items() if k in hyper and v is not None})
    for name, value in mine.items():
        if isinstance(hyper[name], bool | str | None) or isinstance(value, bool | str):
            raise TypeError(f"{name} is fixed at construction: {hyper[name]!r}, got {value!r}")
    if mine:
        factory(**{**hyper, **mine})  # range checks
        present = {name for name, tree in _fields(state.states) if tree is not None}
        present |= set(getattr(state.clock, "_fields", ()))
        check_buffers(factory, hyper, {**hyper, **mine}, present)
    # An override is always traced: a new value must not be a new program.
    return jax.tree.map(lambda x: x if callable(x) else as_number(x), mine, is_leaf=_is_hyper_leaf)


# --- the stateful form: lists of leaves, a clock for every parameter ------------------------------


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Cohorts:
    """Which parameters of a group have clocks that are known to be equal: the same number.

    Static, so that a program reads one clock for all of them: their kernels are then alike, and
    XLA compiles each kind once.
    """

    of: tuple[int, ...]

    def split(self, present: Sequence[bool]) -> "Cohorts":
        """The cohorts after a step that only the present parameters have taken."""
        return Cohorts.by(zip(self.of, present, strict=True))

    @staticmethod
    def by(keys: Iterable[Any]) -> "Cohorts":
        """One cohort for each different key."""
        numbers: dict[Any, int] = {}
        return Cohorts(tuple(numbers.setdefault(key, len(numbers)) for key in keys))


class GroupClock(NamedTuple):
    """Clocks of one parameter group, one entry per parameter.

    Parameters that miss a step (a None gradient) or come from a checkpoint have clocks of their
    own. As vectors they cost one buffer per scalar, not one per scalar and parameter, and the
    arrays never change their structure.
    """

    count: Array
    clock: Any
    cohorts: Cohorts


def init_group(
    factory: Callable[..., Rule],
    hyper: dict[str, Any],
    state_dtype: StateDtype,
    params: Sequence[Array],
) -> tuple[list[Any], GroupClock]:
    """Allocates the states of a list of parameters and their clocks."""
    rule = factory(**at_step(hyper, 0))
    _check_state_dtype(state_names(rule), state_dtype)
    n = len(params)
    clock = jax.tree.map(lambda x: jnp.full((n,), as_number(x)), rule.clock)
    states = [_init_leaf(rule, state_dtype, p) for p in params]
    return states, GroupClock(jnp.zeros((n,), jnp.int32), clock, Cohorts((0,) * n))


def update_group(
    factory: Callable[..., Rule],
    static: Any,
    numbers: tuple,
    grads: Sequence[Array | None],
    clock: GroupClock,
    states: Sequence[Any],
    params: Sequence[Array],
) -> tuple[list[Array], GroupClock, list[Any]]:
    """One step of a list of parameters: new parameters, clocks and states.

    A None gradient leaves its parameter, its states and its clock alone.
    """
    schedules = [x for x in static[1] if callable(x)]

    def tick(count: Array, clock: Any) -> Any:
        hyper = at_step(combine(numbers, static), count)
        now, new = _tick(factory, hyper, count, clock)
        return ([as_number(x(count)) for x in schedules], now), new

    now, ticked = jax.vmap(tick)(clock.count, clock.clock)
    step_static = (static[0], tuple(NUMBER if callable(x) else x for x in static[1]))
    count = saturating_increment(clock.count)
    present = np.array([g is not None for g in grads], bool)
    if not present.all():
        count = jnp.where(present, count, clock.count)
        ticked = jax.tree.map(lambda a, b: jnp.where(present, a, b), ticked, clock.clock)

    new_params, new_states = list(params), list(states)
    of_cohort: dict[int, Any] = {}
    leaf_updates = _leaf_updates(params)
    for i, (g, s, p) in enumerate(zip(grads, states, params, strict=True)):
        if g is not None:
            cohort = clock.cohorts.of[i]
            if cohort not in of_cohort:
                of_cohort[cohort] = jax.tree.map(lambda x, i=i: x[i], now)
            scheduled, own_now = of_cohort[cohort]
            own = _merge_numbers(static[1], numbers, scheduled)
            u, new_states[i] = leaf_updates[i](factory, step_static, own, own_now, g, s, p)
            new_params[i] = p + u
    cohorts = clock.cohorts.split(present.tolist())
    return new_params, GroupClock(count, ticked, cohorts), new_states


def _merge_numbers(leaves: tuple, numbers: Sequence[Any], scheduled: Sequence[Any]) -> tuple:
    """Constant and scheduled numbers in the order of the hyper-parameters."""
    constant, computed = iter(numbers), iter(scheduled)
    return tuple(
        next(constant) if x is NUMBER else next(computed)
        for x in leaves
        if x is NUMBER or callable(x)
    )
