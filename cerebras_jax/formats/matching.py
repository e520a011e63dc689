"""Which state belongs to which parameter, where a file has numbers instead of names."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from cerebras_jax.messages import shown

Names: TypeAlias = Sequence[str] | Sequence[Sequence[str]]
"""Parameter names in the model's order, or a list of them for each group."""

Shape: TypeAlias = tuple[int, ...]

CLOCKS = frozenset({"step", "beta1_power", "beta2_power", "mu_product", "eta", "mu"})
"""States that are scalars whatever the parameter's shape is."""

FACTORS = {"exp_avg_sq_row": "exp_avg_sq_col", "row_var": "col_var"}
"""States of Adafactor without the last axis, and their counterparts without the one before."""

_BUFFERS = re.compile(r"(.*\.)?(running_mean|running_var|num_batches_tracked)")
_NOT_DECAYED = re.compile(r"(?i).*bias|b|.*norm.*|ln|ln_.*|.*_ln|bn\d*|bn_.*")

_ASK = (
    "; names= must say: the parameters' names in the model's order, or one list of names for each "
    "group, in the optimizer's order"
)


def shape_of(entry: Mapping[str, Any]) -> Shape | None:
    """The shape of the parameter that a state belongs to; None if the state does not tell."""
    shapes = {
        np.shape(v)
        for k, v in entry.items()
        if v is not None and k not in CLOCKS and k not in FACTORS and k not in FACTORS.values()
    }
    if len(shapes) == 1:
        return shapes.pop()
    for row, col in FACTORS.items():
        if entry.get(row) is not None and entry.get(col) is not None:
            rows, cols = np.shape(entry[row]), np.shape(entry[col])
            keeps_axis = row == "row_var"  # torch: an axis of length 1
            return (*rows[:-1], cols[-1]) if keeps_axis else (*rows, cols[-1])
    return None


def name_parameters(
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[int, Mapping[str, Any]],
    params: Mapping[str, Any],
    names: Names | None,
    ordered: bool,
) -> list[list[str]]:
    """Names for the parameters of every group of a torch-like state dict.

    Names that are given, or are in the dict itself, are checked against the shapes. Otherwise a
    group has the model's order, as torch's groups have, and belongs together by shape and by
    whether it is decayed; where that leaves a choice, it is an error. Without any parameters,
    the numbers are the names.

    Raises:
      ValueError: if the names cannot be told, or do not fit.
    """
    numbers = [[int(i) for i in group["params"]] for group in groups]
    shapes = [[shape_of(state[i]) if i in state else None for i in group] for group in numbers]
    if names is not None and len(names) and not isinstance(names[0], str):
        found = [[str(n) for n in members] for members in names]
    elif all(group.get("param_names") for group in groups if group["params"]) and any(numbers):
        found = [list(group.get("param_names") or []) for group in groups]
    elif names is None and not params:
        found = [[str(i) for i in group] for group in numbers]
    else:
        candidates: dict[str, Shape | None] = _candidates(params, sum(map(len, numbers)))
        if names is not None:
            flat = [str(n) for n in names]
            unknown = [n for n in flat if params and n not in params]
            if unknown:
                raise ValueError(f"names= has {unknown[:5]}, which the file has not")
            candidates = {n: np.shape(params[n]) if n in params else None for n in flat}
        decays = [bool(np.any(np.asarray(group.get("weight_decay", 0)) != 0)) for group in groups]
        found = _by_shape(shapes, decays, candidates, ordered or names is not None)
    sizes = [len(members) for members in found]
    if sizes != [len(group) for group in numbers]:
        raise ValueError(
            f"the groups have {[len(group) for group in numbers]} parameters, the names are {sizes}"
        )
    for members, known in zip(found, shapes, strict=True):
        for name, shape in zip(members, known, strict=True):
            if name in params and shape is not None and shape != np.shape(params[name]):
                raise ValueError(
                    f"{name!r} has shape {np.shape(params[name])}, its state {shape}{_ASK}"
                )
            if params and name not in params:
                raise ValueError(f"the optimizer has a state of {name!r}, the model has no such")
    return found


def _candidates(params: Mapping[str, Any], expected: int) -> dict[str, Any]:
    """Shapes of what may be trained; without tied aliases, if there are too many."""
    kept = {n: p for n, p in params.items() if _is_float(p) and not _BUFFERS.fullmatch(n)}
    if len(kept) > expected:
        seen: set[Any] = set()
        for name, array in [(n, np.ascontiguousarray(p)) for n, p in kept.items()]:
            if array.ndim < 2 or not (array != array.flat[0]).any():
                continue  # many different parameters begin as the same constant
            content = hashlib.sha256(array.view(np.uint8).data).digest()
            key = (array.shape, array.dtype, content)
            if key in seen:
                del kept[name]
            seen.add(key)
    return {name: np.shape(p) for name, p in kept.items()}


def _is_float(p: Any) -> bool:
    dtype = np.asarray(p).dtype
    return dtype.kind in "fc" or dtype.name.startswith(("bfloat", "float"))


def _by_shape(
    shapes: Sequence[Sequence[Shape | None]],
    decays: Sequence[bool],
    candidates: Mapping[str, Shape | None],
    ordered: bool,
) -> list[list[str]]:
    count = sum(map(len, shapes))
    if count != len(candidates):
        raise ValueError(
            f"the optimizer has {count} parameters, the model {len(candidates)}: "
            f"{shown([*candidates])}{_ASK}"
        )
    if len(shapes) == 1 and _fits(list(candidates), shapes[0], candidates, ordered):
        return [list(candidates)]
    if not any(candidates.values()):  # names alone were given
        shapes = [[None] * len(group) for group in shapes]
    owner: dict[str, int] = {}
    kinds = {shape for group in shapes for shape in group}
    for kind in sorted(kinds, key=lambda kind: (kind is None, str(kind))):
        known = {n for n, s in candidates.items() if n not in owner and kind in (None, s)}
        counts = {g: list(group).count(kind) for g, group in enumerate(shapes) if kind in group}
        owner |= _split([n for n in candidates if n in known], counts, decays, kind)
    result = []
    for g, group in enumerate(shapes):
        members = [n for n in candidates if owner[n] == g]
        result.append(_arrange(members, group, candidates, ordered))
    return result


def _split(
    names: list[str], counts: dict[int, int], decays: Sequence[bool], kind: Shape | None
) -> dict[str, int]:
    """The group of each of the names, all of one shape: the only one, or by decay."""
    what = "of unknown shape" if kind is None else f"of shape {kind}"
    if len(names) != sum(counts.values()):
        raise ValueError(
            f"the optimizer has {sum(counts.values())} parameters {what}, the model has "
            f"{shown(names)}{_ASK}"
        )
    if len(counts) == 1:
        return dict.fromkeys(names, *counts)
    owner: dict[str, int] = {}
    for decayed in (True, False):
        mine = [n for n in names if is_decayed(n) is decayed]
        takers = [g for g in counts if decays[g] is decayed]
        if sum(counts[g] for g in takers) != len(mine) or len(takers) > 1:
            raise ValueError(
                f"several groups have parameters {what}, and any could be {shown(names)}{_ASK}"
            )
        owner |= dict.fromkeys(mine, *takers) if mine else {}
    return owner


def is_decayed(name: str) -> bool:
    """Whether a parameter of this name usually decays: not a bias, not in a normalization."""
    return not any(_NOT_DECAYED.fullmatch(part) for part in name.split("."))


def _arrange(
    members: list[str],
    shapes: Sequence[Shape | None],
    known: Mapping[str, Shape | None],
    ordered: bool,
) -> list[str]:
    """The members of one group in its order."""
    if _fits(members, shapes, known, ordered):
        return members
    by_shape = {known[n]: n for n in members}
    if len(by_shape) < len(members) or not set(shapes) <= set(by_shape):
        same = [n for n in members if by_shape[known[n]] != n or list(shapes).count(known[n]) > 1]
        raise ValueError(f"{shown(same)} have the same shape, and the order does not tell{_ASK}")
    return [by_shape[s] for s in shapes]


def _fits(
    members: Sequence[str],
    shapes: Sequence[Shape | None],
    known: Mapping[str, Shape | None],
    ordered: bool,
) -> bool:
    """Whether members, in the model's order, have the shapes."""
    pairs = zip(members, shapes, strict=True)
    return ordered and all(s is None or known[n] in (None, s) for n, s in pairs)
