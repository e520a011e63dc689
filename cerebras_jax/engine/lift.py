"""From a rule for one parameter to an optax pair for a whole tree.

Everything that is the same for all algorithms happens once, here and in `leaf`: flattening, clocks,
schedules and overrides, None gradients, errors with the path in them.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, ParamSpec, Protocol, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cerebras_jax.checks import check_choice, check_state_dtype
from cerebras_jax.engine import hyper as hypers
from cerebras_jax.engine.leaf import (
    Rounding,
    StateDtype,
    check_roundable,
    draws_of,
    fields,
    init_leaf,
    is_rounded,
    leaf_steps,
)
from cerebras_jax.engine.placement import beside, home_of
from cerebras_jax.engine.rule import Rule
from cerebras_jax.engine.trees import align, as_array, check_grads, check_params, leaf_paths
from cerebras_jax.types import Array, Params

P = ParamSpec("P")
P_co = ParamSpec("P_co")


class RuleState(NamedTuple):
    """State of the pure form.

    A clock is one scalar for the whole tree, or, with ``per_leaf_clocks``, a vector with an entry
    for every leaf.

    Attributes:
      count: int32, the number of steps taken; it saturates instead of overflowing.
      clock: the rule's own scalars, floats.
      states: the rule's NamedTuple; every field a tree like the parameters, with None where a
        parameter has no such state (or None, if no parameter has it).
      low_bits: with ``rounding="exact"`` a tree like the parameters: int16, what a bfloat16
        parameter lacks of its float32 value, None for others; else None.
    """

    count: Array
    clock: Any
    states: Any
    low_bits: Any = None


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
        self,
        *args: Any,
        state_dtype: StateDtype = ...,
        per_leaf_clocks: bool = ...,
        rounding: Rounding = ...,
        **kwargs: Any,
    ) -> optax.GradientTransformationExtraArgs: ...


def per_parameter(factory: Callable[P, Rule]) -> PureOptimizer[P]:
    """Lifts a one-parameter algorithm to an optax pair.

    Args:
      factory: hyper-parameters -> `Rule`. It checks ranges with `cerebras_jax.checks`, which let
        schedules and tracers pass, and computes with the numbers only inside the rule's
        functions.

    Returns:
      A function with the factory's signature, which returns an
      ``optax.GradientTransformationExtraArgs``. Its ``update`` takes every number of the
      signature as a keyword that overrides it for that step, without recompiling. Three more
      keywords: ``state_dtype``, a dtype for all states or a dict from state names to dtypes;
      ``per_leaf_clocks=True`` for a step count of its own for every leaf, which a None gradient
      leaves alone, instead of one for the tree; and ``rounding``, how new bfloat16 parameters
      are rounded:

      * ``"nearest"``: as everything is. Steps below half a unit in the last place, 1/256 to
        1/512 of the value, are lost.
      * ``"stochastic"``: up or down at random, right on average, and likewise the states that
        are kept in bfloat16. The draws depend on path and step only: nothing to store or resume.
      * ``"exact"``: to nearest, and 16 bits per parameter in the state hold what is left over.
        All arithmetic and all states are those of float32 parameters; see `full_precision`.

      With the last two, updates are float32, and ``optax.apply_updates`` must come next.
      float16 parameters are refused then, float32 ones stay as they are.

    >>> from cerebras_jax.checks import check
    >>> class NoState(NamedTuple):
    ...     pass
    >>> @per_parameter
    ... def sign_descent(lr=1e-2):
    ...     check("lr", lr, ">= 0")
    ...     return Rule(lambda p: NoState(), lambda g, s, now, p: (-lr * jnp.sign(g), s))
    >>> tx = sign_descent(lr=0.5)
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> tx.update({"w": jnp.array([3.0, -4.0])}, tx.init(params), params)[0]
    {'w': Array([-0.5,  0.5], dtype=float32)}
    """
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def optimizer(
        *args: Any,
        state_dtype: StateDtype = None,
        per_leaf_clocks: bool = False,
        rounding: Rounding = "nearest",
        **kwargs: Any,
    ) -> Any:
        hyper = hypers.normalize(hypers.bind(factory, factory.__name__, args, kwargs))
        factory(**hyper)  # pyright: ignore - checks ranges now, at the earliest call
        return lift(
            factory,
            hyper,
            state_dtype=state_dtype,
            per_leaf_clocks=per_leaf_clocks,
            rounding=rounding,
        )

    keyword = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    optimizer.__signature__ = signature.replace(  # pyright: ignore
        parameters=[
            *signature.parameters.values(),
            keyword("state_dtype", default=None),
            keyword("per_leaf_clocks", default=False),
            keyword("rounding", default="nearest"),
        ],
        return_annotation=optax.GradientTransformationExtraArgs,
    )
    optimizer.rule = factory  # pyright: ignore
    return optimizer  # pyright: ignore


def lift(
    factory: Callable[..., Rule],
    hyper: Mapping[str, Any],
    *,
    state_dtype: StateDtype = None,
    per_leaf_clocks: bool = False,
    same: Sequence[int] | None = None,
    rounding: Rounding = "nearest",
    returns_params: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The optax pair of a rule with these hyper-parameters.

    Args:
      factory: hyper-parameters -> `Rule`.
      hyper: all arguments of the factory; numbers may be traced, a constant zero leaves its term
        out of the program.
      state_dtype: a dtype for all states, or a dict from state names to dtypes.
      per_leaf_clocks: whether ``init`` makes clocks with an entry for every leaf. ``update`` takes
        the clocks as they are.
      same: what the caller knows of such clocks: for each leaf, the first leaf whose clock has the
        same values. Leaves with one clock have one kernel, which XLA compiles once.
      rounding: see `per_parameter`.
      returns_params: whether ``update`` returns new parameters in place of updates.
    """
    check_choice("rounding", rounding, ("nearest", "stochastic", "exact"))
    keeps_bits = rounding == "exact"
    hyper = hypers.fix_whole(factory, hyper)

    def init(params: Params) -> RuleState:
        leaves, treedef = jax.tree.flatten(params)
        check_params(leaves, lambda: leaf_paths(params))
        rule = factory(**hypers.at_step(hyper, 0))
        arrays = [as_array(p) for p in leaves]
        if rounding != "nearest":
            check_roundable(rounding, arrays, lambda: leaf_paths(params))
        wide = [x.astype(jnp.float32) if keeps_bits and is_rounded(x) else x for x in arrays]
        rows = [init_leaf(rule, state_dtype, x) for x in wide]
        kind = type(rows[0] if rows else _scalar_state(rule))
        check_state_dtype(kind._fields, state_dtype)
        shape = (len(leaves),) if per_leaf_clocks else ()
        state = RuleState(
            count=jnp.zeros(shape, jnp.int32),
            clock=jax.tree.map(lambda x: jnp.full(shape, hypers.as_number(x)), rule.clock),
            states=_columns(kind, treedef, rows) if rows else _no_rows(rule, treedef),
            low_bits=treedef.unflatten(
                [jnp.zeros_like(x, jnp.int16) if is_rounded(x) else None for x in arrays]
            )
            if keeps_bits
            else None,
        )
        return beside(state, home_of(leaves))

    def update(
        grads: Any, state: RuleState, params: Params = None, **overrides: Any
    ) -> tuple[Any, RuleState]:
        if params is None:
            raise ValueError("update needs the parameters: call update(grads, state, params)")
        names = functools.cache(lambda: leaf_paths(params))
        p_leaves, treedef = jax.tree.flatten(params)
        p_leaves = [as_array(p) for p in p_leaves]
        g_leaves = align(treedef, grads, "the gradients", names)
        check_params(p_leaves, names)
        check_grads(g_leaves, p_leaves, names)
        rows = _rows(state.states, treedef, names)
        now_hyper = {
            **hyper,
            **_checked_overrides(factory, hyper, overrides, state, rows, p_leaves),
        }

        present = np.array([g is not None for g in g_leaves], bool)
        scalars_of, count, clock = _tick(factory, now_hyper, state, present, same)
        updates, new_rows = [], []
        functions = leaf_steps(p_leaves)
        low_bits = [None] * len(rows)
        if keeps_bits:
            low_bits = align(treedef, state.low_bits, "low_bits", names)
        draws = draws_of(rounding, names, state.states, state.count)
        for i, (g, s, p) in enumerate(zip(g_leaves, rows, p_leaves, strict=True)):
            if g is None:
                # p + -0.0 is p, whatever p is
                u, new = p if returns_params else -jnp.zeros_like(p), s
            else:
                u, new, low_bits[i] = functions[i](
                    rounding,
                    returns_params,
                    factory,
                    *scalars_of(i),
                    as_array(g),
                    s,
                    p,
                    low_bits[i],
                    draws(i, p),
                )
            updates.append(u)
            new_rows.append(new)
        states = _columns(type(state.states), treedef, new_rows) if rows else state.states
        bits = treedef.unflatten(low_bits) if keeps_bits else state.low_bits
        return treedef.unflatten(updates), RuleState(count, clock, states, bits)

    def why() -> str:
        name = getattr(factory, "__name__", "the rule")
        if not factory(**hypers.at_step(hyper, 0)).elementwise:
            return f"{name} looks at whole parameters, or does not say that it is elementwise"
        return f"rounding='stochastic' of {name} draws by path" if rounding == "stochastic" else ""

    update.why_whole = why  # pyright: ignore[reportFunctionMemberAccess]
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore


def why_whole(tx: optax.GradientTransformation) -> str | None:
    """Why parameters must not be joined for a pair; "" if they may, None if it does not say."""
    why = getattr(tx.update, "why_whole", None)
    return None if why is None else why()


# --- clocks ---------------------------------------------------------------------------------------


def _tick(
    factory: Callable[..., Rule],
    hyper: Mapping[str, Any],
    state: RuleState,
    present: np.ndarray,
    same: Sequence[int] | None,
) -> tuple[Callable[[int], tuple], Array, Any]:
    """(scalars of leaf i in this step: static, numbers and now; the new count; the new clock)."""

    def tick(count: Array, clock: Any) -> Any:
        values = [hypers.as_number(f(count)) for f in hypers.schedules_of(hyper)]
        filled = iter(values)
        at_step = hypers.map_schedules(lambda _: next(filled), hyper)
        now, new = factory(**at_step).tick(clock, hypers.as_number(count) + 1)
        now = jax.tree.map(jnp.asarray, now)  # a tick may give Python numbers
        return (values, now), jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), new, clock)

    def scalars(values_and_now: Any) -> tuple:
        values, now = values_and_now
        filled = iter(values)
        numbers, static = hypers.partition(
            hypers.map_schedules(lambda _: next(filled), hyper), hypers.is_live_number
        )
        return static, tuple(hypers.as_number(x) for x in numbers), now

    count = hypers.saturating_increment(state.count)
    if state.count.ndim == 0:
        now, clock = tick(state.count, state.clock)
        of_all = scalars(now)
        return (lambda i: of_all), count, clock

    now, clock = jax.vmap(tick)(state.count, state.clock)
    if not present.all():
        count = jnp.where(present, count, state.count)
        clock = jax.tree.map(lambda a, b: jnp.where(present, a, b), clock, state.clock)
    first = range(len(present)) if same is None else same
    of_leaf = functools.cache(lambda i: scalars(jax.tree.map(lambda x: x[i], now)))
    return (lambda i: of_leaf(first[i])), count, clock


# --- rows: the states of one leaf; columns: one state of all leaves -------------------------------


def _columns(kind: Any, treedef: Any, rows: list[Any]) -> Any:
    """One NamedTuple of trees from one NamedTuple per parameter."""
    columns = ([getattr(row, name) for row in rows] for name in kind._fields)
    return kind(
        *(
            None if all(x is None for x in column) else treedef.unflatten(column)
            for column in columns
        )
    )


def _scalar_state(rule: Rule, shape: tuple[int, ...] = ()) -> Any:
    return jax.eval_shape(
        lambda p: init_leaf(rule, None, p), jax.ShapeDtypeStruct(shape, jnp.float32)
    )


def _no_rows(rule: Rule, treedef: Any) -> Any:
    """The states of a tree without leaves, such as the placeholder of `optax.tree.map_params`:
    those that a scalar or a matrix would have."""
    scalar, matrix = _scalar_state(rule), _scalar_state(rule, (2, 2))
    return type(scalar)(
        *(
            None if a is None and b is None else treedef.unflatten([])
            for a, b in zip(scalar, matrix, strict=True)
        )
    )


def _rows(states: Any, treedef: Any, names: Callable[[], Sequence[str]]) -> list[Any]:
    """The inverse of `_columns`."""
    columns = [
        [None] * treedef.num_leaves
        if tree is None
        else align(treedef, tree, f"state {name!r}", names)
        for name, tree in fields(states)
    ]
    kind = type(states)
    if not columns:
        return [kind()] * treedef.num_leaves
    return [kind(*row) for row in zip(*columns, strict=True)]


# --- overrides ------------------------------------------------------------------------------------


def _checked_overrides(
    factory: Callable[..., Rule],
    hyper: Mapping[str, Any],
    overrides: Mapping[str, Any],
    state: RuleState,
    rows: Sequence[Any],
    params: Sequence[Array],
) -> dict[str, Any]:
    """The overrides that name a number of this rule; others are for other links of a chain."""
    mine = hypers.normalize({k: v for k, v in overrides.items() if k in hyper and v is not None})
    for name, value in mine.items():
        is_fixed = isinstance(hyper[name], bool | str | None | hypers.Whole)
        if is_fixed or isinstance(value, bool | str):
            raise TypeError(f"{name} is fixed at construction: {hyper[name]!r}, got {value!r}")
    if mine:
        new = {**hyper, **mine}
        factory(**new)  # range checks
        if hypers.needs_other_buffers(hyper, new):
            scalars = {name for name, _ in fields(state.clock)}
            present = [{k for k, v in fields(row) if v is not None} | scalars for row in rows]
            check_buffers(factory, hyper, new, zip(params, present, strict=True))
    # An override is always traced: a new value must not be a new program.
    return jax.tree.map(
        lambda x: x if callable(x) else hypers.as_number(x), mine, is_leaf=hypers.is_leaf
    )


def check_buffers(
    factory: Callable[..., Rule],
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    present: Iterable[tuple[Array, set[str]]],
) -> None:
    """Refuses values that need a state which was not allocated at construction.

    Args:
      factory: the rule's factory.
      old: the hyper-parameters before.
      new: the hyper-parameters now.
      present: for each parameter, itself and the names of its states and clock scalars.

    Raises:
      ValueError: names the values that changed and the states that are missing.
    """
    rule = factory(**hypers.at_step(new, 0))
    scalars = {name for name, _ in fields(rule.clock)}
    state_of = functools.cache(
        lambda shape, dtype: jax.eval_shape(
            lambda p: init_leaf(rule, None, p), jax.ShapeDtypeStruct(shape, dtype)
        )
    )
    missing: set[str] = set()
    for p, names in present:
        needed = {name for name, value in fields(state_of(p.shape, p.dtype)) if value is not None}
        missing |= (needed | scalars) - names
    if missing:
        changed = {k: v for k, v in new.items() if v is not old.get(k)}
        raise ValueError(
            f"{changed} needs the state {sorted(missing)}, which was not allocated at "
            "construction; no step creates state"
        )
