"""One checkpoint: saved, restored, looked at."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from cerebras_jax.checkpoint import store
from cerebras_jax.checkpoint.leaves import Extra, Hyper, Missing
from cerebras_jax.checkpoint.reading import (
    PathLike,
    Rename,
    Restored,
    fetch,
    options_of,
    read_about,
    restore_objects,
    target_of,
)
from cerebras_jax.checkpoint.writing import packed
from cerebras_jax.messages import with_few_digits

CHECKPOINTS = "checkpoints"
"""The folder of a run that its checkpoints are in."""


def save(
    path: PathLike,
    *,
    step: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
    context: Any = None,
    **objects: Any,
) -> None:
    """Saves objects into one checkpoint, a folder; returns when it is on disk.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from cerebras_jax import optim
    >>> opt = optim.AdamW({"w": jnp.array([1.0, 2.0])}, lr=0.1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/best", opt=opt, key=jax.random.key(0))
    ...     opt.step({"w": jnp.array([1.0, 1.0])})
    ...     found = restore(f"{folder}/best", opt=opt, key=jax.random.key(1))
    >>> opt.params["w"], found["key"] == jax.random.key(0)
    (Array([1., 2.], dtype=float32), Array(True, dtype=bool))

    Args:
      path: a folder that does not exist yet.
      step: a number to remember.
      overwrite: first delete a checkpoint that is there.
      verify: whether a fingerprint of every array is stored, which `restore` compares.
      context: an ``orbax.checkpoint.v1.Context``, for limits of memory and other options.
      **objects: by names of your own; see `Checkpoints`.

    Raises:
      TypeError: names the path of what cannot be stored.
      ValueError: if the folder exists.
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; overwrite=True deletes it first")
    arrays, text = packed(step, objects, verify)
    store.write(path, arrays, text, context or store.default_context(), overwrite)


def restore(
    path: PathLike,
    *,
    hyper: Hyper = "saved",
    missing: Missing = "error",
    extra: Extra = "error",
    rename: Rename | None = None,
    verify: bool = True,
    context: Any = None,
    **objects: Any,
) -> Restored:
    """Restores objects from one checkpoint; all of them or, on an error, none.

    Optimizers, schedulers, modules, averages, iterators and whatever else can change is changed in
    place; trees, arrays and keys come back in the result. In trees, shapes (``jax.eval_shape``)
    may stand for arrays; arrays come back in the dtypes and with the shardings that are asked for,
    whatever those were that were saved. What matters are names: of the object, of states, of
    parameters. So clipping and wrappers may be added, groups may be split and joined, and a
    checkpoint of the class form may be restored into the pure form, as
    ``opt={"params": params, "state": state}``, and the other way round.

    Args:
      path: a folder.
      hyper: whose hyper-parameters hold from now on: the ``"saved"`` ones, or ``"mine"``, those
        that the objects have. Schedules are always yours, they are functions.
      missing: what to do where the checkpoint lacks something: an ``"error"``, or keep what is
        there, as ``"init"`` made it.
      extra: what to do where only the checkpoint has something in one of the objects: an
        ``"error"``, or ``"ignore"``. Objects that are not asked for never matter.
      rename: from names of parameters in the checkpoint to yours: a dict, also of the names'
        beginnings (``{"encoder": "net.encoder"}``), or a function.
      verify: whether arrays are compared with the fingerprints that were stored with them.
      context: an ``orbax.checkpoint.v1.Context``.
      **objects: as in `save`.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      CheckpointError: lists all that does not fit, and what can be done about it.
      DamagedError: if something in it is not what was saved.

    Warns:
      UserWarning: once, with every value of yours that the checkpoint's replaced, or should have.
    """
    options = options_of(hyper, missing, extra, rename)
    path = Path(path).absolute()
    return restore_objects(path, objects, options, verify, context or store.default_context())


def latest(path: Path) -> Path:
    """A checkpoint itself, or the latest one of those in a folder or in a run's folder."""
    for folder in (path / CHECKPOINTS, path):
        steps = [x for x in folder.glob("*") if x.name.isdecimal()] if folder.is_dir() else []
        if steps:
            return max(steps, key=lambda x: int(x.name))
    return path


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is, or holds, a checkpoint as `save` writes them."""
    return store.is_written(latest(path))


@dataclasses.dataclass(frozen=True)
class Contents:
    """What is in a checkpoint.

    Attributes:
      step: the number it was saved under.
      versions: of what wrote it.
      arrays: shapes and dtypes by path.
      fingerprints: of the arrays, by path; see `fingerprint`.
      objects: by name, what was written about each.
    """

    path: Path
    step: int | None
    versions: dict[str, str]
    arrays: dict[str, jax.ShapeDtypeStruct]
    fingerprints: dict[str, str]
    objects: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """The size of all arrays."""
        return sum(x.size * x.dtype.itemsize for x in self.arrays.values())

    def __str__(self) -> str:
        lines = [f"{self.path}: step {self.step}, {self.nbytes:,} bytes"]
        lines.append(", ".join(f"{name} {version}" for name, version in self.versions.items()))
        for name, nodes in self.objects.items():
            for path, about in nodes.items():
                title = "/".join(p for p in (name, path) if p)
                lines.append(f"{title}: {about.get('rule') or about.get('class') or 'arrays'}")
                for group in about.get("groups", ()):
                    values = ", ".join(
                        f"{k}={with_few_digits(_plain(v))}" for k, v in group["values"].items()
                    )
                    lines.append(f"  {len(group['params'])} parameters: {values}")
        for path, x in self.arrays.items():
            lines.append(f"  {path}: {x.dtype}{list(x.shape)} {self.fingerprints.get(path, '')}")
        return "\n".join(lines)


def inspect(path: PathLike, *, verify: bool = False) -> Contents:
    """What is in a checkpoint, without the objects that it was made of; ``print`` it.

    Args:
      path: one checkpoint.
      verify: read all arrays, and compare them with their fingerprints.

    Raises:
      FileNotFoundError, CheckpointError, DamagedError: as `restore`.
    """
    path = Path(path).absolute()
    about = read_about(path)
    stored = {name: target_of(entry) for name, entry in about["arrays"].items()}
    if verify:
        fetch(path, about, {name: {name: target} for name, target in stored.items()}, True)
    return Contents(
        path,
        about["step"],
        about["versions"],
        {name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in stored.items()},
        {name: e["fingerprint"] for name, e in about["arrays"].items() if "fingerprint" in e},
        about["objects"],
    )


def _plain(packed: Any) -> Any:
    return next(iter(packed.values())) if isinstance(packed, dict) and len(packed) == 1 else packed
