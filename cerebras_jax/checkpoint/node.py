"""What a checkpoint is made of: things that are saved and restored as a whole."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from cerebras_jax.checkpoint.leaves import Leaves, Match, Options, Report, Target, record

About = dict[str, Any]
Arrays = dict[str, Any]


class Node(ABC):
    """One thing of a checkpoint: what is saved and restored as a whole.

    Restoring takes four calls: `match` says which arrays are needed, `load` takes them and checks
    all that can be checked, `commit` changes the object, `undo` brings it back.
    """

    kind = "leaves"

    def __init__(self, obj: Any, where: str):
        self.obj, self.where = obj, where

    @abstractmethod
    def record(self) -> tuple[About, Arrays]:
        """What to write, and arrays by path."""

    @abstractmethod
    def match(
        self, about: About, stored: Mapping[str, Target], options: Options, report: Report
    ) -> dict[str, Target]:
        """The arrays that are needed; problems go into the report."""

    @abstractmethod
    def load(self, arrays: Mapping[str, Any]) -> None:
        """Takes the arrays; the object stays as it is."""

    @abstractmethod
    def commit(self) -> Any:
        """Changes the object; returns it, or a new one in its place."""

    def undo(self) -> None:
        """Brings the object back to what it was before `commit`."""


# --- by name --------------------------------------------------------------------------------------


class LeavesNode(Node):
    """What is made of named arrays; any of these can be restored into any other."""

    def __init__(self, obj: Any, where: str):
        super().__init__(obj, where)
        self._match: Match | None = None
        self._new: Leaves | None = None
        self._old: Leaves | None = None

    @abstractmethod
    def leaves(self) -> Leaves:
        """The object by name."""

    @abstractmethod
    def put(self, leaves: Leaves) -> Any:
        """Puts these into the object."""

    def about(self) -> About:
        """What else to write."""
        return {}

    def record(self) -> tuple[About, Arrays]:
        return record(self.leaves(), self.kind, **self.about())

    def match(
        self, about: About, stored: Mapping[str, Target], options: Options, report: Report
    ) -> dict[str, Target]:
        self._old = self.leaves()
        self._match = Match(self._old, about, stored, options, report, self.where)
        return self._match.wanted

    def load(self, arrays: Mapping[str, Any]) -> None:
        assert self._match is not None  # `match` comes first
        self._new = self._match.fill(arrays)

    def commit(self) -> Any:
        assert self._new is not None
        return self.put(self._new)

    def undo(self) -> None:
        assert self._old is not None
        self.put(self._old)
