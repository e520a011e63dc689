"""From a configuration value to a schedule, and from there to either form."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cerebras_jax import schedules
from cerebras_jax.checks import is_number
from cerebras_jax.messages import shortened, shown
from cerebras_jax.optim.detached import closed_form, needs_detaching
from cerebras_jax.optim.lr_scheduler import LRScheduler, ScalePerParamLR
from cerebras_jax.optim.names import (
    arguments_of,
    check_plain,
    find_class,
    is_name_of,
    missing_arguments,
    modern,
    to_number,
)
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.optim.scheduler import Scheduler, group_tags
from cerebras_jax.optim.scheduler_compositions import (
    ChainScheduler,
    SchedulerComposition,
    SequentialScheduler,
)
from cerebras_jax.optim.weight_decay_scheduler import WeightDecayScheduler
from cerebras_jax.types import Schedule

_LEGACY = {
    "steps": "total_iters",
    "decay_steps": "total_iters",
    "boundaries": "milestones",
    "values": "learning_rates",
}
_SEQUENTIAL = {"sequential", "sequentiallr"}
_CHAINED = {"chained", "chainedlr", "chainedscheduler"}
_RULE = "must be a dict with the key 'scheduler', or {name: arguments}"


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """What a configuration says about one scheduled number: all that either form needs.

    Attributes:
      scheduler: the class of the class form, e.g. `lr_scheduler.CosineDecayLR`.
      arguments: its constructor's, without the optimizer and without ``children``.
      children: what SequentialLR, ChainedScheduler and ScalePerParamLR are made of.
      where: the place in the configuration, for errors.
    """

    scheduler: type[Scheduler]
    arguments: Mapping[str, Any]
    children: tuple[ScheduleConfig, ...] = ()
    where: str = "learning_rate"

    @property
    def key(self) -> str:
        """The number that it drives: ``"lr"`` or ``"weight_decay"``."""
        return self.scheduler.key

    @property
    def is_scaled(self) -> bool:
        """Whether each group's ``adjust_learning_rate`` multiplies the schedule."""
        return issubclass(self.scheduler, ScalePerParamLR)

    @property
    def param_group_tags(self) -> tuple[str | None, ...] | None:
        """The tags of the groups to drive; None: all groups."""
        if issubclass(self.scheduler, ScalePerParamLR | ChainScheduler):
            return self.children[0].param_group_tags
        return self.arguments.get("param_group_tags")

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The pure schedule, not scaled.

        Raises:
          TypeError: if a user's own scheduler class needs its optimizer for the value.
          ValueError: if an argument is out of range.
        """
        with _naming(self):
            return _schedule_of(self)

    def attach(self, optimizer: Optimizer) -> Any:
        """The class form: a scheduler of this optimizer.

        Raises:
          ValueError: if no group has one of the tags, or a value is out of range.
        """
        children = [child.attach(optimizer) for child in self.children]
        with _naming(self):
            if issubclass(self.scheduler, ChainScheduler):
                return self.scheduler(children)
            if issubclass(self.scheduler, ScalePerParamLR):
                return self.scheduler(optimizer, *children)
            if children:
                return self.scheduler(optimizer, children, **self.arguments)  # pyright: ignore
            return self.scheduler(optimizer, **self.arguments)

    def scaled(self) -> ScheduleConfig:
        """The same, with each group's ``adjust_learning_rate`` as a factor.

        Raises:
          ValueError: for a chained scheduler.
        """
        if self.is_scaled or self.key != "lr":
            return self
        return _scale_per_param(ScalePerParamLR, self, self.where)

    def drives(self, group: Mapping[str, Any]) -> bool:
        """Whether it writes to this parameter group."""
        if self.key == "weight_decay" and group.get("no_weight_decay"):
            return False
        return self.param_group_tags is None or bool(set(self.param_group_tags) & group_tags(group))


@contextlib.contextmanager
def _naming(config: ScheduleConfig) -> Iterator[None]:
    """Puts the place and the class before the message of an error."""
    prefix = f"{config.where}: {config.scheduler.__name__}: "
    try:
        yield
    except (TypeError, ValueError, ArithmeticError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(shortened(f"{prefix}{error}")) from error


# --- reading --------------------------------------------------------------------------------------


def schedule_config(
    value: Any, base: type[Scheduler] = LRScheduler, where: str = "learning_rate"
) -> ScheduleConfig | None:
    """Reads a configuration value; see `configure_lr_scheduler` for its forms.

    Args:
      value: a number, a dict, a list of dicts, or None.
      base: `LRScheduler` or `WeightDecayScheduler`.
      where: the place of the value, for errors.

    Raises:
      TypeError, ValueError: names the entry, the rule and the value.

    >>> config = schedule_config({"CosineDecayLR": {
    ...     "initial_learning_rate": "1e-1", "end_learning_rate": 0, "total_iters": 100}})
    >>> config.scheduler.__name__, config.schedule(0)
    ('CosineDecayLR', 0.1)
    """
    check_plain(where, value)
    if value is None:
        return None
    if isinstance(value, str) or is_number(value):
        cls = find_class("Constant", base)
        name = "learning_rate" if base is LRScheduler else "val"
        return _checked(ScheduleConfig(cls, {name: to_number(where, value)}, (), where))
    if isinstance(value, Mapping):
        return _entry(value, base, where)
    if isinstance(value, list | tuple) and value:
        children = _children(value, base, where)
        if len(children) == 1:
            return children[0]
        if _is_chain(value, where):
            return _chained(find_class("Chained", base), children, None, where)
        cls = find_class("Sequential", base)
        return _sequential(cls, value, children, {}, where)
    raise ValueError(
        f"{where} must be a number, a dict with 'scheduler', or a list of them, got {shown(value)}"
    )


def kind_of(value: Any) -> type[Scheduler]:
    """Which schedulers a configuration value speaks of: those of the weight decay, or of the lr."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    name = value.get("scheduler", next(iter(value), None)) if isinstance(value, Mapping) else None
    is_decay = isinstance(name, str) and (
        name.upper().endswith("WD")
        or (is_name_of(name, WeightDecayScheduler) and not is_name_of(name, LRScheduler))
    )
    return WeightDecayScheduler if is_decay else LRScheduler


def _entry(entry: Any, base: type[Scheduler], where: str) -> ScheduleConfig:
    """One scheduler in either style, with all that it is made of."""
    name, values = _named(entry, where)
    cls = find_class(name, base, where)
    if issubclass(cls, ScalePerParamLR):
        inner = f"{where}.{name}.scheduler"
        if values.keys() - {"scheduler", "main_scheduler"}:
            raise ValueError(f"{where}.{name} takes one key, 'scheduler', got {shown([*values])}")
        return _scale_per_param(cls, _entry(values.get("scheduler"), base, inner), where)
    if issubclass(cls, SchedulerComposition):
        entries, inner = values.get("schedulers"), f"{where}.{name}.schedulers"
        if not isinstance(entries, list | tuple) or not entries:
            raise ValueError(f"{inner} must be a list of schedulers, got {shown(entries)}")
        children = _children(entries, base, inner)
        rest = {k: v for k, v in values.items() if k not in ("schedulers", "main_scheduler")}
        if issubclass(cls, ChainScheduler):
            tags = arguments_of(_Tags, rest, (), where).get("param_group_tags")
            return _chained(cls, children, tags, where)
        return _sequential(cls, entries, children, rest, where)
    if "schedulers" in values:
        raise ValueError(f"{where}: {cls.__name__} is not made of schedulers")
    values = modern(values, _LEGACY, cls.__name__)
    values.pop("main_scheduler", None)
    if not _takes(cls, "total_iters"):
        values.pop("total_iters", None)  # it only says how long the entry lasts
    arguments = arguments_of(cls, values, {"optimizer"}, where)
    missing = missing_arguments(cls, arguments, {"optimizer"})
    if missing:
        raise ValueError(f"{where}: {cls.__name__} needs {missing}, got {sorted(values)}")
    return _checked(ScheduleConfig(cls, arguments, (), where))


def _named(entry: Any, where: str) -> tuple[Any, dict[str, Any]]:
    """(scheduler name, arguments) of an entry in either style."""
    if isinstance(entry, Mapping):
        if "scheduler" in entry:
            return entry["scheduler"], {k: v for k, v in entry.items() if k != "scheduler"}
        if len(entry) == 1:
            name, values = next(iter(entry.items()))
            if isinstance(values, Mapping):
                return name, dict(values)
    raise ValueError(f"{where} {_RULE}, got {shown(entry)}")


def _children(entries: Sequence[Any], base: type[Scheduler], where: str) -> list[ScheduleConfig]:
    children = [_entry(entry, base, f"{where}[{i}]") for i, entry in enumerate(entries)]
    for child in children:
        if child.is_scaled:
            raise ValueError(f"{child.where}: ScalePerParamLR must be the outermost scheduler")
    return children


def _is_chain(entries: Sequence[Any], where: str) -> bool:
    """Whether an entry of a list asks for the product of the schedules."""
    mains = [entry.get("main_scheduler") for entry in entries]
    names = {str(main).lower() for main in mains if main is not None}
    unknown = names - _CHAINED - _SEQUENTIAL
    if unknown:
        raise ValueError(
            f"{where}: main_scheduler must be SequentialLR or ChainedLR, got {shown([*unknown])}"
        )
    return bool(names & _CHAINED)


class _Tags:
    """The signature of what a chain takes besides its schedulers."""

    def __init__(self, param_group_tags: Any = None):
        pass


def _sequential(
    cls: type[Scheduler],
    entries: Sequence[Any],
    children: Sequence[ScheduleConfig],
    values: Mapping[str, Any],
    where: str,
) -> ScheduleConfig:
    arguments = arguments_of(cls, values, {"optimizer", "schedulers"}, where)
    if arguments.pop("last_epoch", -1) != -1:
        raise ValueError(f"{where}: last_epoch must be -1, got {shown(values['last_epoch'])}")
    if arguments.get("milestones") is None:
        lengths = [_total_iters(e, f"{where}[{i}]") for i, e in enumerate(entries[:-1])]
        arguments["milestones"] = list(itertools.accumulate(lengths))
    children, tags = _share_tags(children, arguments.pop("param_group_tags", None), where)
    if tags is not None:
        arguments["param_group_tags"] = tags
    return _checked(ScheduleConfig(cls, arguments, children, where))


def _chained(
    cls: type[Scheduler],
    children: Sequence[ScheduleConfig],
    tags: tuple[str | None, ...] | None,
    where: str,
) -> ScheduleConfig:
    return _checked(ScheduleConfig(cls, {}, _share_tags(children, tags, where)[0], where))


def _scale_per_param(cls: type[Scheduler], child: ScheduleConfig, where: str) -> ScheduleConfig:
    if issubclass(child.scheduler, ChainScheduler):
        raise ValueError(f"{where}: adjust_learning_rate cannot scale a chained scheduler")
    if child.is_scaled:
        raise ValueError(f"{where}: ScalePerParamLR cannot scale another ScalePerParamLR")
    return _checked(ScheduleConfig(cls, {}, (child,), where))


def _share_tags(
    children: Sequence[ScheduleConfig], tags: tuple[str | None, ...] | None, where: str
) -> tuple[tuple[ScheduleConfig, ...], tuple[str | None, ...] | None]:
    """The children and the whole with the same tags, so that none writes to others' groups."""
    given = {child.param_group_tags for child in children} | {tags}
    if len(given - {None}) > 1:
        raise ValueError(f"{where}: all param_group_tags must be the same, got {shown(given)}")
    tags = next(iter(given - {None}), None)
    if tags is None:
        return tuple(children), None
    return tuple(_with_tags(child, tags) for child in children), tags


def _with_tags(config: ScheduleConfig, tags: tuple[str | None, ...]) -> ScheduleConfig:
    children = tuple(_with_tags(child, tags) for child in config.children)
    if issubclass(config.scheduler, ChainScheduler):
        return dataclasses.replace(config, children=children)
    if not _takes(config.scheduler, "param_group_tags"):
        name = config.scheduler.__name__
        raise ValueError(f"{config.where}: {name} takes no param_group_tags, got {shown(tags)}")
    arguments = {**config.arguments, "param_group_tags": tags}
    return dataclasses.replace(config, arguments=arguments, children=children)


def _total_iters(entry: Any, where: str) -> int:
    """How long an entry of a sequence lasts."""
    _, values = _named(entry, where)
    values = {_LEGACY.get(k, k): v for k, v in values.items()}
    total = values.get("total_iters")
    if total is None and "schedulers" in values:
        return sum(
            _total_iters(e, f"{where}.schedulers[{i}]") for i, e in enumerate(values["schedulers"])
        )
    number: Any = to_number(f"{where}: total_iters", total) if isinstance(total, str) else total
    is_scalar = is_number(number) and np.shape(number) == ()
    if not is_scalar or not 0 < number < 2**63 or float(number) != int(number):
        raise ValueError(
            f"{where}: total_iters must be a positive whole number on every entry "
            f"but the last, got {shown(total)}"
        )
    return int(number)


def _takes(cls: type, name: str) -> bool:
    return name in inspect.signature(cls).parameters


# --- the pure form --------------------------------------------------------------------------------


def _checked(config: ScheduleConfig) -> ScheduleConfig:
    """The same; its ranges are checked now, except those of a user's own constructor."""
    if not needs_detaching(config.scheduler) and all(
        "schedule" in vars(child) for child in config.children
    ):
        _ = config.schedule
    return config


def _schedule_of(config: ScheduleConfig) -> Schedule:
    cls, parts = config.scheduler, [child.schedule for child in config.children]
    if issubclass(cls, ScalePerParamLR):
        return parts[0]
    if issubclass(cls, ChainScheduler):
        return schedules.chained(parts)
    if issubclass(cls, SequentialScheduler):
        return schedules.sequential(parts, config.arguments["milestones"])
    values = {k: v for k, v in config.arguments.items() if k != "param_group_tags"}
    if needs_detaching(cls):
        return closed_form(cls, config.arguments)
    names = {new: old for old, new in cls.renamed.items()}  # pyright: ignore
    scheduler: Any = object.__new__(cls)
    return scheduler.make_schedule({names.get(k, k): v for k, v in values.items()})
