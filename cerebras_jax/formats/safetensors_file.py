"""Weights as ``.safetensors``: names and arrays, nothing else.

References:
  https://huggingface.co/docs/safetensors
"""

from pathlib import Path
from typing import Any

import numpy as np

from cerebras_jax.formats.files import written_whole
from cerebras_jax.formats.run import Run
from cerebras_jax.messages import import_extra


def read(path: str | Path) -> Run:
    """The weights of a file, which are sorted by name: the model's order is not in it.

    Raises:
      ImportError: if safetensors is not installed.
      ValueError: if the file is damaged.
    """
    return Run(params=load(path), ordered=False)


def write(path: str | Path, run: Run) -> None:
    """A file with the weights of a run; whole or not at all.

    Raises:
      ImportError: if safetensors is not installed.
      ValueError: if there is more than weights to write.
    """
    if run.groups or run.states:
        raise ValueError(
            "a .safetensors file holds weights only, and this run has an optimizer; leave it "
            "behind with weights_only=True or --weights-only"
        )
    save(path, run.params)


def load(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name."""
    module = _import_safetensors()
    try:
        return module.numpy.load_file(path)
    except module.SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def save(path: str | Path, arrays: dict[str, Any]) -> None:
    """Writes arrays by name, marked as torch's, as other programs expect."""
    module = _import_safetensors()
    contiguous = {k: np.ascontiguousarray(v).reshape(np.shape(v)) for k, v in arrays.items()}
    with written_whole(path) as temporary:
        module.numpy.save_file(contiguous, temporary, metadata={"format": "pt"})


def _import_safetensors() -> Any:
    import_extra("safetensors.numpy", "convert")
    return import_extra("safetensors", "convert")
