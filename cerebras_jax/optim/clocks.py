"""Which parameters of a group are known to have equal clocks, and so share their arithmetic."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cerebras_jax.checks import is_traced
from cerebras_jax.optim.entries import Place, read
from cerebras_jax.types import Array

Same = tuple[tuple[int, ...], ...]
"""Per group and parameter, the position of the first parameter with an equal clock; see `lift`."""


def known(
    groups: Sequence[Sequence[str]], of: Mapping[str, Mapping[str, Place]], leaves: Sequence[Array]
) -> Same:
    """Compares the clocks, where their values can be read.

    Args:
      groups: per group, the names of its parameters in the order of the clocks.
      of: the places of each parameter's values; see `entries.Catalogue`.
      leaves: the leaves of the state.
    """
    host: dict[int, Any] = {}

    def key(name: str) -> Any:
        scalars = {k: p for k, p in of[name].items() if p.row is not None}
        if any(is_traced(leaves[p.leaf]) for p in scalars.values()):
            return name
        found = read(leaves, scalars, host)
        return tuple(np.asarray(x).item() for x in found.values())

    return tuple(_first_of(map(key, names)) for names in groups)


def parted(same: Same, groups: Sequence[Sequence[str]], missed: set[str]) -> Same:
    """After a step that some parameters missed: these have clocks of their own."""
    return tuple(
        _first_of(zip(group, [name in missed for name in names], strict=True))
        for names, group in zip(groups, same, strict=True)
    )


def _first_of(keys: Iterable[Any]) -> tuple[int, ...]:
    """For each key, the position of the first that is equal to it."""
    first: dict[Any, int] = {}
    return tuple(first.setdefault(key, i) for i, key in enumerate(keys))
