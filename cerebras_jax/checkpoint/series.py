"""The checkpoints of a run."""

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cerebras_jax.checkpoint import store
from cerebras_jax.checkpoint.leaves import (
    CheckpointError,
    DamagedError,
    Extra,
    Hyper,
    Missing,
)
from cerebras_jax.checkpoint.reading import (
    PathLike,
    Rename,
    Restored,
    options_of,
    restore_objects,
)
from cerebras_jax.checkpoint.writing import packed


class Checkpoints:
    """The checkpoints of one run: one in so many steps, of which the latest few are kept.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from cerebras_jax import optim
    >>> def run(steps, folder):
    ...     opt = optim.SGD({"w": jnp.array([1.0])}, lr=0.5)
    ...     with Checkpoints(folder, every=2, keep=1) as checkpoints:
    ...         found = checkpoints.restore(opt=opt)
    ...         for step in range(found.step if found else 0, steps):
    ...             opt.step({"w": jnp.array([1.0])})
    ...             checkpoints.save(step + 1, opt=opt)
    ...     return found and found.step, opt.params["w"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(run(3, folder), run(4, folder))
    (None, Array([-0.5], dtype=float32)) (2, Array([-1.], dtype=float32))

    Saving is asynchronous: `save` copies the arrays, and the run goes on while they are written.
    What was not written whole is not there. Without ``with``, call `close` at the end.

    An object may be an optimizer, a scheduler, an nnx module, an average or anything else that is
    `Stateful`; an iterator with ``get_state`` and ``set_state``, or anything with ``state_dict``
    and ``load_state_dict``; a NumPy generator; any tree of arrays, keys, numbers and strings, such
    as the state of an optax pair; and lists and dicts of all these. Nothing is pickled.

    Args:
      folder: of this run alone.
      every: save when the step is a multiple of this, and when the machine is about to be taken
        away, if JAX is told so.
      keep: how many of the latest to keep; None: all.
      verify: whether a fingerprint of every array is stored, and compared when it is restored.
      context: an ``orbax.checkpoint.v1.Context``.

    Raises:
      ValueError: if ``every`` or ``keep`` is below 1.
    """

    def __init__(
        self,
        folder: PathLike,
        every: int = 1,
        keep: int | None = None,
        *,
        verify: bool = True,
        context: Any = None,
    ):
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.verify = verify
        self._series = store.Series(folder, every, keep, context or store.default_context())
        self._base: int | None = None  # the step that was restored
        self._saved: int | None = None  # the step that was saved or restored last
        self._is_begun = False

    def __repr__(self) -> str:
        return f"Checkpoints({str(self.folder)!r})"

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        return self._series.folder

    def steps(self) -> list[int]:
        """The steps that there are whole checkpoints of, in order; waits for one on its way."""
        return self._series.steps()

    def save(self, step: int, /, *, force: bool = False, **objects: Any) -> bool:
        """Saves objects if the step is due.

        Args:
          step: how many steps the run has taken.
          force: save at any step, e.g. the last one.
          **objects: by names of your own.

        Returns:
          Whether it was due. A step that is saved already is not.

        Raises:
          TypeError: names the path of what cannot be stored.
          ValueError: if the folder has checkpoints of another run: none was restored, and they
            would be mixed.
          Exception: why the save before this one failed.
        """
        if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0:
            raise ValueError(f"step must be a whole number >= 0, got {step!r}")
        step = int(step)
        if not self._is_begun:
            self._begin()
        if step == self._saved or not (force or self._series.is_due(step)):
            return False
        arrays, text = packed(step, objects, self.verify)
        self._saved = None  # if the one before it failed, which is said now
        self._series.write(step, arrays, text)
        self._saved = step
        return True

    def _begin(self) -> None:
        """Before the first save: later checkpoints than the restored one are given up."""
        steps = self.steps()
        if steps and self._base is None:
            raise ValueError(
                f"{self.folder} has checkpoints of steps {steps[-5:]}; restore one of them, or "
                "give this run another folder"
            )
        for step in steps:
            if self._base is not None and step > self._base:
                self._series.delete(step)
        self._is_begun = True

    def restore(
        self,
        *,
        step: int | None = None,
        hyper: Hyper = "saved",
        missing: Missing = "error",
        extra: Extra = "error",
        rename: Rename | None = None,
        **objects: Any,
    ) -> Restored | None:
        """Restores objects from the latest checkpoint; see `restore`.

        Args:
          step: which one, if not the latest. Later ones are deleted when this run saves.
          hyper, missing, extra, rename: see `restore`.
          **objects: as in `save`.

        Returns:
          What was restored; None if there is no checkpoint: this is a new run.
        """
        options = options_of(hyper, missing, extra, rename)
        steps = self.steps()
        if step is None and not steps:
            return None
        chosen = steps[-1] if step is None else step
        if chosen not in steps:
            raise CheckpointError(f"{self.folder} has no step {step!r}, but {steps}")
        path = self._series.path(chosen)
        try:
            found = restore_objects(path, objects, options, self.verify, self._series.context)
        except DamagedError as error:
            older = [s for s in steps if s < chosen]
            if older:
                raise DamagedError(
                    f"{error}; restore(step={older[-1]}) takes an older one"
                ) from error
            raise
        self._base = self._saved = chosen
        self._is_begun = False
        return found

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
          Exception: why the last save failed.
        """
        self._series.wait()

    def close(self) -> None:
        """Waits until everything is on disk, and lets go of the folder; raises as `wait`."""
        self._series.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
