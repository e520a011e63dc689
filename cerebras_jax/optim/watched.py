"""What watches over the steps of an optimizer: its settings, its state, and what was seen."""

from typing import Any

from cerebras_jax.optim.guarding import BOUNDS, SETTINGS, Guard, StepReport
from cerebras_jax.optim.pair_state import PairOptimizer
from cerebras_jax.transforms.finite import GuardState, check_skips
from cerebras_jax.transforms.norms import check_kinds

_MADE_WITH = frozenset({"state_dtype", "rounding", "pack", "zero_axis", "state_memory"})

SCALED = (-1, "loss_scale")  # among the live values: steps came with a scaler


class WatchedOptimizer(PairOptimizer):
    """An optimizer that clips, skips and measures as its settings say."""

    settings = SETTINGS

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in SETTINGS:
            if name in _MADE_WITH and vars(self).get("_structure") is not None:
                self._check_made_with(name, value)
            return super().__setattr__(name, value)
        with self.lock:
            super().__setattr__(name, value)
            if vars(self).get("_structure") is not None:
                self._fit_guard()

    def _check_made_with(self, name: str, value: Any) -> None:
        """Refuses to change what the states were allocated with."""
        if value != getattr(self, name):
            raise AttributeError(
                f"{name} is chosen when {type(self).__name__} is made: its states are allocated "
                f"with {getattr(self, name)!r}, got {value!r}"
            )

    def _guard(self) -> Guard:
        clips = tuple(name for name in BOUNDS if getattr(self, name) is not None)
        norms = check_kinds(self.measure_norms)
        measures = self.measure_gradients or SCALED in self._live or norms != ()
        skips = self.skip_nonfinite or self.skip_spikes is not None
        is_on = measures or skips or clips != ()
        return Guard(clips, self.skip_nonfinite, self.skip_spikes, is_on, norms)

    def _fit_guard(self) -> None:
        """Allocates what the settings need, and frees what they do not."""
        guard = self._guard()
        if guard == self._fitted:
            return
        state = self._structure.unflatten(self._state)
        self._take_state(guard.refitted(state, self._fitted, tuple(self._paths().values())))
        self._fitted = guard
        vars(self).pop("_cache", None)

    def set_live(self, live: frozenset[Any]) -> None:
        """See `Stateful`."""
        super().set_live(live)
        self._fit_guard()

    def _watch(self) -> GuardState | None:
        return self._fitted.watch(self._structure.unflatten(self._state))

    @property
    def report(self) -> StepReport:
        """What was seen in the last step, in arrays: nobody waits for the device.

        Raises:
          RuntimeError: if nothing was looked at: no bound, no skipping, no scaler, and not
            ``measure_gradients``.
        """
        with self.lock:
            self.note_use()
            state = self._watch()
            if state is None:
                raise RuntimeError(
                    "the gradients are not measured; set measure_gradients=True on the optimizer"
                )
            norms = self._fitted.norms_of(self._structure.unflatten(self._state))
            return StepReport.of(state, None if norms is None else norms.called(self._names))

    @property
    def took_step(self) -> Any:
        """Whether the last step was taken: True, or an array where steps may be left out."""
        with self.lock:
            if not self._guard().judges and SCALED not in self._live:
                return True
            state = self._watch()
            return True if state is None else state.took_step

    def check_skips(self, max_in_a_row: int = 10) -> None:
        """Raises if too many steps in a row were not taken; waits for the last step.

        Args:
          max_in_a_row: how many are accepted.

        Raises:
          FloatingPointError: says how many, and the norm of the last gradients.
        """
        with self.lock:
            state = self._watch()
        if state is not None:
            check_skips(state, max_in_a_row)
