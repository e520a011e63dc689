"""What watches over a step: bounds of the gradients, steps that are not taken, measurements."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import optax

from cerebras_jax.checks import check, check_flag, is_number
from cerebras_jax.transforms.finite import GuardState, guard
from cerebras_jax.transforms.spikes import SkipSpikes
from cerebras_jax.types import Array

BOUNDS = ("max_gradient_norm", "max_gradient_value")
SETTINGS = (*BOUNDS, "skip_nonfinite", "skip_spikes", "measure_gradients")


class StepReport(NamedTuple):
    """What was seen in the last step; arrays, so that nobody waits for them.

    Attributes:
      gradient_norm: float32 scalar, the global norm of the gradients, before clipping.
      clip_factor: float32 scalar, what they were multiplied with to clip them; NaN if that comes
        after wrappers (``around=``), whose output is clipped.
      took_step: bool scalar, whether the step was taken; True before the first.
      num_skipped_steps: int32 scalar, the steps not taken so far.
      skipped_in_a_row: int32 scalar, the steps not taken since the last that was.
    """

    gradient_norm: Array
    clip_factor: Array
    took_step: Array
    num_skipped_steps: Array
    skipped_in_a_row: Array

    @classmethod
    def of(cls, state: GuardState) -> "StepReport":
        """The report in a state of `guard`."""
        return cls(
            state.norm,
            state.clip_factor,
            state.took_step,
            state.num_skipped_steps,
            state.skipped_in_a_row,
        )


@dataclasses.dataclass(frozen=True)
class Guard:
    """What of the watch is static.

    Attributes:
      clips: which bounds of the gradients there are, of `BOUNDS`.
      skip_nonfinite: whether steps that are not finite are not taken.
      skip_spikes: what a spike is, if those are not taken either.
      is_on: whether there is anything to watch: whether the state holds a `GuardState`.
    """

    clips: tuple[str, ...] = ()
    skip_nonfinite: bool = False
    skip_spikes: SkipSpikes | None = None
    is_on: bool = False

    @property
    def judges(self) -> bool:
        """Whether steps may be left out."""
        return self.skip_nonfinite or self.skip_spikes is not None

    def around(
        self, tx: optax.GradientTransformation, bounds: Mapping[str, Any]
    ) -> optax.GradientTransformation:
        """The pair, which returns new parameters, under watch with these bounds; see `guard`."""
        if not self.is_on:
            return tx
        return guard(
            tx,
            bounds.get("max_gradient_norm"),
            bounds.get("max_gradient_value"),
            self.skip_nonfinite,
            self.skip_spikes,
            returns_params=True,
        )

    def watch(self, state: Any) -> GuardState | None:
        """The `GuardState` of this watch, without what is guarded; None if it is off.

        It is the outermost node. Those within are states of wrappers.
        """
        return state._replace(inner=None) if self.is_on else None

    def guarded(self, state: Any) -> Any:
        """The state of what is under watch."""
        return state.inner if self.is_on else state

    def refitted(self, state: Any, old: "Guard") -> Any:
        """The state of another watch as one of this watch; what both have stays."""
        inner = old.guarded(state)
        if not self.is_on:
            return inner
        new = GuardState.start(inner, self.skip_spikes)
        if not old.is_on:
            return new
        return state._replace(
            spikes=state.spikes if _alike(state.spikes, new.spikes) else new.spikes
        )


def check_setting(name: str, value: Any) -> None:
    """Refuses a value that a setting cannot have."""
    if name == "skip_spikes":
        if not isinstance(value, SkipSpikes | None):
            raise TypeError(f"skip_spikes must be a SkipSpikes or None, got {value!r}")
    elif name in BOUNDS:
        if value is not None and not is_number(value):
            raise TypeError(f"{name} must be a number or None, got {value!r}")
        if value is not None:
            check(name, value, "> 0")
    else:
        check_flag(name, value)


def _alike(a: Any, b: Any) -> bool:
    return (a is None) == (b is None) and (a is None or a.norms.shape == b.norms.shape)
