"""The stateful shell around a schedule: a counter, and where to write the value."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, ParamSpec, cast, overload

import jax
import numpy as np

from cerebras_jax import schedules
from cerebras_jax.checks import check, is_number, is_traced
from cerebras_jax.formats.state_dict import plain_value, with_functions
from cerebras_jax.optim.numbers import as_argument
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.stateful import OUTSIDE, Fill, Memento, Parts, Stateful, freeze

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
        self.param_group_tags = _as_tags(param_group_tags)
        self._check_tags()
        self.key = next((k for k in (self.key, *self.keys) if k in self.groups()[0]), self.key)
        if self.key not in self.groups()[0]:
            raise ValueError(f"{type(optimizer).__name__} has no {self.key!r} to schedule")
        for i, group in enumerate(optimizer.param_groups):
            if any(group is mine for mine in self.groups()):
                optimizer.schedule_value(i, self.key)
        self.last_epoch = last_epoch
        self._last_lr: list[Any] = []
        self._check_unclaimed()
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
        """Advances by one step and writes the new value; call it after ``optimizer.step()``."""
        if self.optimizer.is_traced() and not is_traced(self.last_epoch):
            raise RuntimeError(OUTSIDE.format(name="a scheduler"))
        with self.lock, self.optimizer.lock:
            self._check_unclaimed()
            self._claim()
            self.optimizer.note_schedule()
            self._advance()

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

    def _check_unclaimed(self) -> None:
        claims = claims_of(self.optimizer)
        for i, group in enumerate(self.optimizer.param_groups):
            other = claims.get((i, self.key), lambda: None)()
            if other is not None and other is not self and any(g is group for g in self.groups()):
                raise ValueError(
                    f"param_groups[{i}][{self.key!r}] is already written by {other!r}; combine "
                    "schedulers with SequentialLR or ChainedScheduler"
                )

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
        with self.lock, self.optimizer.lock:
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
        self.param_group_tags = _as_tags(state_dict["param_group_tags"])

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
        fill = Fill(iter(arrays), remaining)
        for name, value in self._rest().items():
            setattr(self, name, fill(value))

    def as_arguments(self, numbers: list[Any]) -> list[Any]:
        """See `Stateful`."""
        epoch, *values = numbers
        epoch = epoch if isinstance(epoch, jax.Array) else np.asarray(epoch, np.int32)
        return [epoch, *map(as_argument, values)]

    def _rest(self) -> dict[str, Any]:
        return {k: v for k, v in self._attributes().items() if k not in self.special}

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


class ScheduleScheduler(Scheduler, Generic[P]):
    """A scheduler that applies a pure schedule, with that schedule's signature."""

    schedule_type: ClassVar[Any]
    renamed: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "schedule_type" in dir(cls) and "__init__" not in vars(cls):
            cls.__signature__ = _shell_signature(cls)  # pyright: ignore
            if not vars(cls).get("__doc__"):
                cls.__doc__ = (
                    f"Writes the schedule `{cls.schedule_type.__name__}` into ``{cls.key!r}``; see "
                    f"`Scheduler`.\n\n{_without_examples(cls.schedule_type)}"
                )

    @overload
    def __init__(self, optimizer: Optimizer, *args: P.args, **kwargs: P.kwargs) -> None: ...
    @overload
    def __init__(
        self,
        optimizer: Optimizer,
        *args: Any,
        param_group_tags: Sequence[str | None] | None,
        **kwargs: Any,
    ) -> None: ...
    def __init__(
        self,
        optimizer: Optimizer,
        *args: Any,
        param_group_tags: Sequence[str | None] | None = None,
        **kwargs: Any,
    ):
        shell = _shell_signature(type(self))
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be an Optimizer, got {type(optimizer).__name__}")
        try:
            bound = shell.bind(optimizer, *args, param_group_tags=param_group_tags, **kwargs)
        except TypeError as error:
            names = [n for n in shell.parameters if n not in ("optimizer", "param_group_tags")]
            raise TypeError(f"{type(self).__name__}: {error}; its arguments are {names}") from None
        values = {
            self._original(k): v
            for k, v in bound.arguments.items()
            if k not in ("optimizer", "param_group_tags")
        }
        self._schedule = self.make_schedule(values)
        super().__init__(
            optimizer,
            total_iters=getattr(self._schedule, "total_iters", None),
            param_group_tags=param_group_tags,
        )

    def _original(self, name: str) -> str:
        """The schedule's own name of an argument."""
        return next((old for old, new in self.renamed.items() if new == name), name)

    def make_schedule(self, values: dict[str, Any]) -> Any:
        """Hook: the schedule of the constructor's values."""
        return self.schedule_type(**values)

    @property
    def schedule(self) -> Callable[[Any], Any]:
        return self._schedule

    def _get_closed_form_lr(self) -> Any:
        return self.schedule(self.last_epoch)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._schedule, self._original(name))

    def _fields(self) -> dict[str, Any]:
        return {
            self.renamed.get(f.name, f.name): getattr(self._schedule, f.name)
            for f in dataclasses.fields(self._schedule)
        }

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        del state["_schedule"]
        return state | {k: plain_value(v) for k, v in self._fields().items()}

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        self._check_layout(state_dict)
        values = {
            self._original(k): with_functions(state_dict[k], v) for k, v in self._fields().items()
        }
        self._schedule = dataclasses.replace(self._schedule, **values)
        self.last_epoch = state_dict["last_epoch"]
        self.total_iters = getattr(self._schedule, "total_iters", None)
        self.param_group_tags = _as_tags(state_dict["param_group_tags"])


class SchedulerComposition(Scheduler):
    """A scheduler made of schedulers, which it takes over: only it is stepped."""

    special = Scheduler.special | {"_schedulers"}
    _schedulers: list[Scheduler]

    def _adopt(self, optimizer: Optimizer, children: Any) -> None:
        children = list(children)
        if not children:
            raise ValueError(f"{type(self).__name__} needs at least one scheduler, got none")
        for i, child in enumerate(children):
            if not isinstance(child, Scheduler):
                raise TypeError(f"schedulers[{i}] must be a scheduler, got {child!r}")
            if child.optimizer is not optimizer:
                raise ValueError(f"schedulers[{i}] belongs to another optimizer")
            if child.key != children[0].key:
                raise ValueError(
                    f"schedulers[{i}] writes {child.key!r}, schedulers[0] {children[0].key!r}"
                )
        self._schedulers = children

    def _child_epochs(self) -> list[int]:
        """The step that each child is at."""
        return [int(self.last_epoch)] * len(self._schedulers)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        children = []
        for child, epoch in zip(self._schedulers, self._child_epochs(), strict=True):
            twin = copy.copy(child)
            twin.last_epoch = epoch
            twin._last_lr = [plain_value(v) for v in twin.get_lr()]
            children.append(twin.state_dict())
        return {**state, "_schedulers": children}

    def _family(self) -> list[Scheduler]:
        return [self, *(x for child in self._schedulers for x in child._family())]

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        self._check_layout(state_dict)
        children = state_dict["_schedulers"]
        if not isinstance(children, list | tuple):
            raise TypeError(f"_schedulers must be a list of state dicts, got {children!r}")
        if len(children) != len(self._schedulers):
            raise ValueError(f"_schedulers must be {len(self._schedulers)}, got {len(children)}")
        for child, state in zip(self._schedulers, children, strict=True):
            child._load(state)
        super()._load({**state_dict, "_schedulers": self._schedulers})

    def parts(self) -> Parts:
        """See `Stateful`: of the schedulers only what they are counts, not where they are."""
        parts = super().parts()
        children = tuple(child.parts().static for child in self._schedulers)
        return parts._replace(static=(parts.static, children))

    def _get_closed_form_lr(self) -> Any:
        return self.schedule(self.last_epoch)


class SequentialScheduler(SchedulerComposition):
    """One scheduler after another: ``schedulers[j+1]`` takes over at ``milestones[j]``.

    Args:
      optimizer: the optimizer that all of them schedule.
      schedulers: the schedulers, each counting its own steps from 0; they may be compositions.
      milestones: increasing steps, one fewer than schedulers.
      last_epoch: the step before the first one.

    Raises:
      ValueError: if the lengths do not match, the milestones do not increase, or a scheduler
        belongs to another optimizer or writes another key.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: Sequence[Scheduler],
        milestones: Sequence[int],
        last_epoch: int = -1,
        param_group_tags: Sequence[str | None] | None = None,
    ):
        self._adopt(optimizer, schedulers)
        self._milestones = list(milestones)
        schedules.sequential([c.schedule for c in self._schedulers], self._milestones)  # checks
        super().__init__(optimizer, None, last_epoch, param_group_tags)

    @property
    def schedule(self) -> Callable[[Any], Any]:
        children = [child.schedule for child in self._schedulers]
        return schedules.sequential(children, self._milestones)

    def _child_epochs(self) -> list[int]:
        starts = [0, *self._milestones]
        ends = [*self._milestones, np.inf]
        now = int(self.last_epoch)
        return [
            int(max(min(now, end - 1) - start, 0)) for start, end in zip(starts, ends, strict=True)
        ]


class ChainScheduler(SchedulerComposition):
    """The first scheduler's value times the others', each relative to its own initial value.

    Args:
      schedulers: at least one; they may be compositions.

    Raises:
      ValueError: if a later scheduler starts at 0, or they belong to several optimizers.
    """

    def __init__(self, schedulers: Sequence[Scheduler]):
        schedulers = list(schedulers)
        first = schedulers[0] if schedulers else None
        self._adopt(getattr(first, "optimizer", cast(Any, None)), schedulers)
        schedules.chained([child.schedule for child in self._schedulers])  # checks
        super().__init__(
            self._schedulers[0].optimizer, param_group_tags=self._schedulers[0].param_group_tags
        )

    @property
    def schedule(self) -> Callable[[Any], Any]:
        return schedules.chained([child.schedule for child in self._schedulers])


# --- helpers -------------------------------------------------------------------------------------


def group_tags(group: Mapping[str, Any]) -> set[str | None]:
    """The tags of a parameter group; {None} if it has none."""
    tags = group.get("tags", group.get("tag"))
    if tags is None:
        return {None}
    return {tags} if isinstance(tags, str) else set(tags) or {None}


def _without_examples(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").split("\n\n>>>")[0]


def _as_tags(tags: Any) -> tuple[str | None, ...] | None:
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


def _shell_signature(cls: type[ScheduleScheduler]) -> inspect.Signature:
    parameter = inspect.Parameter
    own = [
        p.replace(name=cls.renamed.get(p.name, p.name))
        for p in inspect.signature(cls.schedule_type).parameters.values()
    ]
    return inspect.Signature(
        [
            parameter("optimizer", parameter.POSITIONAL_OR_KEYWORD, annotation=Optimizer),
            *own,
            parameter("param_group_tags", parameter.KEYWORD_ONLY, default=None),
        ]
    )


def scheduler_of(
    base: type[Scheduler], schedule_type: Callable[P, Any]
) -> type[ScheduleScheduler[P]]:
    """The base class of the scheduler that applies ``schedule_type`` to ``base.key``."""
    name = f"{base.__name__}Of{schedule_type.__name__}"
    attributes = {"schedule_type": schedule_type, "renamed": getattr(base, "renamed", {})}
    return cast("type[ScheduleScheduler[P]]", type(name, (ScheduleScheduler, base), attributes))
