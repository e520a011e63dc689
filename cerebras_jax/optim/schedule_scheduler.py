"""Schedulers that apply a pure schedule, with its signature."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, ParamSpec, cast, overload

from cerebras_jax.checks import is_traced
from cerebras_jax.formats.state_dict import plain_value, with_functions
from cerebras_jax.optim.numbers import LEARNING_RATES
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.optim.scheduler import Scheduler, as_tags
from cerebras_jax.schedules import Schedule

P = ParamSpec("P")

_FAR = 10  # times the learning rate that an optimizer was made with


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

    def _what_is_overwritten(self) -> str | None:
        return super()._what_is_overwritten() or self._what_is_far_above()

    def _what_is_far_above(self) -> str | None:
        """What to say of a learning rate that looks like a factor, or like a number of steps.

        torch's schedulers take factors of the optimizer's own value, so its calls mean something
        else here. No published configuration comes near to 1; an optimizer's value of 0
        is none.
        """
        if self.key not in LEARNING_RATES or not isinstance(self.schedule, Schedule):
            return None
        peak = max((v for _, v in self.schedule.probes() if not is_traced(v)), default=0.0)
        before = [g[self.key] for g in self.groups()]
        known = [float(x) for x in before if not (callable(x) or is_traced(x))]
        if len(known) < len(before) or not max(known) or peak < max(1.0, _FAR * max(known)):
            return None
        return (
            f"{type(self).__name__} writes {self.key} up to {float(peak):g}, the optimizer had "
            f"{max(known):g}; its arguments are values, not torch's factors of that: "
            f"{self.schedule}"
        )

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
        self.param_group_tags = as_tags(state_dict["param_group_tags"])


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


def _without_examples(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").split("\n\n>>>")[0]
