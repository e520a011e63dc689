"""Which parameters are sparse, and how: patterns of names to algorithms."""

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from cerebras_jax.sparse.algorithms import Algorithm

Pattern: TypeAlias = str | re.Pattern[str]
"""A glob for a whole dotted name (``*`` matches dots too), or a regular expression to search."""

Groups: TypeAlias = Algorithm | Mapping[Any, Algorithm]
"""One algorithm for the parameters that are sparse by default, or patterns to algorithms."""

_DENSE = ("embedding", "norm", "lm_head", "pe_helper")


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """Which parameters are sparse, and how.

    Args:
      groups: an algorithm, for all arrays with at least two axes but embeddings, normalisation
        layers and the output head; or a dict from a pattern, or a tuple of patterns, to an
        algorithm. A parameter belongs to the first group with a pattern that matches its name; one
        that no group takes stays dense. A string is a glob for the whole name; a compiled regular
        expression is searched in it.
      seed: of the random masks and of random growth, which depend on it, on the parameter's name
        and on the step only; a whole number in [0, 2**32).

    Raises:
      TypeError: if something is neither an algorithm nor a pattern.
      ValueError: if the seed is outside its range.

    >>> import re
    >>> from cerebras_jax import sparse
    >>> chosen = Sparsity({("*.q", "*.k"): sparse.Static(0.5), re.compile("ffn"): sparse.SET(0.9)})
    >>> shapes = {"attn.q": (8, 8), "attn.k": (8, 8), "attn.v": (8, 8), "ffn.up": (8, 32)}
    >>> {name: algorithm.sparsity for name, algorithm in chosen.assign(shapes).items()}
    {'attn.q': 0.5, 'attn.k': 0.5, 'ffn.up': 0.9}
    """

    groups: Any
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", _checked(self.groups))
        seed = self.seed
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise ValueError(f"seed must be a whole number in [0, 2**32), got {seed!r}")

    def assign(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Algorithm]:
        """The algorithm of every sparse parameter.

        Args:
          shapes: the names of all parameters, and their shapes.

        Raises:
          ValueError: names a pattern that matches nothing, and some of the names.
        """
        return dict(_assign(self.groups, tuple((k, tuple(v)) for k, v in shapes.items())))


def _checked(groups: Any) -> tuple[tuple[tuple[Pattern, ...] | None, Algorithm], ...]:
    """Pairs of patterns (None: the default) and algorithms."""
    if isinstance(groups, Algorithm):
        return ((None, groups),)
    if isinstance(groups, Sparsity):
        return groups.groups
    items = list(groups.items()) if isinstance(groups, Mapping) else groups
    if not isinstance(items, list | tuple) or not items:
        raise TypeError(f"groups must be an algorithm or a dict of patterns, got {groups!r}")
    return tuple((_patterns(patterns), _algorithm(value)) for patterns, value in items)


def _patterns(patterns: Any) -> tuple[Pattern, ...] | None:
    if patterns is None:
        return None
    patterns = tuple(patterns) if isinstance(patterns, list | tuple) else (patterns,)
    for pattern in patterns:
        if not isinstance(pattern, str | re.Pattern):
            raise TypeError(f"a pattern must be a string or compiled by re, got {pattern!r}")
    return patterns


def _algorithm(value: Any) -> Algorithm:
    if not isinstance(value, Algorithm):
        raise TypeError(f"an algorithm must be Static, GMP, SET or RigL, got {value!r}")
    return value


Shapes: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]


@functools.lru_cache(maxsize=64)
def _assign(groups: Any, shapes: Shapes) -> tuple[tuple[str, Algorithm], ...]:
    names = [name for name, _ in shapes]
    chosen: dict[str, Algorithm] = {}
    for patterns, algorithm in groups:
        if patterns is None:
            mine = [name for name, shape in shapes if _is_sparse_by_default(name, shape)]
            if not mine:
                raise ValueError(
                    "no parameter is sparse by default: two axes at least, and none of "
                    f"{list(_DENSE)} in the name; got {shorten(names)}"
                )
        else:
            for pattern in patterns:
                if not any(_matches(pattern, name) for name in names):
                    raise ValueError(
                        f"sparsity: pattern {_text(pattern)!r} matches none of the parameters "
                        f"{shorten(names)}"
                    )
            mine = [n for n in names if any(_matches(pattern, n) for pattern in patterns)]
        new = [name for name in mine if name not in chosen]
        if not new:
            raise ValueError(
                f"sparsity: earlier groups hold all parameters of "
                f"{'the default' if patterns is None else [_text(p) for p in patterns]}: "
                f"{shorten(mine)}"
            )
        chosen.update({name: algorithm for name in new})
    return tuple((name, chosen[name]) for name in names if name in chosen)


def _is_sparse_by_default(name: str, shape: Sequence[int]) -> bool:
    return len(shape) > 1 and not any(word in name.lower() for word in _DENSE)


def _matches(pattern: Pattern, name: str) -> bool:
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(name, pattern)
    return pattern.search(name) is not None


def _text(pattern: Pattern) -> str:
    return pattern if isinstance(pattern, str) else pattern.pattern


def shorten(names: Sequence[str], most: int = 8) -> str:
    """The first few names of a list."""
    return f"{list(names[:most])}{' ...' if len(names) > most else ''}"
