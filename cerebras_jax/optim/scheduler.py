"""The stateful shell around a schedule: a counter, and where to write the value."""

from __future__ import annotations

import copy
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from cerebras_jax.checks import check, is_number, is_traced
from cerebras_jax.engine.placement import beside
from cerebras_jax.formats.state_dict import plain_value, with_functions
from cerebras_jax.optim.numbers import LEARNING_RATES, as_argument
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.stateful import OUTSIDE, Fill, Memento, Parts, Stateful, freeze, locked

P = ParamSpec("P")


class Scheduler(Stateful, ABC):
    """Writes a schedule's value into one key of an optimizer's parameter groups.

    Making one sets the value of step 0; ``step()`` after every ``optimizer.step()`` sets the
    next. The optimizer's own value is never read.

    A subclass needs only `_get_closed_form_lr`, a function of ``self.last_epoch`` that may be
    traced:

    >>> import jax.numpy as jnp
    >>> from cerebras_jax import optim
    >>> class HalvingLR(optim.lr_scheduler.LRScheduler):
    ...     def __init__(self, optimizer, initial_learning_rate):
    ...         self.initial_learning_rate = initial_learning_rate
    ...         super().__init__(optimizer)
    ...     def _get_closed_form_lr(self):
    ...         return self.initial_learning_rate * 0.5**self.last_epoch
    >>> sched = HalvingLR(optim.SGD(jnp.ones(3), lr=1.0), initial_learning_rate=0.8)
    >>> sched.step()
    >>> sched.get_last_lr()
    [0.4]

    Args:
      optimizer: whose groups to write to.
      total_iters: how long the schedule lasts; informational.
      last_epoch: the step before the first one.
      param_group_tags: write only to groups whose ``"tags"`` (or ``"tag"``) have one of these;
        None stands for groups without tags. By default all groups.

    Raises:
      TypeError: if ``optimizer`` is not an `Optimizer`.
      ValueError: if no group has one of the tags, or another scheduler in use writes the same
        key of the same group.
    """

    key: str
    keys: ClassVar[tuple[str, ...]] = ()  # other names of it, for optimizers that use them
    transient: ClassVar[tuple[str, ...]] = (*Stateful.transient, "_note")
    special: ClassVar[frozenset[str]] = frozenset({"optimizer", "last_epoch", "_last_lr"})

    optimizer: Optimizer
    last_epoch: Any

    def __init__(
        self,
        optimizer: Optimizer,
        total_iters: int | None = None,
        last_epoch: int = -1,
        param_group_tags: Sequence[str | None] | None = None,
    ):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be an Optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        if total_iters is not None or not hasattr(self, "total_iters"):
            self.total_iters = total_iters
        self.param_group_tags = as_tags(param_group_tags)
        self._check_tags()
        self.key = next((k for k in (self.key, *self.keys) if k in self.groups()[0]), self.key)
        if self.key not in self.groups()[0]:
            raise ValueError(f"{type(optimizer).__name__} has no {self.key!r} to schedule")
        for i, group in enumerate(optimizer.param_groups):
            if any(group is mine for mine in self.groups()):
                optimizer.schedule_value(i, self.key)
        self.last_epoch = last_epoch
        self._last_lr: list[Any] = []
        for i, other in self._claimed():
            warnings.warn(
                f"param_groups[{i}][{self.key!r}] is written by {other!r}; the new scheduler takes "
                "its place when nothing refers to the old one any more",
                stacklevel=3,
            )
        self._note = self._what_is_overwritten()
        self._advance()

    # --- the value ---------------------------------------------------------------------------

    @abstractmethod
    def _get_closed_form_lr(self) -> Any:
        """The value at ``self.last_epoch``: a number."""

    @property
    def schedule(self) -> Callable[[Any], Any]:
        """The pure schedule that this applies: a function of the step."""
        return _ClosedForm(self)

    def get_lr(self) -> list[Any]:
        """The value for each group at ``last_epoch``."""
        value = self._get_closed_form_lr()
        return [value for _ in self.groups()]

    def get_last_lr(self) -> list[Any]:
        """The values last written, one for each group."""
        return list(self._last_lr)

    # --- stepping ----------------------------------------------------------------------------

    def step(self) -> None:
        """Advances by one step and writes the new value; call it after ``optimizer.step()``.

        After a step that the optimizer did not take (``skip_nonfinite``, ``skip_spikes``, a
        scaler) it stays where it is; outside of `trace` that is waited for.
        """
        if self.optimizer.is_traced() and not is_traced(self.last_epoch):
            raise RuntimeError(OUTSIDE.format(name="a scheduler"))
        with locked([self, self.optimizer]):
            self._check_unclaimed()
            self._claim()
            self.optimizer.note_schedule()
            if note := vars(self).pop("_note", None):
                warnings.warn(note, stacklevel=2)
            took = self.optimizer.took_step
            if is_traced(took):
                epoch, values = self.last_epoch, [group[self.key] for group in self.groups()]
                self._advance()
                self._hold(~took, epoch, values)
            elif took:
                self._advance()

    def _hold(self, held: Any, epoch: Any, values: Sequence[Any]) -> None:
        """Takes back an advance, where ``held``."""
        self.last_epoch = jnp.where(held, epoch, self.last_epoch)
        for group, old in zip(self.groups(), values, strict=True):
            group[self.key] = jnp.where(held, old, group[self.key])
        self.update_last_lr()

    def _advance(self) -> None:
        self.increment_last_epoch()
        self.update_groups(self.get_lr())
        self.update_last_lr()

    def increment_last_epoch(self) -> None:
        """Adds 1 to ``last_epoch``; a device value stays on the device, unread."""
        self.last_epoch = self.last_epoch + 1

    def update_groups(self, values: Sequence[Any]) -> None:
        """Writes one value into each group."""
        for group, value in zip(self.groups(), values, strict=True):
            group[self.key] = value

    def update_last_lr(self) -> None:
        """Remembers what the groups hold now."""
        self._last_lr = [group[self.key] for group in self.groups()]

    # --- groups ------------------------------------------------------------------------------

    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups that this scheduler writes to."""
        tags = self.param_group_tags
        return [g for g in self.optimizer.param_groups if tags is None or set(tags) & group_tags(g)]

    def _check_tags(self) -> None:
        if not self.groups():
            tags = {str(t) for g in self.optimizer.param_groups for t in group_tags(g)}
            raise ValueError(
                f"param_group_tags {list(self.param_group_tags or ())} match no parameter group; "
                f"the groups' tags are {sorted(tags)}"
            )

    def _claimed(self) -> Iterator[tuple[int, Any]]:
        """Groups that another scheduler writes to, and that one."""
        claims, mine = claims_of(self.optimizer), self.groups()
        for i, group in enumerate(self.optimizer.param_groups):
            other = claims.get((i, self.key), lambda: None)()
            if other is not None and other is not self and any(g is group for g in mine):
                yield i, other

    def _check_unclaimed(self) -> None:
        for i, other in self._claimed():
            raise ValueError(
                f"param_groups[{i}][{self.key!r}] is already written by {other!r}; combine "
                "schedulers with SequentialLR or ChainedScheduler"
            )

    def _what_is_overwritten(self) -> str | None:
        """What to say at the first step: the groups had values of their own."""
        groups = self.groups()
        values = [group[self.key] for group in groups]
        plain = [x for x in values if not callable(x) and not is_traced(x)]
        factors = [i for i, g in enumerate(groups) if g.get("adjust_learning_rate", 1.0) != 1.0]
        if factors and self.key in LEARNING_RATES:
            return (
                f"adjust_learning_rate of the parameter groups {factors} is not used by "
                f"{type(self).__name__}; wrap it in ScalePerParamLR"
            )
        if len(set(map(float, plain))) > 1:
            return (
                f"{type(self).__name__} writes one {self.key} into all groups, which had "
                f"{[plain_value(x) for x in values]}; param_group_tags choose groups, and "
                "ScalePerParamLR with adjust_learning_rate in the groups keeps their ratios"
            )
        return None

    def _claim(self) -> None:
        mine = self.groups()
        for i, group in enumerate(self.optimizer.param_groups):
            if any(g is group for g in mine):
                claims_of(self.optimizer)[i, self.key] = weakref.ref(self)

    # --- state_dict --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """``last_epoch`` and the constructor's values."""
        hidden = ("optimizer", "_last_lr", "key")
        state = {k: plain_value(v) for k, v in self._attributes().items() if k not in hidden}
        return {**state, "_last_lr": [plain_value(v) for v in self._last_lr]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, and writes the value into the groups.

        All or, on an error, nothing. A function, which is stored as None, stays the constructor's.

        Raises:
          TypeError, ValueError: if the dict lacks a key, or has one that this scheduler has not,
            or a value of another kind; if its tags match no group.
        """
        with locked([*self._family(), self.optimizer]):
            before = [Memento(scheduler) for scheduler in self._family()]
            try:
                self._load(state_dict)
                self._check_tags()
                values = self._loaded_values(state_dict.get("_last_lr"))
            except Exception as error:
                for memento in before:
                    memento.undo()
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"state dict of {type(self).__name__}: {error}") from error
            self.update_groups(values)
            self.update_last_lr()

    def _loaded_values(self, saved: Any) -> list[Any]:
        """The values that were saved, exactly, if there is one for each group."""
        computed = self.get_lr()
        if saved is None:
            return computed
        if not isinstance(saved, list | tuple) or not all(is_number(x) for x in saved):
            raise TypeError(f"_last_lr must be a list of numbers, got {saved!r}")
        for i, value in enumerate(saved):
            check(f"_last_lr[{i}]", value, "finite")
        return list(saved) if len(saved) == len(computed) else computed

    def _family(self) -> list[Scheduler]:
        """All that `load_state_dict` changes: this scheduler and those that it is made of."""
        return [self]

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        self._check_layout(state_dict)
        for key, value in state_dict.items():
            if key != "_last_lr":
                setattr(self, key, with_functions(copy.copy(value), getattr(self, key)))
        self.param_group_tags = as_tags(state_dict["param_group_tags"])

    def _check_layout(self, state_dict: Any) -> None:
        """Refuses what has not the keys of `state_dict`, or no step under ``"last_epoch"``."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"it must be a dict, got {state_dict!r}")
        expected, given = set(self.state_dict()), set(state_dict)
        missing, extra = sorted(expected - given - {"_last_lr"}), sorted(map(str, given - expected))
        if missing or extra:
            raise ValueError(f"missing {missing}, unexpected {extra}")
        _check_whole("last_epoch", state_dict["last_epoch"], -1)
        if state_dict["total_iters"] is not None:
            _check_whole("total_iters", state_dict["total_iters"], 0)

    # --- the parts that change, for jit and trace ------------------------------------------------

    def parts(self) -> Parts:
        """See `Stateful`: the step and the values are numbers."""
        arrays: list[Any] = []
        refs: list[Any] = [self.optimizer]
        static = (type(self), len(self._last_lr), freeze(self._rest(), arrays, refs))
        return Parts(arrays, [self.last_epoch, *self._last_lr], static, refs)

    def restore(self, arrays: list[Any], numbers: list[Any], refs: list[Any] | None = None) -> None:
        """See `Stateful`."""
        self.last_epoch, *self._last_lr = numbers
        remaining = None if refs is None else iter(refs)
        if remaining is not None:
            self.optimizer = next(remaining)
        self._refill(Fill(iter(arrays), remaining))

    def as_arguments(self, numbers: list[Any], home: Sharding | None = None) -> list[Any]:
        """See `Stateful`."""
        epoch, *values = numbers
        epoch = epoch if isinstance(epoch, jax.Array) else np.asarray(epoch, np.int32)
        if home is not None and not is_traced(epoch):
            epoch = beside(jnp.asarray(epoch), home)
        return [epoch, *(as_argument(x, home) for x in values)]

    def __repr__(self) -> str:
        epoch = plain_value(self.last_epoch)
        return f"{type(self).__name__}(last_epoch={epoch}, {self.key}={self._shown()})"

    def _shown(self) -> Any:
        values = [plain_value(v) for v in self._last_lr]
        return values[0] if len(values) == 1 else values


class _ClosedForm:
    """A scheduler subclass's closed form as a pure function of the step."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler

    def __call__(self, step: Any) -> Any:
        twin = copy.copy(self.scheduler)
        twin.last_epoch = step
        return twin._get_closed_form_lr()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ClosedForm) and self.scheduler is other.scheduler

    def __hash__(self) -> int:
        return id(self.scheduler)

    def __repr__(self) -> str:
        return f"{type(self.scheduler).__name__}.schedule"


# --- helpers -------------------------------------------------------------------------------------


def group_tags(group: Mapping[str, Any]) -> set[str | None]:
    """The tags of a parameter group; {None} if it has none."""
    tags = group.get("tags", group.get("tag"))
    if tags is None:
        return {None}
    return {tags} if isinstance(tags, str) else set(tags) or {None}


def as_tags(tags: Any) -> tuple[str | None, ...] | None:
    """The tags that a scheduler was given; None stays, and stands for all groups."""
    if tags is None:
        return None
    tags = (tags,) if isinstance(tags, str) else tags
    if not isinstance(tags, list | tuple) or not all(isinstance(t, str | None) for t in tags):
        raise TypeError(f"param_group_tags must be a list of tags, got {tags!r}")
    return tuple(tags)


def _check_whole(name: str, value: Any, least: int) -> None:
    if not is_number(value) or np.shape(value) != () or float(value) % 1 != 0:
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


_CLAIMS: weakref.WeakKeyDictionary[Optimizer, dict] = weakref.WeakKeyDictionary()


def claims_of(optimizer: Optimizer) -> dict[tuple[int, str], Any]:
    """Which scheduler is in use for which group and key of an optimizer."""
    return _CLAIMS.setdefault(optimizer, {})
