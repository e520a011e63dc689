"""torch's ``.pt`` files, in: without torch, and nothing in them is run; out: with torch.

Three containers are read: the zip file of ``torch.save``, its older form, and plain pickles. The
arrays of a zip file are views of the mapped file.

References:
  torch.save, https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

import dataclasses
import functools
import io
import math
import mmap
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from cerebras_jax.formats import dialects, inert, records
from cerebras_jax.formats.files import written_whole
from cerebras_jax.formats.matching import Names
from cerebras_jax.formats.run import Run
from cerebras_jax.messages import shown

# What other programs call the parts of a checkpoint.
_PARTS = {
    "model": ("model", "model_state_dict", "state_dict", "module"),
    "optimizer": ("optimizer", "optimizer_state_dict", "optim", "optimizer_states"),
    "schedulers": (
        "lr_scheduler", "lr_scheduler_state_dict", "scheduler", "scheduler_state_dict",
        "schedulers", "lr_schedulers",
    ),
    "step": ("global_step", "step", "iteration"),
}  # fmt: skip


def read(path: str | Path, names: Names | None = None) -> Run:
    """A run from a torch file: a model's or an optimizer's state dict, or a checkpoint of both.

    Args:
      path: the file.
      names: the parameters' names; needed where the optimizer's entries cannot be told apart, see
        `Run.of`.

    Raises:
      ValueError: if the file is damaged, holds nothing of the kind, or names cannot be told.
    """
    tree, unread = load(path)
    return run_of(tree, unread, names, str(path))


def run_of(tree: Any, unread: list[str], names: Names | None, path: str) -> Run:
    """The run in the contents of a torch file."""
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}, no state dict")
    if _is_optimizer(tree):
        return Run.of(None, tree, names=names, unread=unread)
    if "last_epoch" in tree:
        return Run.of(schedulers=[tree], step=tree["last_epoch"], unread=unread)
    if tree and all(isinstance(v, np.ndarray) for v in tree.values()):
        return Run.of(_params(tree, path), unread=unread)
    found = {part: next((n for n in _PARTS[part] if n in tree), None) for part in _PARTS}
    if found["model"] is None and found["optimizer"] is None:
        raise ValueError(f"{path} has neither a model nor an optimizer, but {shown([*tree])}")
    part = {k: tree[n] if n is not None else None for k, n in found.items()}
    optimizer, schedulers = part["optimizer"], part["schedulers"] or []
    if isinstance(optimizer, list):
        if len(optimizer) != 1:
            raise ValueError(f"{path} has {len(optimizer)} optimizers, expected 1")
        optimizer = optimizer[0]
    return Run.of(
        None if part["model"] is None else _params(part["model"], path),
        optimizer,
        schedulers if isinstance(schedulers, list) else [schedulers],
        part["step"],
        names=names,
        unread=unread,
        extra={k: v for k, v in tree.items() if k not in found.values()},
    )


def _is_optimizer(tree: Any) -> bool:
    return isinstance(tree, dict) and {"state", "param_groups"} <= set(tree)


def _params(tree: Any, path: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: the model is a {type(tree).__name__}, no state dict")
    return {k: v for k, v in tree.items() if isinstance(v, np.ndarray)}


def write(path: str | Path, run: Run, names: Names | None = None) -> None:
    """A torch file of a run: its weights, its optimizer's state dict, or all of it.

    With both, the file holds a dict of ``model``, ``optimizer``, ``lr_scheduler``, ``global_step``
    and what is in ``run.extra``.

    Args:
      path: the file to write; it appears when it is whole.
      run: its optimizer is written as torch's of the same name has it.
      names: see `Run.in_order`.

    Raises:
      ImportError: if torch is not installed.
      ValueError: if the order of the parameters is not known, or the optimizer has a value that
        torch's has not.
    """
    save(path, checkpoint(run.in_order(names)))


def checkpoint(run: Run) -> dict[str, Any]:
    """What `write` saves, with arrays."""
    run = dialects.to_torch(run)
    run.check()
    schedulers = run.schedulers[0] if len(run.schedulers) == 1 else run.schedulers
    if not run.groups:
        return dict(run.params or schedulers)
    optimizer = run.state_dict()
    if not run.params:
        return optimizer
    return {
        "model": run.params,
        "optimizer": optimizer,
        **({"lr_scheduler": schedulers} if schedulers else {}),
        **({} if run.step is None else {"global_step": run.step}),
        **run.extra,
    }


def save(path: str | Path, tree: Any) -> None:
    """``torch.save`` of a tree, its arrays as tensors, whole or not at all."""
    import torch  # pyright: ignore[reportMissingImports]

    with written_whole(path) as temporary, warnings.catch_warnings():
        # Tensors of a mapped file must not be written to; torch.save does not.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        torch.save(_to_tensors(tree), temporary)


def _to_tensors(tree: Any) -> Any:
    """A tree of dicts and lists with torch tensors on the memory of its arrays."""
    import torch  # pyright: ignore[reportMissingImports]

    if isinstance(tree, Mapping):
        return {k: _to_tensors(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_to_tensors(v) for v in tree)
    if not hasattr(tree, "shape") or isinstance(tree, np.generic):
        return tree.item() if isinstance(tree, np.generic) else tree
    array = np.asarray(tree, order="C")
    if array.dtype.name not in _BY_NAME:
        raise TypeError(f"torch has no dtype {array.dtype}")
    if array.dtype.kind in "biufc" and array.dtype.name not in _EXTENDED:
        return torch.from_numpy(array)
    raw = torch.from_numpy(array.view(f"u{array.itemsize}"))
    return raw.view(getattr(torch, array.dtype.name))


# --- the containers ------------------------------------------------------------------------------


def load(path: str | Path) -> tuple[Any, list[str]]:
    """The contents of a torch file or a pickle as plain data with NumPy arrays.

    Returns:
      The tree, and the paths of what is no data and was left out.

    Raises:
      ValueError: if the file is damaged, or was written in an unknown way.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            is_zip = start == b"PK\x03\x04"
            tree = _load_zip(file, mapped) if is_zip else _load_stream(mapped)
            return records.interpret(tree, _MEANINGS)
    except _DAMAGE as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


_DAMAGE = (
    ValueError, TypeError, LookupError, AttributeError, EOFError, OverflowError, RuntimeError,
    MemoryError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    """A persistent id: the bytes that tensors look at."""

    data: Callable[[], Any]
    dtype: Any  # None: the tensor says
    size: int  # elements, as the pickle says


def _load_zip(file: BinaryIO, mapped: mmap.mmap) -> Any:
    archive = zipfile.ZipFile(file)
    members = {info.filename: info for info in archive.infolist()}
    root = next((n for n in members if n.endswith("data.pkl")), None)
    if root is None:
        raise ValueError("a zip file, but not of torch.save: it has no data.pkl")
    folder = root.removesuffix("data.pkl")
    order = members.get(f"{folder}byteorder")
    if order is not None and _member(mapped, order) != b"little":
        raise ValueError("it was written by a big-endian machine")

    @functools.cache
    def content(key: str) -> Any:
        return _member(mapped, members[f"{folder}data/{key}"])

    def storage(pid: Any) -> _Storage:
        kind, storage_type, key, _, size = pid[:5]
        return _Storage(lambda: content(key), _storage_dtype(kind, storage_type), size)

    return inert.load(io.BytesIO(_member(mapped, members[root])), storage)


def _member(mapped: mmap.mmap, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of a member of a zip file, mapped."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(f"{info.filename} is compressed or encrypted; torch.save writes neither")
    header = mapped[info.header_offset : info.header_offset + 30]
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"{info.filename} is not where the file says")
    start = info.header_offset + 30 + sum(np.frombuffer(header, "<u2", 2, 26).tolist())
    data = memoryview(mapped)[start : start + info.file_size]
    if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
        raise zipfile.BadZipFile(f"{info.filename} is not what was written")
    return data


_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001


def _load_stream(file: mmap.mmap) -> Any:
    """The container before torch 1.6, in which the bytes follow the pickles; or a plain pickle."""
    first = inert.load(file)
    if first != _MAGIC:
        return first
    version, system = inert.load(file), inert.load(file)
    if version != _VERSION or not system.get("little_endian", True):
        raise ValueError(f"torch's old form in version {version}, or of a big-endian machine")
    types: dict[str, Any] = {}
    contents: dict[str, Any] = {}

    def storage(pid: Any) -> _Storage:
        kind, storage_type, key, _, size, view = pid
        if view is not None:
            raise ValueError("views of storages, as torch before 0.4 wrote them, are not read")
        types[key] = dtype = _storage_dtype(kind, storage_type)
        return _Storage(lambda: contents[key], dtype, size)

    tree = inert.load(file, storage)
    for key in inert.load(file):
        item = 1 if types[key] is None else np.dtype(types[key]).itemsize
        size = int.from_bytes(file.read(8), "little") * item
        start = file.tell()
        contents[key] = memoryview(file)[start : start + size]
        if len(contents[key]) != size:
            raise ValueError(f"it ends inside of storage {key}")
        file.seek(start + size)
    return tree


# --- tensors -------------------------------------------------------------------------------------

_STORAGES = {
    "Float": np.float32, "Double": np.float64, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8,
    "Bool": np.bool_, "ComplexFloat": np.complex64, "ComplexDouble": np.complex128, "Untyped": None,
}  # fmt: skip
_EXTENDED = (
    "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
)  # fmt: skip
_BY_NAME = {np.dtype(t).name: np.dtype(t) for t in _STORAGES.values() if t is not None}
_BY_NAME |= {name: np.dtype(name) for name in ("uint16", "uint32", "uint64")}
_BY_NAME |= {name: np.dtype(getattr(ml_dtypes, name)) for name in _EXTENDED}


def _storage_dtype(kind: Any, storage_type: Any) -> Any:
    if kind != "storage" or not isinstance(storage_type, inert.Global):
        raise ValueError(f"a persistent id of kind {kind!r}")
    name = storage_type.name.rpartition(".")[2].removesuffix("Storage")
    if name not in _STORAGES:
        raise ValueError(f"storages of type {storage_type.name} are not supported")
    return _STORAGES[name]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None) -> Any:
    """A view of a storage, refused if it reaches beyond."""
    numbers = (storage.size, offset, *shape, *strides)
    if not all(type(n) is int and 0 <= n < 2**62 for n in numbers) or len(shape) != len(strides):
        raise ValueError(f"no tensor has offset {offset}, shape {shape} and strides {strides}")
    data = storage.data()
    size = storage.size * (1 if storage.dtype is None else np.dtype(storage.dtype).itemsize)
    if len(data) != size:
        raise ValueError(f"a storage has {len(data)} bytes, its tensors expect {size}")
    dtype = np.dtype(storage.dtype if dtype is None else dtype)
    reach = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    if reach * dtype.itemsize > size:
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage of {size} bytes")
    start, steps = offset * dtype.itemsize, [s * dtype.itemsize for s in strides]
    return np.ndarray(shape, dtype, data, start, steps)


def _rebuild_tensor(record: inert.Record) -> Any:
    return _tensor(*record.args[:4])


def _rebuild_tensor_v3(record: inert.Record) -> Any:
    storage, offset, shape, strides, _, _, dtype, *_ = record.args
    name = dtype.name.removeprefix("torch.")
    return _tensor(storage, offset, shape, strides, _BY_NAME[name])


def _first_argument(record: inert.Record) -> Any:
    return record.args[0]


def _from_type(record: inert.Record) -> Any:
    """A tensor of a subclass, or with attributes: the tensor in it."""
    function, _, args, _ = record.args
    inner = inert.Record(function.name, tuple(args))
    return _MEANINGS[function.name](inner) if function.name in _MEANINGS else records.LEFT


_MEANINGS: records.Meanings = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _first_argument,
    "torch._utils._rebuild_parameter_with_state": _first_argument,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": lambda record: tuple(record.args[0]),
    "torch.device": lambda record: ":".join(map(str, record.args)),
}
