"""The metrics of a run for TensorBoard: events in a folder of the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cerebras_jax.messages import import_extra

_NO_SCALARS = ("step", "seconds")  # an event has both by itself


class Events:
    """Writes scalars, by the names that they have in ``metrics.jsonl``.

    Args:
      folder: where the events go.
      start: the step that a resumed run goes on with; TensorBoard drops what it had of later ones.

    Raises:
      ImportError: if tensorboardX is not installed.
    """

    def __init__(self, folder: Path, start: int = 0):
        purge = {"purge_step": start} if start else {}
        self._writer = import_writer()(str(folder), **purge)

    def write(self, values: Mapping[str, Any]) -> None:
        """One line of metrics."""
        for name, value in values.items():
            if name not in _NO_SCALARS:
                self._writer.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Writes what is left, and closes the file."""
        self._writer.close()


def import_writer() -> Any:
    """tensorboardX's SummaryWriter.

    Raises:
      ImportError: says how to install it.
    """
    return import_extra("tensorboardX", "tensorboard").SummaryWriter
