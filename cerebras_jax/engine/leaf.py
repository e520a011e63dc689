"""One gradient, one state, one parameter: the dtype policy, complex numbers, compiled once a kind.

Arithmetic is done in at least float32, each state is stored in its own dtype, the update in the
parameter's. A complex array is a pair of real ones.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from cerebras_jax import checks
from cerebras_jax.engine import rounding, xla_cpu
from cerebras_jax.engine.hyper import combine
from cerebras_jax.engine.rule import Rule
from cerebras_jax.engine.trees import is_complex
from cerebras_jax.types import Array

StateDtype = Any
"""A dtype for every state, or ``{"exp_avg": dtype}`` for some of them; None: the parameter's."""


Rounding = Literal["nearest", "stochastic", "exact"]
"""How new bfloat16 parameters are rounded; see `per_parameter`."""


def init_leaf(rule: Rule, state_dtype: StateDtype, p: Any) -> Any:
    """Initialises the states of one parameter, each stored in its own dtype."""
    if not is_complex(p):
        state = rule.init(p)
        if not hasattr(state, "_fields"):
            raise TypeError(f"a rule's init must return a NamedTuple, got {type(state).__name__}")
        return type(state)(
            *(_cast_state(state_dtype, name in rule.wide, name, x) for name, x in fields(state))
        )
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


def fields(state: Any) -> list[tuple[str, Any]]:
    """Names and values of a NamedTuple."""
    return list(zip(state._fields, state, strict=True)) if hasattr(state, "_fields") else []


def update_leaf(
    factory: Callable[..., Rule], static: Any, numbers: tuple, now: Any, g: Array, s: Any, p: Array
) -> tuple[Array, Any]:
    """The update of one parameter, and its new state.

    Args:
      factory: makes the rule from the hyper-parameters.
      static: the static part of the hyper-parameters, see `hyper.partition`.
      numbers: their numbers in this step.
      now: what the rule's ``tick`` made for this step.
      g: the gradient.
      s: the state, the rule's NamedTuple.
      p: the parameter.
    """
    compute = jnp.promote_types(p.real.dtype if is_complex(p) else p.dtype, jnp.float32)

    def widen(x: Array) -> Array:
        return _cast(_as_pairs(x) if is_complex(x) else x, compute)

    def run(scalars: Any, g: Array) -> tuple[Array, Any]:
        numbers, now = jax.tree.map(lambda x: _cast(x, compute), scalars)
        rule = factory(**combine(numbers, static))
        return rule.update(widen(g), jax.tree.map(widen, s), now, widen(p))

    g = g.astype(p.dtype) if is_complex(p) else g
    numbers, now = jax.tree.map(lambda x: _cast(x, compute), (numbers, now))
    rule = factory(**combine(numbers, static))
    result = rule.update(widen(g), jax.tree.map(widen, s), now, widen(p))
    u, new = _checked_update(factory, result, s, widen(p))
    u = _store(u, p)
    new = xla_cpu.arranged(new, rule.written_last, run, (numbers, now), g, p, u)
    return u, jax.tree.map(_store, new, s)


def step_leaf(
    mode: Rounding,
    returns_params: bool,
    factory: Callable[..., Rule],
    static: Any,
    numbers: tuple,
    now: Any,
    g: Array,
    s: Any,
    p: Array,
    low_bits: Array | None,
    draws: tuple[Array, Array] | None,
) -> tuple[Array, Any, Array | None]:
    """The update of one parameter, its new state, and what its rounding left over.

    Args:
      mode: how a bfloat16 parameter is rounded.
      returns_params: whether to return the next value in place of the update.
      factory, static, numbers, now, g, s, p: see `update_leaf`.
      low_bits: with "exact", what the last rounding left over.
      draws: with "stochastic", numbers of the paths of the parameter and its states, and the
        number of steps it has taken.
    """
    if mode == "nearest" or p.dtype != jnp.bfloat16:
        u, new = update_leaf(factory, static, numbers, now, g, s, p)
        return ((p + u).astype(p.dtype) if returns_params else u), new, low_bits
    wide = rounding.join(p, jnp.zeros_like(p, jnp.int16) if low_bits is None else low_bits)
    if mode == "exact":
        u, new = update_leaf(factory, static, numbers, now, g, s, wide)
        q, low_bits = rounding.split(wide + u)
        return (q if returns_params else rounding.float32_update(q, p)), new, low_bits
    assert draws is not None  # of every bfloat16 parameter
    paths, count = draws
    remaining = iter(range(paths.shape[0]))

    def store(x: Array, like: Array) -> Array:
        path = paths[next(remaining)]
        if like.dtype != jnp.bfloat16:
            return _store(x, like)
        return rounding.stochastic(x, rounding.random_bits(0, path, count, x.shape))

    # The states in float32, so that nothing is rounded before it is drawn for.
    wide_s = jax.tree.map(lambda x: _cast(x, jnp.promote_types(x.dtype, jnp.float32)), s)
    u, new = update_leaf(factory, static, numbers, now, g, wide_s, wide)
    q = store(wide + u, p)
    new = jax.tree.map(store, new, s)
    return (q if returns_params else rounding.float32_update(q, p)), new, None


_step_leaf_of_a_kind = jax.jit(step_leaf, static_argnums=(0, 1, 2, 3))  # traced once per type


def leaf_steps(params: Sequence[Array]) -> list[Callable[..., Any]]:
    """For each parameter the function that steps it: `step_leaf`.

    Jitted, except within a trace for the only parameter of its type, where that would not pay.
    """
    types = [(p.shape, p.dtype) for p in params]
    count = collections.Counter(types)
    return [
        step_leaf if count[t] == 1 and checks.is_traced(p) else _step_leaf_of_a_kind
        for t, p in zip(types, params, strict=True)
    ]


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


def _cast_state(state_dtype: StateDtype, is_wide: bool, name: str, value: Any) -> Any:
    if value is None:
        return None
    dtype = state_dtype.get(name) if isinstance(state_dtype, dict) else state_dtype
    if dtype is None:
        dtype = jnp.promote_types(value.dtype, jnp.float32) if is_wide else value.dtype
    return value if value.dtype == dtype else value.astype(dtype)


def _store(x: Array, like: Array) -> Array:
    return _from_pairs(x, like.dtype) if is_complex(like) else _cast(x, like.dtype)


def _cast(x: Array, dtype: Any) -> Array:
    """``astype``, which is slow where it has nothing to do."""
    return x if x.dtype == dtype and not x.aval.weak_type else x.astype(dtype)


def _as_pairs(x: Array) -> Array:
    return jnp.stack([x.real, x.imag], axis=-1)


def _from_pairs(x: Array, dtype: Any) -> Array:
    return jax.lax.complex(x[..., 0], x[..., 1]).astype(dtype)
