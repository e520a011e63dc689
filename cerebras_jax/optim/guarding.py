"""What watches over a step: bounds of the gradients, steps that are not taken, measurements."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import optax

from cerebras_jax.checks import check, check_flag, is_number
from cerebras_jax.transforms.finite import GuardState, guard
from cerebras_jax.transforms.norms import Norms, NormsState, check_kinds, measure_norms
from cerebras_jax.transforms.spikes import SkipSpikes
from cerebras_jax.types import Array

BOUNDS = ("max_gradient_norm", "max_gradient_value")
SETTINGS = (*BOUNDS, "skip_nonfinite", "skip_spikes", "measure_gradients", "measure_norms")


class StepReport(NamedTuple):
    """What was seen in the last step; arrays, so that nobody waits for them.

    Attributes:
      gradient_norm: float32 scalar, the global norm of the gradients, before clipping.
      clip_factor: float32 scalar, what they were multiplied with to clip them; NaN if that comes
        after wrappers (``around=``), whose output is clipped.
      took_step: bool scalar, whether the step was taken; True before the first.
      num_skipped_steps: int32 scalar, the steps not taken so far.
      skipped_in_a_row: int32 scalar, the steps not taken since the last that was.
      norms: of each gradient, update and parameter by name, with ``measure_norms``; else None.
    """

    gradient_norm: Array
    clip_factor: Array
    took_step: Array
    num_skipped_steps: Array
    skipped_in_a_row: Array
    norms: Norms | None = None

    @classmethod
    def of(cls, state: GuardState, norms: Norms | None = None) -> "StepReport":
        """The report in a state of `guard`."""
        return cls(
            state.norm,
            state.clip_factor,
            state.took_step,
            state.num_skipped_steps,
            state.skipped_in_a_row,
            norms,
        )


@dataclasses.dataclass(frozen=True)
class Guard:
    """What of the watch is static.

    Attributes:
      clips: which bounds of the gradients there are, of `BOUNDS`.
      skip_nonfinite: whether steps that are not finite are not taken.
      skip_spikes: what a spike is, if those are not taken either.
      is_on: whether there is anything to watch: whether the state holds a `GuardState`.
      norms: which norms are measured, of `norms.KINDS`: whether the state is a `NormsState`.
    """

    clips: tuple[str, ...] = ()
    skip_nonfinite: bool = False
    skip_spikes: SkipSpikes | None = None
    is_on: bool = False
    norms: tuple[str, ...] = ()

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

    def measured(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        """The pair under watch, which returns new parameters, with its norms measured."""
        return measure_norms(tx, self.norms, returns_params=True) if self.norms else tx

    def norms_of(self, state: Any) -> Norms | None:
        """The norms of the last step; None if none are measured. They are the outermost node."""
        return state.norms if self.norms else None

    def watch(self, state: Any) -> GuardState | None:
        """The `GuardState` of this watch, without what is guarded; None if it is off.

        It is the outermost node but for the norms. Those within are states of wrappers.
        """
        return self._unmeasured(state)._replace(inner=None) if self.is_on else None

    def guarded(self, state: Any) -> Any:
        """The state of what is under watch."""
        state = self._unmeasured(state)
        return state.inner if self.is_on else state

    def refitted(self, state: Any, old: "Guard", paths: Sequence[str]) -> Any:
        """The state of another watch as one of this watch; what both have of the guard stays.

        Args:
          state: that of the other.
          old: the other.
          paths: of the parameters, which norms are measured of.
        """
        new = self._judging(old._unmeasured(state), old)
        return NormsState(new, Norms.start(paths, self.norms)) if self.norms else new

    def _unmeasured(self, state: Any) -> Any:
        return state.inner if self.norms else state

    def _judging(self, state: Any, old: "Guard") -> Any:
        inner = state.inner if old.is_on else state
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
    elif name == "measure_norms":
        check_kinds(value)
    elif name in BOUNDS:
        if value is not None and not is_number(value):
            raise TypeError(f"{name} must be a number or None, got {value!r}")
        if value is not None:
            check(name, value, "> 0")
    else:
        check_flag(name, value)


def _alike(a: Any, b: Any) -> bool:
    return (a is None) == (b is None) and (a is None or a.norms.shape == b.norms.shape)
