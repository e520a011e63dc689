"""Trees of parameters and gradients: their paths, and errors that name them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Names = Callable[[], Sequence[str]]
"""The paths of the leaves, worked out only if an error needs them."""


def path_name(path: Any) -> str:
    """A key path as a dotted name: ``"decoder.layers.0.kernel"``; the root leaf is ``""``."""
    if path and getattr(path[-1], "name", None) == "value":  # the value of an nnx.Variable
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator=".")


def leaf_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """Dotted path of every leaf."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf)]


def check_distinct(names: Sequence[str]) -> None:
    """Refuses two leaves with one dotted name, such as ``{"a.b": x, "a": {"b": y}}``."""
    if len(set(names)) < len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ValueError(f"parameters need distinct dotted names, these occur twice: {twice[:5]}")


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


def own_array(p: Any) -> Any:
    """Like `as_array`; an array of NumPy may be written to afterwards."""
    return as_array(p.copy() if isinstance(p, np.ndarray) else p)


def is_complex(x: Any) -> bool:
    """Whether an array is of a complex dtype."""
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


def check_params(leaves: Sequence[Any], names: Names) -> None:
    """Refuses parameters that are not floating point or complex arrays, naming the path."""
    for i, p in enumerate(leaves):
        dtype = getattr(p, "dtype", type(p))
        is_inexact = hasattr(p, "dtype") and jnp.issubdtype(p.dtype, jnp.inexact)
        if not (isinstance(p, float) or is_inexact):
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
        if jnp.issubdtype(dtype, jnp.complexfloating) and not is_complex(p):
            raise TypeError(f"gradient {names()[i]!r} is {dtype}, its parameter {p.dtype}")


def align(treedef: Any, tree: Any, what: str, names: Names) -> list[Any]:
    """The leaves of ``tree``, which must have the structure ``treedef``; None may be a leaf.

    Raises:
      ValueError: names the first paths that are missing or unexpected.
    """
    try:
        return treedef.flatten_up_to(tree)
    except (ValueError, TypeError, KeyError) as error:
        expected = names()
        found = leaf_paths(tree, is_leaf=lambda x: x is None)
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
