"""Weights as ``.safetensors``: names and arrays, nothing else.

References:
  https://huggingface.co/docs/safetensors
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from cerebras_jax.formats.files import written_whole
from cerebras_jax.formats.run import Run
from cerebras_jax.messages import import_extra

_MOST_HEADER = 100_000_000  # as in safetensors itself
_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64"},
}


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


def read_shapes(path: str | Path) -> dict[str, dict[str, Any]]:
    """The shape and dtype of each array, from the file's header alone.

    Raises:
      ValueError: if it is no header.
    """
    with Path(path).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size <= _MOST_HEADER else b""
    try:
        if len(text) < size:
            raise ValueError("it ends within the header, or this is none")
        header = json.loads(text)
        header.pop("__metadata__", None)
        return {
            name: {"shape": entry["shape"], "dtype": _DTYPES.get(entry["dtype"], entry["dtype"])}
            for name, entry in header.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{path} has no header of a .safetensors file") from None


def save(path: str | Path, arrays: dict[str, Any]) -> None:
    """Writes arrays by name, marked as torch's, as other programs expect."""
    module = _import_safetensors()
    contiguous = {k: np.ascontiguousarray(v).reshape(np.shape(v)) for k, v in arrays.items()}
    with written_whole(path) as temporary:
        module.numpy.save_file(contiguous, temporary, metadata={"format": "pt"})


def _import_safetensors() -> Any:
    import_extra("safetensors.numpy", "convert")
    return import_extra("safetensors", "convert")
