"""From objects to the arrays and the text of a checkpoint."""

import contextlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from cerebras_jax.checkpoint.fingerprint import fingerprints
from cerebras_jax.checkpoint.nodes import Nodes
from cerebras_jax.checks import any_traced
from cerebras_jax.processes import check_equal

FORMAT = 1
"""The layout that is written; a reader knows this and all before it."""

_TRACED = "a traced function has no values to save; save after the step"


def packed(step: int | None, objects: Mapping[str, Any], verify: bool) -> tuple[dict, str]:
    """The arrays of a checkpoint by path, each of them once, and the text that describes them."""
    if not objects:
        raise ValueError("there is nothing to save; name the objects, like opt=opt")
    found: dict[str, Any] = {}
    about: dict[str, Any] = {}
    for name, obj in objects.items():
        about[name] = {}
        for path, node in Nodes(name, obj).by_path.items():
            try:
                about[name][path], arrays = node.record()
            except jax.errors.ConcretizationTypeError:
                raise RuntimeError(_TRACED) from None
            mine = {join(name, path, local): x for local, x in arrays.items()}
            if twice := sorted(mine.keys() & found.keys()):
                raise ValueError(f"two arrays are called {twice[0]!r}")
            found |= mine
    if any_traced(found.values()):
        raise RuntimeError(_TRACED)
    shapes = [x for x, y in found.items() if isinstance(y, jax.ShapeDtypeStruct)]
    if shapes:
        raise TypeError(f"{shapes[0]} is a shape without values, which cannot be saved")
    first: dict[int, str] = {}
    entries: dict[str, dict[str, Any]] = {}
    for path, x in found.items():
        entries[path] = {"shape": list(x.shape), "dtype": x.dtype.name}
        if (same := first.setdefault(id(x), path)) != path:
            entries[path]["same"] = same
    unique = {path: _whole(found[path]) for path in first.values()}
    if verify:
        for path, value in zip(unique, fingerprints([*unique.values()]), strict=True):
            entries[path]["fingerprint"] = value
    written = {path: x for path, x in unique.items() if x.size}
    text = {
        "format": FORMAT,
        "step": step,
        "versions": _versions(),
        "arrays": entries,
        "objects": about,
    }
    dumped = json.dumps(text, allow_nan=False)
    check_equal(
        dumped,
        "what is no array, such as param_groups, schedulers or the place in the data; only what "
        "all share can be saved",
    )
    return written, dumped


def _versions() -> dict[str, str]:
    """Of what writes; a package that is merely on the path has none."""
    found = {}
    for name in ("cerebras_jax", "jax", "orbax-checkpoint"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _whole(x: Any) -> Any:
    return np.asarray(x) if isinstance(x, np.generic) else x


def join(*parts: str) -> str:
    return "/".join(part for part in parts if part)
