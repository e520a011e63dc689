"""The float32 values of bfloat16 parameters that were rounded exactly."""

from typing import Any

import jax
import jax.numpy as jnp

from cerebras_jax.engine import rounding
from cerebras_jax.engine.leaf import is_rounded
from cerebras_jax.engine.lift import RuleState
from cerebras_jax.engine.memory import on_device
from cerebras_jax.engine.trees import leaf_paths
from cerebras_jax.types import Array, Params


def full_precision(params: Params, state: Any) -> Any:
    """The float32 values of bfloat16 parameters that were trained with ``rounding="exact"``.

    Args:
      params: the parameters.
      state: their optax state, in whatever wrappers.

    Returns:
      a tree like the parameters; those without bits in the state are widened, others stay.

    Raises:
      ValueError: if the state has bits of other names; that of `packed` has, see `unpacked`.

    >>> import optax
    >>> from cerebras_jax import optim
    >>> tx = optim.sgd(lr=1.0, rounding="exact")
    >>> params = {"w": jnp.ones(1, jnp.bfloat16)}
    >>> updates, state = tx.update({"w": jnp.full(1, 2.0**-12)}, tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> params["w"], full_precision(params, state)["w"]
    (Array([1], dtype=bfloat16), Array([0.99975586], dtype=float32))
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, RuleState))
    bits: dict[str, Array] = {}
    for node in nodes:
        if isinstance(node, RuleState) and node.low_bits is not None:
            paths, leaves = leaf_paths(node.low_bits), jax.tree.leaves(node.low_bits)
            bits |= zip(paths, on_device(leaves), strict=True)
    if unknown := sorted(bits.keys() - set(leaf_paths(params))):
        raise ValueError(
            f"the state has bits of {unknown[:5]}, which the parameters have not; of a packed one "
            "give unpacked(state, params)"
        )
    leaves, treedef = jax.tree.flatten(params)
    wide = [
        rounding.join(p, bits[name] if name in bits else jnp.zeros_like(p, jnp.int16))
        if is_rounded(p)
        else p
        for name, p in zip(leaf_paths(params), leaves, strict=True)
    ]
    return treedef.unflatten(wide)
