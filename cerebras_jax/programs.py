"""How long compiled programs live."""

import collections
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Programs(Generic[K, V]):
    """Programs by key: each lives as long as one of its owners, and the latest ones anyway.

    Args:
      make: makes the program for a key.
      of_owner: how many programs an owner keeps: more are made again when they are needed.
      latest: how many are kept without an owner, for the next one of the same kind.
    """

    def __init__(self, make: Callable[[K], V], of_owner: int = 32, latest: int = 16):
        self._make, self._of_owner = make, of_owner
        self._all: weakref.WeakValueDictionary[K, V] = weakref.WeakValueDictionary()
        self._latest: collections.deque[V] = collections.deque(maxlen=latest)
        self._owned: weakref.WeakKeyDictionary[Any, dict[K, V]] = weakref.WeakKeyDictionary()

    def get(self, key: K, owners: Sequence[Any]) -> V:
        """The program for this key; it is made if there is none."""
        program = self._all.get(key)
        if program is None:
            program = self._all[key] = self._make(key)
            self._latest.append(program)
        for owner in owners:
            mine = self._owned.setdefault(owner, {})
            mine.pop(key, None)
            mine[key] = program  # the latest one comes last
            if len(mine) > self._of_owner:
                del mine[next(iter(mine))]
        return program
