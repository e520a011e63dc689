"""Who holds a buffer: what decides whether a step may give it away.

A step writes new values over old ones, which halves its time and its memory. A buffer that was
given away is dead, so before a step every array that somebody else may still read is copied.
"""

import itertools
import sys
import sysconfig
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

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
        self._known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def meet(self, owners: Sequence[Any]) -> None:
        """Says whose arrays come next: those of a new owner may be somebody else's, too."""
        for owner in owners:
            if self._known.get(id(owner)) is not owner:
                self._known[id(owner)] = owner
                self._live = -1

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
        counts = map(sys.getrefcount, leaves)
        if not aliased and max(counts, default=0) <= alone:
            return leaves
        counts = _counts(leaves)
        held = [n > alone or id(x) in aliased for x, n in zip(leaves, counts, strict=True)]
        self.copied += sum(held)
        return [_copy(x) if is_held else x for x, is_held in zip(leaves, held, strict=True)]

    def _aliased(self, lists: Sequence[list[Any]]) -> set[int]:
        """Ids of those of ours whose buffers an array uses that is not ours.

        ``jax.device_put(x, device)`` and ``x.addressable_data(0)`` make such arrays, and so does
        replicating x on several devices. Looking at all live arrays costs time, so it is done when
        there are more of them than before.
        """
        live = jax.live_arrays()
        if len(live) <= self._live and not self._has_aliases:
            return set()
        leaves = list(itertools.chain.from_iterable(lists))
        if _are_apart(leaves, live):
            self._live, self._has_aliases = len(live), False
            return set()
        single = {_kind(x) for x in live if len(x.sharding.device_set) == 1} - {None}
        views = _views([x for x in leaves if _kind(x) in single])
        live = [x for x in live if id(x) not in views]  # they go with what they are views of
        mine = {id(x) for x in leaves}
        kinds = {_kind(x) for x in leaves} - {None}
        theirs = [x for x in live if id(x) not in mine and _kind(x) in kinds]
        alone = {d for x in theirs if len(ds := x.sharding.device_set) == 1 for d in ds}
        buffers = {buffer for x in theirs for buffer in _buffers(x, alone)}
        found = {id(x) for x in leaves if theirs and not buffers.isdisjoint(_buffers(x, alone))}
        self._live, self._has_aliases = len(live), bool(found)
        return found


def _are_apart(leaves: Sequence[Any], live: Sequence[Any]) -> bool:
    """Whether it is plain that no other array has a buffer of ours: a third of the time."""
    if any(type(x.sharding) is not SingleDeviceSharding for x in live):
        return False
    mine = {id(x) for x in leaves}
    theirs = {x.unsafe_buffer_pointer() for x in live if id(x) not in mine and x.size}
    return theirs.isdisjoint(x.unsafe_buffer_pointer() for x in leaves if _kind(x) is not None)


def _kind(x: Any) -> Any:
    """What arrays on one buffer have in common; None if x has no buffer."""
    if not isinstance(x, jax.Array) or is_traced(x) or x.is_deleted() or not x.size:
        return None
    return x.sharding.shard_shape(x.shape), x.dtype


def _views(arrays: Sequence[Any]) -> set[int]:
    """Ids of the parts that arrays keep since they were read, and that nobody else holds."""
    parts = [part for x in arrays for part in _parts(x)]
    counts = zip(parts, _counts(parts), strict=True)
    # Its array holds it, and the list of all live arrays, unless it is made just now.
    return {id(x) for x, count in counts if count <= _IN_A_LIST + 2}


def _parts(x: Any) -> list[Any]:
    """What reading an array of several devices makes: its part on each, or one for all."""
    if len(x.sharding.device_set) == 1:
        return []
    count = 1 if x.is_fully_replicated else len(x.sharding.addressable_devices)
    return [x.addressable_data(i) for i in range(count)]


def _buffers(x: Any, devices: set[Any]) -> list[tuple[Any, int]]:
    """Where an array lies: of several devices on the first, and on those that are given."""
    if _kind(x) is None:
        return []
    if len(x.sharding.device_set) == 1:
        return [(*x.sharding.device_set, x.unsafe_buffer_pointer())]
    local = x.sharding.addressable_devices_indices_map(x.shape)
    return [
        (device, x.addressable_data(i).unsafe_buffer_pointer())
        for i, device in enumerate(local)
        if i == 0 or device in devices
    ]


def _copy(x: Any) -> Any:
    return x if is_traced(x) else jnp.copy(x)
