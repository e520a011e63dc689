"""Schedulers made of schedulers."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from cerebras_jax import schedules
from cerebras_jax.formats.state_dict import plain_value
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.optim.scheduler import Scheduler
from cerebras_jax.stateful import Parts


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
