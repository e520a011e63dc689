"""Arrays and a text on disk: the only module that knows orbax."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cerebras_jax.checkpoint.leaves import CheckpointError, DamagedError, Target

_ARRAYS = "arrays"
_DESCRIPTION = "_CHECKPOINT_METADATA"  # orbax's file, written last
_NONE = {"-": np.zeros(1, np.int8)}  # orbax takes no empty tree


@functools.cache
def _orbax() -> Any:
    """orbax, which takes a second to import."""
    from orbax.checkpoint import v1

    return v1


def default_context() -> Any:
    """orbax's options: without compression, which costs more time than it saves."""
    context = _orbax().Context()
    context.array.saving.use_compression = False
    return context


def _payload(arrays: Mapping[str, Any], text: str) -> tuple[dict[str, Any], dict[str, str]]:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {_ARRAYS: dict(arrays) or _NONE}, {"cerebras_jax": text, "sha256": digest}


def write(path: Path, arrays: Mapping[str, Any], text: str, context: Any, overwrite: bool) -> None:
    """Writes one checkpoint; it is there whole, or not at all."""
    payload, metadata = _payload(arrays, text)
    with context:
        _orbax().save_checkpointables(path, payload, custom_metadata=metadata, overwrite=overwrite)


def is_written(path: Path) -> bool:
    """Whether a folder has the file that is written last."""
    return (path / _DESCRIPTION).is_file()


def read_text(path: Path) -> str:
    """The text of a checkpoint.

    Raises:
      FileNotFoundError: if there is nothing.
      CheckpointError: if it is no checkpoint of this package.
      DamagedError: if the text is not what was written.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    file = path / _DESCRIPTION
    if not is_written(path):
        steps = sorted((x.name for x in path.glob("*") if x.name.isdecimal()), key=int)
        hint = f"; it has steps {', '.join(steps[-5:])}, each a checkpoint: " if steps else ""
        hint += f"give {path.name}/{steps[-1]}, or use cerebras_jax.Checkpoints" if steps else ""
        raise CheckpointError(f"{path} is no checkpoint, or lacks its description{hint}")
    with _damage(path):
        found = json.loads(file.read_text("utf-8")).get("custom_metadata")
    if not isinstance(found, dict) or not isinstance(found.get("cerebras_jax"), str):
        raise CheckpointError(f"{path} is no checkpoint of cerebras_jax, or it is damaged")
    text = found["cerebras_jax"]
    if hashlib.sha256(text.encode()).hexdigest() != found.get("sha256"):
        raise DamagedError(f"{path} is damaged: its description is not what was saved")
    return text


def read_arrays(path: Path, targets: Mapping[str, Target], context: Any) -> dict[str, Any]:
    """Some of a checkpoint's arrays.

    Raises:
      DamagedError: if they cannot be read.
    """
    if not targets:
        return {}
    abstract = {name: _abstract(target) for name, target in targets.items()}
    context = _orbax().Context(context)
    context.pytree.loading.partial_load = True
    with context, _damage(path):
        return _orbax().load_checkpointables(path, {_ARRAYS: abstract})[_ARRAYS]


def _abstract(target: Target) -> Any:
    is_jax = jax.dtypes.canonicalize_dtype(target.dtype) == target.dtype  # 64 bits are NumPy's
    if target.sharding is None or not is_jax:  # takes no memory
        return np.broadcast_to(np.zeros((), target.dtype), target.shape)
    return jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=target.sharding)


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # whatever orbax, zarr or JSON say of broken files
        lines = str(error).strip().splitlines() or [""]
        raise DamagedError(
            f"{path} cannot be read: {type(error).__name__}: {lines[0][:300]}"
        ) from error


class Series:
    """The checkpoints of a run, one folder for each step."""

    def __init__(self, folder: str | os.PathLike[str], every: int, keep: int | None, context: Any):
        policies, kept = (
            _orbax().training.save_decision_policies,
            _orbax().training.preservation_policies,
        )
        self.context = context
        self._checkpointer = _orbax().training.Checkpointer(
            Path(folder).absolute(),
            context=context,
            save_decision_policy=policies.AnySavePolicy(
                [policies.FixedIntervalPolicy(every), policies.PreemptionCheckpointingPolicy()]
            ),
            preservation_policy=kept.PreserveAll() if keep is None else kept.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def folder(self) -> Path:
        return Path(self._checkpointer.directory)

    def path(self, step: int) -> Path:
        return self.folder / str(step)

    def steps(self) -> list[int]:
        """Those that are whole, in order: what the disk has, not what was asked for."""
        self._checkpointer.wait()
        self._checkpointer.reload()
        found = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        # One that was about to be deleted when the run was killed may lack its description.
        return [step for step in found if is_written(self.path(step))]

    def is_due(self, step: int) -> bool:
        return self._checkpointer.should_save(step)

    def write(self, step: int, arrays: Mapping[str, Any], text: str) -> None:
        """Starts to write; what goes wrong is raised by the next call."""
        payload, metadata = _payload(arrays, text)
        self._checkpointer.save_checkpointables_async(
            step, payload, force=True, custom_metadata=metadata
        )

    def delete(self, step: int) -> None:
        self._checkpointer.delete(step)

    def wait(self) -> None:
        self._checkpointer.wait()

    def close(self) -> None:
        self._checkpointer.close()
