"""The learning-rate schedulers, with the names and arguments of PyTorch and Cerebras."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec

from cerebras_jax import schedules
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.optim.scheduler import (
    Scheduler,
    SchedulerComposition,
    ScheduleScheduler,
    SequentialScheduler,
    scheduler_of,
)

P = ParamSpec("P")


class LRScheduler(Scheduler):
    __doc__ = Scheduler.__doc__
    key = "lr"

    @classmethod
    def of(cls, schedule_type: Callable[P, schedules.Schedule]) -> type[ScheduleScheduler[P]]:
        """The base class of a scheduler that writes a schedule's value into ``"lr"``."""
        return scheduler_of(cls, schedule_type)


class ConstantLR(LRScheduler.of(schedules.constant)):
    pass


class PolynomialLR(LRScheduler.of(schedules.polynomial)):
    pass


class LinearLR(LRScheduler.of(schedules.linear)):
    pass


class CosineDecayLR(LRScheduler.of(schedules.cosine_decay)):
    pass


class SequentialLR(SequentialScheduler, LRScheduler):
    __doc__ = SequentialScheduler.__doc__


class ScalePerParamLR(SchedulerComposition, LRScheduler):
    """Another scheduler's value, times each group's own ``adjust_learning_rate`` (default 1).

    Args:
      optimizer: the optimizer to schedule.
      scheduler: the scheduler whose value to scale.
    """

    def __init__(self, optimizer: Optimizer, scheduler: Scheduler):
        self._adopt(optimizer, [scheduler])
        super().__init__(optimizer, param_group_tags=scheduler.param_group_tags)

    @property
    def schedule(self) -> Callable[[Any], Any]:
        return self._schedulers[0].schedule

    def get_lr(self) -> list[Any]:
        value = self._get_closed_form_lr()
        return [value * group.get("adjust_learning_rate", 1.0) for group in self._groups()]
