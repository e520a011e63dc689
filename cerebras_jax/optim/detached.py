"""The schedule of a user's scheduler class, without an optimizer."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from cerebras_jax.optim.schedule_scheduler import ScheduleScheduler
from cerebras_jax.optim.scheduler import Scheduler
from cerebras_jax.optim.scheduler_compositions import SchedulerComposition


def needs_detaching(cls: type[Scheduler]) -> bool:
    """Whether only an instance of the class knows its schedule: a constructor makes it."""
    is_pure = issubclass(cls, ScheduleScheduler) and cls.__init__ is ScheduleScheduler.__init__
    return not is_pure and not issubclass(cls, SchedulerComposition)


def closed_form(cls: type[Scheduler], arguments: Mapping[str, Any]) -> Callable[[Any], Any]:
    """The pure schedule of a class whose constructor calls ``super().__init__(optimizer)``.

    Args:
      cls: a subclass of `Scheduler` with a constructor or a closed form of its own.
      arguments: the constructor's, without the optimizer.

    Raises:
      TypeError: if it needs an optimizer for more than to hand it on.
    """
    try:
        scheduler = _detached(cls)(None, **arguments)
        schedule = scheduler.at if cls.schedule is Scheduler.schedule else scheduler.schedule
        schedule(0)
    except Exception as error:
        raise TypeError(
            "its schedule needs an optimizer, which the pure form does not have "
            f"({type(error).__name__}: {error}); derive it from LRScheduler.of(schedule)"
        ) from error
    return schedule


class _Detached(Scheduler):
    """Stands behind a class, where `Scheduler` would take hold of the optimizer."""

    def __init__(
        self,
        optimizer: None,
        total_iters: int | None = None,
        last_epoch: int = -1,
        param_group_tags: Any = None,
    ):
        self.total_iters, self.last_epoch = total_iters, last_epoch
        self.param_group_tags = param_group_tags

    def at(self, step: Any) -> Any:
        """The value at a step, which may be traced."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        twin.last_epoch = step
        return twin._get_closed_form_lr()


@functools.cache
def _detached(cls: type[Scheduler]) -> Any:
    bases: tuple[Any, ...] = (cls, _Detached)
    return type(f"_{cls.__name__}", bases, {})
