"""What an algorithm is: a rule for one parameter, and the arithmetic that rules share.

An algorithm's file holds a *factory*: a function from hyper-parameters to a `Rule`. The factory
is cheap and is called again inside the trace with the numbers in force, so every hyper-parameter
may be a float, an array, a tracer or a schedule, and a new value never recompiles. Flags (bool,
str, None) are static, and so are arguments annotated ``int``, such as a number of iterations.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cerebras_jax import checks
from cerebras_jax.types import Array


def _same_clock(clock: Any, t: Array) -> tuple[Array, Any]:
    return t, clock


class Rule(NamedTuple):
    """An optimization algorithm for one parameter.

    Attributes:
      init: ``init(p) -> state``. ``state`` is a NamedTuple; its field names are the keys in a
        checkpoint; a buffer that this parameter does not need is None.
      update: ``update(g, state, now, p) -> (u, state)``. The next parameter is ``p + u``.
        All arrays come in at least float32; ``now`` is what ``tick`` made for this step.
      clock: a NamedTuple of scalars that depend on the steps taken only, such as
        ``beta1_power``; its values before the first step. Its fields are checkpoint keys too.
      tick: ``tick(clock, t) -> (now, clock)`` with ``t`` = 1, 2, ... the number of this step, a
        float scalar. By default ``now`` is ``t``.
      supports_complex: whether treating a complex parameter as pairs of reals makes sense.
      written_last: states that ``u`` reads as they were before the step. They are overwritten
        one after the other when the parameter is done, or XLA would have to copy them first.
      wide: states that are kept in at least float32 unless ``state_dtype`` says otherwise: sums
        and averages of squares, which underflow in float16 and stand still in bfloat16.
      elementwise: whether every element of ``init`` and ``update`` depends on the same element of
        its arguments only, whatever the shape, so that `packed` may join parameters.
    """

    init: Callable[[Any], Any]
    update: Callable[[Array, Any, Any, Array], tuple[Array, Any]]
    clock: Any = ()
    tick: Callable[[Any, Array], tuple[Any, Any]] = _same_clock
    supports_complex: bool = True
    written_last: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    elementwise: bool = False


def has_term(number: Any) -> bool:
    """Whether a buffer that only a non-zero ``number`` needs must be allocated.

    Only a zero that is certain to stay zero, a Python or NumPy constant, needs no buffer; an
    array, a tracer or a schedule may change later.
    """
    return not (isinstance(number, int | float | np.number) and number == 0)


def add_weight_decay(g: Array, weight_decay: Any, p: Array) -> Array:
    """L2 penalty: ``g + weight_decay * p``; nothing when it is the constant zero."""
    return g + weight_decay * p if has_term(weight_decay) else g


def bias_correction(beta: Any, t: Array) -> Array:
    """``1 - beta**t`` without cancellation where beta is near 1."""
    return -jnp.expm1(t * jnp.log(beta))


def zeros_without_axis(p: Any, axis: int) -> Array:
    """Zeros of p's shape without one axis, sharded as p is along the others."""
    if checks.is_traced(p):
        return jnp.zeros_like(p).sum(axis)
    shape = tuple(np.delete(p.shape, axis))
    sharding = getattr(p, "sharding", None)
    if isinstance(sharding, NamedSharding) and p.committed:
        spec = [*sharding.spec, *[None] * (len(p.shape) - len(sharding.spec))]
        del spec[axis]
        return jnp.zeros(shape, p.dtype, device=NamedSharding(sharding.mesh, PartitionSpec(*spec)))
    return jnp.zeros(shape, p.dtype)
