"""States of other implementations of Muon: torch.optim's, Keller Jordan's and Moonlight's.

All keep one buffer per matrix, in torch's layout (outputs, inputs). torch's and Keller Jordan's are
averages of the gradients as ours is; Moonlight's is their sum, 1 / (1 - momentum) times as large.
The parameters of their Adam keep Adam's moments and step count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Entry = dict[str, Any]
Entries = Mapping[str, Mapping[str, Any]]
Groups = Sequence[Mapping[str, Any]]

_MOONLIGHT = {"exp_avg": "moment1", "exp_avg_sq": "moment2"}


def from_torch(entries: Entries, groups: Groups) -> dict[str, Entry]:
    """States of `Muon` from those of torch.optim.Muon or of Keller Jordan's optimizers.

    Args:
      entries: state by parameter name: ``momentum_buffer``; or, where a parameter is Adam's,
        ``exp_avg``, ``exp_avg_sq`` and ``step``.
      groups: our groups. Arrays are transposed from torch's layout to that of the group's ``axes``
        (None: "io"); Adam's only if the group says axes that fit.

    Returns:
      New entries. Those of Muon get a ``step`` of 0, which it does not use.

    Raises:
      ValueError: if axes have no counterpart in torch.

    >>> state = from_torch({"w": {"momentum_buffer": np.ones((4, 2))}}, [{"params": ["w"]}])
    >>> state["w"]["momentum_buffer"].shape
    (2, 4)
    """
    return {
        name: {"step": np.float32(0), **_map_arrays(entry, lambda x, a=axes: _to_ours(x, a))}
        for name, entry, axes, _ in _with_group(entries, groups)
    }


def to_torch(entries: Entries, groups: Groups) -> dict[str, Entry]:
    """The inverse of `from_torch`.

    torch.optim.Muon takes the entries with a ``momentum_buffer``; the others are those of
    torch.optim.AdamW.
    """
    result = {}
    for name, entry, axes, _ in _with_group(entries, groups):
        theirs = _map_arrays(entry, lambda x, a=axes: _to_theirs(x, a))
        if "momentum_buffer" in theirs:
            theirs.pop("step", None)
        result[name] = theirs
    return result


def from_moonlight(entries: Entries, groups: Groups) -> dict[str, Entry]:
    """States of `Muon` from those of Moonlight's optimizer; see `from_torch`.

    Its buffers are multiplied by 1 - momentum, of the group. Its Adam adds eps before the bias
    correction, ours after it.
    """
    ours_by_theirs = {theirs: ours for ours, theirs in _MOONLIGHT.items()}
    result = {}
    for name, entry, _, momentum in _with_group(entries, groups):
        entry = {ours_by_theirs.get(k, k): v for k, v in entry.items() if k != "use_muon"}
        if "momentum_buffer" in entry:
            entry["momentum_buffer"] = np.asarray(entry["momentum_buffer"]) * (1 - momentum)
        result[name] = entry
    return from_torch(result, groups)


def to_moonlight(entries: Entries, groups: Groups) -> dict[str, Entry]:
    """The inverse of `from_moonlight`."""
    result = {}
    for name, entry, _, momentum in _with_group(to_torch(entries, groups), groups):
        is_muons = "momentum_buffer" in entry
        theirs = {_MOONLIGHT.get(k, k): v for k, v in entry.items()}
        if is_muons:
            theirs["momentum_buffer"] = theirs["momentum_buffer"] / (1 - momentum)
        else:
            theirs["step"] = int(theirs["step"])
        result[name] = {**theirs, "use_muon": is_muons}
    return result


def _with_group(
    entries: Entries, groups: Groups
) -> Iterator[tuple[str, Mapping[str, Any], str | None, float]]:
    """(name, entry, axes of its arrays or None, momentum) of every parameter with an entry."""
    for group in groups:
        axes, momentum = group.get("axes"), float(group.get("momentum", 0.95))
        for name in group["params"]:
            if name not in entries:
                continue
            entry = entries[name]
            is_muons = entry.get("momentum_buffer") is not None
            rank = max((np.ndim(x) for x in entry.values()), default=0)
            fits = axes is not None and len(axes) == rank
            yield name, entry, axes if fits else "io" if is_muons else None, momentum
    unknown = sorted(set(entries) - {name for group in groups for name in group["params"]})
    if unknown:
        raise ValueError(f"the entries have state for {unknown[:5]}, which are in no group")


def _map_arrays(entry: Mapping[str, Any], fn: Callable[[Any], Any]) -> Entry:
    return {k: v if np.ndim(v) == 0 else fn(v) for k, v in entry.items() if v is not None}


def _to_theirs(x: Any, axes: str | None) -> np.ndarray:
    return np.asarray(x).transpose(_torch_order(axes)) if axes else np.asarray(x)


def _to_ours(x: Any, axes: str | None) -> np.ndarray:
    return np.asarray(x).transpose(np.argsort(_torch_order(axes))) if axes else np.asarray(x)


def _torch_order(axes: str) -> list[int]:
    """Our axes in torch's order: outputs, inputs (the last of ours), then the others."""
    n = len(axes)
    if axes == "o" + "i" * (n - 1):  # torch's own layout
        return [*range(n)]
    if axes == "i" * (n - 1) + "o":
        return [n - 1, n - 2, *range(n - 2)]
    raise ValueError(
        f"torch has no layout for axes {axes!r}; it has those of 'io', 'iiio' and 'oi'"
    )
