"""The tree of a ``.mdl`` checkpoint: its description apart from its leaves, and what leaves are."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_MAPPINGS = ("dict", "OrderedDict", "defaultdict", "TensorScalarDict")
_SEQUENCES = {"list": list, "tuple": tuple, "set": set}
_NAMES_OF_DILL = {"DictType": "dict", "ListType": "list", "TupleType": "tuple"}


class Spec(NamedTuple):
    """A node of the tree, with None for leaves: what it is, a mapping's keys, what is in it."""

    kind: str
    keys: list | None
    children: list[Any]


def leaf_paths(spec: Spec | None, path: str = "") -> Iterator[str]:
    """The paths of all leaves, in order."""
    if spec is None:
        yield path
        return
    for key, child in zip(_keys(spec), spec.children, strict=True):
        yield from leaf_paths(child, f"{path}.{key}" if path else f"{key}")


def _keys(spec: Spec) -> Sequence[Any]:
    return range(len(spec.children)) if spec.keys is None else spec.keys


def join(spec: Spec | None, leaves: Iterator[Any]) -> Any:
    if spec is None:
        return next(leaves)
    children = [join(child, leaves) for child in spec.children]
    if spec.kind in _MAPPINGS:
        return dict(zip(_keys(spec), children, strict=True))
    return _SEQUENCES[spec.kind](children)


def split(tree: Any, leaves: list[Any]) -> Spec | None:
    """The spec of a tree; its leaves are appended to ``leaves``."""
    if isinstance(tree, Mapping):
        return Spec("dict", list(tree), [split(v, leaves) for v in tree.values()])
    if isinstance(tree, set | frozenset):
        return Spec("set", None, [split(v, leaves) for v in sorted(tree, key=repr)])
    if isinstance(tree, list | tuple):
        kind = "list" if isinstance(tree, list) else "tuple"
        return Spec(kind, None, [split(v, leaves) for v in tree])
    leaves.append(tree)
    return None


def make_spec(kind: Any, keys: Any, children: list[Any]) -> Spec | None:
    """A node as a file describes it, checked."""
    if kind is None:
        return None
    name = str(kind).rpartition(".")[2]
    name = _NAMES_OF_DILL.get(name, name)
    if name not in _MAPPINGS and name not in _SEQUENCES:
        raise ValueError(f"the tree has a node of the unknown kind {kind}")
    if name in _MAPPINGS and len(keys) != len(children):
        raise ValueError(f"a mapping has {len(keys)} keys and {len(children)} values")
    return Spec(name, list(keys) if name in _MAPPINGS else None, children)


class PickledObject:
    """Stands for a pickled object, which is not read."""


def without_objects(tree: Any, path: str, left: list[str]) -> Any:
    below = f"{path}." if path else ""
    if isinstance(tree, PickledObject):
        left.append(path)
        return None
    if isinstance(tree, dict):
        values = {k: without_objects(v, f"{below}{k}", left) for k, v in tree.items()}
        return {k: v for k, v in values.items() if not isinstance(tree[k], PickledObject)}
    if isinstance(tree, list | tuple):
        return type(tree)(without_objects(v, f"{below}{i}", left) for i, v in enumerate(tree))
    return tree


# --- leaves ---------------------------------------------------------------------------------------


def as_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in the dtype that it stands for: HDF5 has no bfloat16, but its bits."""
    if dtype.name == "bfloat16" and array.itemsize == 2:
        return array.view(dtype)
    return array if array.dtype == dtype else array.astype(dtype)


def storable(array: np.ndarray) -> np.ndarray:
    return array.view(np.int16) if array.dtype == ml_dtypes.bfloat16 else array


def constant(shape: Any, value: Any, dtype: np.dtype) -> np.ndarray:
    """A constant of any size in the memory of one number."""
    if value is None:
        raise ValueError("a constant without a value")
    return np.broadcast_to(np.array(value).astype(dtype), tuple(map(int, shape)))


def as_array(key: str, leaf: Any) -> np.ndarray:
    if not hasattr(leaf, "shape"):
        raise TypeError(
            f"{key}: a {type(leaf).__name__} cannot be written, only arrays, numbers, "
            "strings and None"
        )
    return np.asarray(leaf)
