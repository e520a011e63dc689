"""Who holds an array: what decides whether its buffer may be given away."""

import sys
from typing import Any

import jax
import jax.numpy as jnp

from cerebras_jax.checks import is_traced


def _counts(values: list[Any]) -> list[int]:
    return [sys.getrefcount(x) for x in values]


(_IN_A_LIST,) = _counts([object()])  # of what nothing but one list holds


def unshared(tree: Any, owners: int = 1) -> Any:
    """The tree, with copies in place of the arrays that somebody else holds too.

    Its buffers can then be donated: nobody loses a value. Python's reference counts tell who
    holds an array. They do not see arrays that share a buffer without holding each other, such
    as the result of ``jax.device_put(x, device)`` with the device where x is; NumPy's views are
    safe, because JAX does not give away a buffer that they look at.

    Args:
      tree: arrays, or tracers, which pass.
      owners: how many containers are known to hold each of them, the tree itself included.
    """
    leaves, treedef = jax.tree.flatten(tree)
    alone = _IN_A_LIST + owners  # the list is ``leaves``
    counts = _counts(leaves)
    if max(counts, default=0) <= alone:
        return tree
    return treedef.unflatten(
        [
            jnp.copy(x) if n > alone and not is_traced(x) else x
            for x, n in zip(leaves, counts, strict=True)
        ]
    )
