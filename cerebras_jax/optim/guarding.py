"""What watches over a step: bounds of the gradients, steps that are not taken, measurements."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax

from cerebras_jax.checks import check, check_flag, is_number
from cerebras_jax.sparse.masking import SparseState
from cerebras_jax.transforms.finite import GuardState, guard
from cerebras_jax.transforms.grouped import GroupedState
from cerebras_jax.transforms.norms import Norms, check_kinds
from cerebras_jax.transforms.spikes import SkipSpikes
from cerebras_jax.types import Array

BOUNDS = ("max_gradient_norm", "max_gradient_value")
SETTINGS = (*BOUNDS, "skip_nonfinite", "skip_spikes", "measure_gradients", "measure_norms")


class StepReport(NamedTuple):
    """What was seen in the last step; arrays, so that nobody waits for them.

    Attributes:
      gradient_norm: float32 scalar, the global norm of the gradients, before clipping.
      clip_factor: float32 scalar, what they were multiplied with to clip them.
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


class MeasuredState(NamedTuple):
    """The state of a step with ``measure_norms``.

    Attributes:
      inner: the state without it, that of the wrappers included.
      norms: what was measured in the last step.
    """

    inner: Any
    norms: Norms


@dataclasses.dataclass(frozen=True)
class Guard:
    """What of the watch is static.

    Attributes:
      clips: which bounds of the gradients there are, of `BOUNDS`.
      skip_nonfinite: whether steps that are not finite are not taken.
      skip_spikes: what a spike is, if those are not taken either.
      is_on: whether there is anything to watch: whether the state holds a `GuardState`.
      norms: which norms are measured, of `norms.KINDS`: whether the state is a `MeasuredState`.
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
        self, tx: optax.GradientTransformation, bounds: Mapping[str, Any], returns_params: bool
    ) -> optax.GradientTransformation:
        """The pair under watch, with the bounds in force; see `guard`."""
        if not self.is_on:
            return tx
        return guard(
            tx,
            bounds.get("max_gradient_norm"),
            bounds.get("max_gradient_value"),
            self.skip_nonfinite,
            self.skip_spikes,
            returns_params=returns_params,
        )

    def fitted(self, state: Any) -> Any:
        """A state of groups, within whatever wrappers, with a `GuardState` if it is on.

        What the state has of it already stays.
        """

        def fit(node: Any) -> Any:
            if isinstance(node, GroupedState | SparseState):
                return GuardState.start(node, self.skip_spikes) if self.is_on else node
            if not isinstance(node, GuardState):
                return node
            if not self.is_on:
                return node.inner
            new = GuardState.start(None, self.skip_spikes).spikes
            return node._replace(spikes=node.spikes if _alike(node.spikes, new) else new)

        kinds = GuardState | SparseState | GroupedState
        return jax.tree.map(fit, state, is_leaf=lambda x: isinstance(x, kinds))


def guard_only(state: Any) -> GuardState | None:
    """The `GuardState` in a state, without what is guarded; None if there is none."""
    nodes: list[Any] = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, GuardState))
    found = [x for x in nodes if isinstance(x, GuardState)]
    return found[0]._replace(inner=None) if found else None


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
