"""Who holds a buffer: what decides whether a step may give it away.

A step writes new values over old ones, which halves its time and its memory. A buffer that was
given away is dead, so before a step every array that somebody else may still read is copied.
"""

import itertools
import sys
import sysconfig
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from cerebras_jax.checks import any_traced, is_traced

Donate = bool | Literal["auto"]
"""Whether a step gives the old buffers away: ``"auto"``, those that nobody else holds; True, all,
also under somebody who holds them; False, none."""


def check_donate(donate: Any) -> None:
    """Refuses anything but the values of `Donate`."""
    if not (donate == "auto" or isinstance(donate, bool)):
        raise ValueError(f'donate must be "auto", True or False, got {donate!r}')


def _counts(values: Sequence[Any]) -> list[int]:
    return list(map(sys.getrefcount, values))


(_IN_A_LIST,) = _counts([object()])  # of what nothing but one list holds


def _counts_can_be_trusted() -> bool:
    """Whether this interpreter's reference counts tell who holds an object, on known cases."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return False
    alone, shared = [object(), object()], [object()]
    again = list(shared)
    in_dict = {"x": object()}
    values = [*in_dict.values()]
    return (
        _counts(alone) == [_IN_A_LIST] * 2
        and _counts(shared) == [_IN_A_LIST + 1] == _counts(again)
        and _counts(values) == [_IN_A_LIST + 1]
    )


COUNTS_ARE_TRUSTED = _counts_can_be_trusted()
"""Found out at import; if False, ``donate="auto"`` copies before every step."""


class Donor:
    """Makes ready what a step gives away, and counts what it had to copy.

    Attributes:
      donate: see `Donate`.
      copied: how many arrays were copied because somebody else held them.
    """

    def __init__(self, donate: Donate = "auto"):
        check_donate(donate)
        self.donate: Donate = donate
        self.copied = 0
        self._live = -1
        self._has_aliases = False

    def ready(self, *lists: list[Any], owners: Sequence[int]) -> list[list[Any]]:
        """The arrays of each list, with copies in place of those that somebody else holds too.

        Args:
          *lists: arrays, or tracers, which pass.
          owners: for each list, how many containers are known to hold each of its arrays, beside
            the list itself.
        """
        if self.donate is True or any_traced(x for leaves in lists for x in leaves[:1]):
            return list(lists)
        if self.donate is False or not COUNTS_ARE_TRUSTED:
            return [[_copy(x) for x in leaves] for leaves in lists]
        aliased = self._aliased(lists)
        return [
            self._unshared(leaves, _IN_A_LIST + known, aliased)
            for leaves, known in zip(lists, owners, strict=True)
        ]

    def _unshared(self, leaves: list[Any], alone: int, aliased: set[int]) -> list[Any]:
        counts = _counts(leaves)
        if max(counts, default=0) <= alone and not aliased:
            return leaves
        held = [n > alone or _pointer(x) in aliased for x, n in zip(leaves, counts, strict=True)]
        self.copied += sum(held)
        return [_copy(x) if is_held else x for x, is_held in zip(leaves, held, strict=True)]

    def _aliased(self, lists: Sequence[list[Any]]) -> set[int]:
        """Buffers of ours that an array uses which does not hold ours.

        ``jax.device_put(x, device)`` and ``x.addressable_data(0)`` make such arrays. Looking at
        all live arrays costs time, so it is done when there are more of them than before.
        """
        live = jax.live_arrays()
        if len(live) <= self._live and not self._has_aliases:
            return set()
        leaves = list(itertools.chain.from_iterable(lists))
        mine = {id(x) for x in leaves}
        pointers = {_pointer(x) for x in leaves} - {None}
        theirs = (_pointer(x) for x in live if id(x) not in mine)
        found = {p for p in theirs if p is not None and p in pointers}
        self._live, self._has_aliases = len(live), bool(found)
        return found


def _pointer(x: Any) -> int | None:
    """Where an array lies, if it lies in one place."""
    if not isinstance(x, jax.Array) or is_traced(x) or len(x.sharding.device_set) > 1:
        return None
    return None if x.is_deleted() or not x.size else x.unsafe_buffer_pointer()


def _copy(x: Any) -> Any:
    return x if is_traced(x) else jnp.copy(x)
