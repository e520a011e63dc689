"""The order of writes that XLA's CPU backend needs to mask states without copying them."""

from typing import Any

import jax
import jax.numpy as jnp

from cerebras_jax.checks import is_traced
from cerebras_jax.engine import xla_cpu
from cerebras_jax.types import Array


def is_needed(done: Any) -> bool:
    """Whether to mind the order: in a trace, not where XLA makes one loop of all results."""
    return is_traced(done) and not xla_cpu.is_enabled()


def zero_after(done: Array, dtype: Any) -> Array:
    """Zero, but on CPU known only when the array ``done`` is."""
    zero = jnp.zeros((), dtype)
    if done.size == 0 or not jax.typeof(done).sharding.mesh.empty:
        return zero

    def late(done: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(done.real.ravel()[0].astype(jnp.float32), jnp.uint32)
        return (bits >> 31 >> 1).astype(dtype)  # whatever the bits: all 32 are shifted out

    return jax.lax.platform_dependent(done, cpu=late, default=lambda done: zero)
