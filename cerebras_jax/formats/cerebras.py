"""Cerebras' ``.mdl`` checkpoints: HDF5, in the formats 0.4 (releases 2.0 to 2.4) and 0.5 (2.5 on).

A checkpoint is a tree of dicts and lists whose leaves are HDF5 datasets, named by their paths. The
tree itself is an attribute: in 0.4 a pickle, read by `inert`, in 0.5 JSON. Nothing in a file is
run, and no other file is opened: pickled objects are left out, links to elsewhere refused.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from cerebras_jax.formats import dialects, hdf5, mdl_04, mdl_05, mdl_tree
from cerebras_jax.formats.files import written_whole
from cerebras_jax.formats.matching import Names
from cerebras_jax.formats.run import Run

_FORMATS = {"0.4": mdl_04, "0.5": mdl_05}
VERSIONS = tuple(_FORMATS)
_DAMAGE = (
    ValueError, TypeError, LookupError, AttributeError, OSError, RuntimeError, ArithmeticError,
    MemoryError,
)  # fmt: skip


def read(path: str | Path, names: Names | None = None) -> Run:
    """A run from a checkpoint of either format.

    Args:
      path: the file.
      names: the parameters' names; needed where the optimizer's entries cannot be told apart, see
        `Run.of`.

    Raises:
      ImportError: if h5py or hdf5plugin is missing.
      ValueError: if the file is unfinished or damaged, refers to other files, or names cannot be
        told.
    """
    tree, unread = load(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}, expected a dict")
    schedulers = tree.get("schedulers", tree.get("lr_scheduler")) or []
    step = tree.get("global_step")
    known = ("model", "optimizer", "schedulers", "lr_scheduler", "global_step")
    run = Run.of(
        tree.get("model"),
        tree.get("optimizer"),
        schedulers if isinstance(schedulers, list) else [schedulers],
        step,
        names=names,
        unread=unread,
        extra={k: v for k, v in tree.items() if k not in known},
    )
    run.groups = [dialects.with_flags(group) for group in run.groups]
    return run


def write(path: str | Path, run: Run, names: Names | None = None, version: str = "0.5") -> None:
    """A checkpoint of a run.

    Args:
      path: the file to write; it appears when it is whole.
      run: its optimizer is written as Cerebras' of the same name has it.
      names: see `Run.in_order`.
      version: ``"0.5"``, or ``"0.4"``, which the newer releases read too.

    Raises:
      ImportError: if h5py or hdf5plugin is missing.
      ValueError: if the order of the parameters is not known, or the optimizer has a value that
        Cerebras' has not.
      TypeError: if a leaf is neither an array, a number, a string nor None.
    """
    run = dialects.to_cerebras(run.in_order(names))
    run.check()
    tree: dict[str, Any] = {"model": run.params}
    if run.groups:
        tree["optimizer"] = run.state_dict()
    if run.schedulers:
        one = version == "0.4" and len(run.schedulers) == 1
        tree |= {"lr_scheduler": run.schedulers[0]} if one else {"schedulers": run.schedulers}
    if run.step is not None:
        tree["global_step"] = run.step
    save(path, {**tree, **run.extra}, version)


def load(path: str | Path) -> tuple[Any, list[str]]:
    """The contents of a checkpoint as plain data with NumPy arrays.

    Returns:
      The tree, and the paths of pickled objects, which were left out.

    Raises:
      ValueError: see `read`.
    """
    h5py = hdf5.import_h5py()
    try:
        with h5py.File(path, "r") as file:
            version = str(file.attrs.get("__version__"))
            if version not in VERSIONS:
                raise ValueError(f"its format is {version}, known are {', '.join(VERSIONS)}")
            form = _FORMATS[version].Reader(h5py, file)
            spec = form.spec()
            keys = list(mdl_tree.leaf_paths(spec))
            if len(set(keys)) < len(keys):
                raise ValueError("two leaves have the same path")
            tree = mdl_tree.join(spec, map(form.leaf, keys))
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    unread: list[str] = []
    return mdl_tree.without_objects(tree, "", unread), unread


def save(path: str | Path, tree: Any, version: str = "0.5") -> None:
    """A checkpoint of a tree of dicts, lists, tuples and sets; whole or not at all.

    Format 0.4 has no sets, they become lists.

    Raises:
      TypeError: if a leaf is neither an array, a number, a string nor None.
      ValueError: if two leaves have the same path.
    """
    h5py = hdf5.import_h5py()
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
    leaves: list[Any] = []
    spec = mdl_tree.split(tree, leaves)
    keys = list(mdl_tree.leaf_paths(spec))
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(f"several leaves have the path {twice[0]!r}")
    # Thousands of attributes are slow in the oldest form of HDF5, which is the default.
    with written_whole(path) as temporary, h5py.File(temporary, "w", libver=("v110",) * 2) as file:
        _FORMATS[version].write(hdf5.Sink(h5py, file), spec, dict(zip(keys, leaves, strict=True)))
