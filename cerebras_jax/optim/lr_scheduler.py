"""The learning-rate schedulers, with the names and arguments of PyTorch and Cerebras."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec

from cerebras_jax import schedules
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.optim.plateau import ReduceLROnPlateau as ReduceLROnPlateau
from cerebras_jax.optim.schedule_scheduler import ScheduleScheduler, scheduler_of
from cerebras_jax.optim.scheduler import Scheduler
from cerebras_jax.optim.scheduler_compositions import (
    ChainScheduler,
    SchedulerComposition,
    SequentialScheduler,
)

P = ParamSpec("P")


class LRScheduler(Scheduler):
    __doc__ = Scheduler.__doc__
    key = "lr"
    keys = ("learning_rate",)

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


class ExponentialLR(LRScheduler.of(schedules.exponential)):
    pass


class InverseExponentialTimeDecayLR(LRScheduler.of(schedules.inverse_exponential_time_decay)):
    pass


class InverseSquareRootDecayLR(LRScheduler.of(schedules.inverse_square_root_decay)):
    pass


class CosineDecayLR(LRScheduler.of(schedules.cosine_decay)):
    pass


class PiecewiseConstantLR(LRScheduler.of(schedules.piecewise_constant)):
    pass


class MultiStepLR(LRScheduler.of(schedules.multi_step)):
    pass


class StepLR(LRScheduler.of(schedules.step)):
    pass


class CosineAnnealingLR(LRScheduler.of(schedules.cosine_annealing)):
    pass


class CosineAnnealingWarmRestarts(LRScheduler.of(schedules.cosine_annealing_warm_restarts)):
    pass


class OneCycleLR(LRScheduler.of(schedules.one_cycle)):
    pass


class LambdaLR(LRScheduler.of(schedules.product_of_lambdas)):
    """An initial value times functions of the step; see `schedules.product_of_lambdas`.

    The functions are given as ``lambdas``, or by a subclass that overrides `set_lr_lambda`.
    """

    def make_schedule(self, values: dict[str, Any]) -> Any:
        self.lambdas = None
        functions = values.get("lambdas") or self.set_lr_lambda() or self.lambdas
        del self.lambdas
        return super().make_schedule({**values, "lambdas": functions} if functions else values)

    def set_lr_lambda(self) -> Any:
        """Override it to return the functions of the step, or to set ``self.lambdas``."""
        return None


class MultiplicativeLR(LRScheduler.of(schedules.multiplicative)):
    def set_lr_lambda(self) -> Callable[[Any], Any]:
        """The factor of one step, as a function of the step: the coefficient."""
        return lambda step: self.coefficient


class CyclicLR(LRScheduler.of(schedules.cyclic)):
    def make_schedule(self, values: dict[str, Any]) -> Any:
        scale_fn = values.get("scale_fn") or self.set_scale_fn()
        return super().make_schedule({**values, "scale_fn": scale_fn})

    def set_scale_fn(self) -> Callable[[Any], Any] | None:
        """Override it to return a function for the amplitude; None: the mode's own."""
        return None


class SequentialLR(SequentialScheduler, LRScheduler):
    __doc__ = SequentialScheduler.__doc__


class ChainedScheduler(ChainScheduler, LRScheduler):
    __doc__ = ChainScheduler.__doc__


ChainedLR = ChainedScheduler


class ScalePerParamLR(SchedulerComposition, LRScheduler):
    """Another scheduler's value, times each group's own ``adjust_learning_rate`` (default 1).

    Args:
      optimizer: the optimizer to schedule.
      scheduler: the scheduler whose value to scale.
    """

    def __init__(self, optimizer: Optimizer, scheduler: Scheduler):
        self._adopt(optimizer, [scheduler])
        super().__init__(optimizer, param_group_tags=scheduler.param_group_tags)

    def _what_is_overwritten(self) -> None:
        return None  # the groups' factors are what it is for

    @property
    def schedule(self) -> Callable[[Any], Any]:
        return self._schedulers[0].schedule

    def get_lr(self) -> list[Any]:
        value = self._get_closed_form_lr()
        return [value * group.get("adjust_learning_rate", 1.0) for group in self.groups()]
