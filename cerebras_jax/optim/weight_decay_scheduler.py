"""Weight-decay schedulers: the twins of the learning-rate schedulers, with their own key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cerebras_jax import schedules
from cerebras_jax.optim.schedule_scheduler import ScheduleScheduler, scheduler_of
from cerebras_jax.optim.scheduler import Scheduler
from cerebras_jax.optim.scheduler_compositions import ChainScheduler, SequentialScheduler


class WeightDecayScheduler(Scheduler):
    __doc__ = f"""{Scheduler.__doc__}
    Groups that are marked ``no_weight_decay``, as `configure_param_groups` marks those of
    biases and normalisation layers, are left alone.
    """
    key = "weight_decay"
    # An argument of the schedule -> its name here.
    renamed = {
        "learning_rate": "val",
        "learning_rates": "vals",
        "initial_learning_rate": "initial_val",
        "end_learning_rate": "end_val",
        "base_lr": "base_val",
        "max_lr": "max_val",
    }

    def groups(self) -> list[dict[str, Any]]:
        return [group for group in super().groups() if not group.get("no_weight_decay")]

    @classmethod
    def of(cls, schedule_type: Callable[..., schedules.Schedule]) -> type[ScheduleScheduler[...]]:
        """The base class of a scheduler that writes a schedule's value into "weight_decay"."""
        return scheduler_of(cls, schedule_type)


class ConstantWD(WeightDecayScheduler.of(schedules.constant)):
    pass


class PolynomialWD(WeightDecayScheduler.of(schedules.polynomial)):
    pass


class LinearWD(WeightDecayScheduler.of(schedules.linear)):
    pass


class ExponentialWD(WeightDecayScheduler.of(schedules.exponential)):
    pass


class InverseExponentialTimeDecayWD(
    WeightDecayScheduler.of(schedules.inverse_exponential_time_decay)
):
    pass


class InverseSquareRootDecayWD(WeightDecayScheduler.of(schedules.inverse_square_root_decay)):
    pass


class CosineDecayWD(WeightDecayScheduler.of(schedules.cosine_decay)):
    pass


class PiecewiseConstantWD(WeightDecayScheduler.of(schedules.piecewise_constant)):
    pass


class MultiStepWD(WeightDecayScheduler.of(schedules.multi_step)):
    pass


class StepWD(WeightDecayScheduler.of(schedules.step)):
    pass


class CosineAnnealingWD(WeightDecayScheduler.of(schedules.cosine_annealing)):
    pass


class CosineAnnealingWarmRestartsWD(
    WeightDecayScheduler.of(schedules.cosine_annealing_warm_restarts)
):
    pass


class OneCycleWD(WeightDecayScheduler.of(schedules.one_cycle)):
    pass


class CyclicWD(WeightDecayScheduler.of(schedules.cyclic)):
    pass


class LambdaWD(WeightDecayScheduler.of(schedules.product_of_lambdas)):
    pass


class MultiplicativeWD(WeightDecayScheduler.of(schedules.multiplicative)):
    pass


class SequentialWD(SequentialScheduler, WeightDecayScheduler):
    __doc__ = SequentialScheduler.__doc__


class ChainedWD(ChainScheduler, WeightDecayScheduler):
    __doc__ = ChainScheduler.__doc__
