"""Cerebras' ``.mdl`` checkpoints: HDF5, in the formats 0.4 (releases 2.0 to 2.4) and 0.5 (2.5 on).

A checkpoint is a tree of dicts and lists whose leaves are HDF5 datasets, named by their paths. The
tree itself is an attribute: in 0.4 a pickle, read by `inert`, in 0.5 JSON. Nothing in a file is
run, and no other file is opened: pickled objects are left out, links to elsewhere refused.
"""

import io
import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import ml_dtypes
import numpy as np

from cerebras_jax.formats import dialects, hdf5, inert
from cerebras_jax.formats.files import written_whole
from cerebras_jax.formats.matching import Names
from cerebras_jax.formats.run import Run

VERSIONS = ("0.4", "0.5")


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
    optimizer = tree.get("optimizer")
    if optimizer is not None:
        groups = [dialects.with_flags(group) for group in optimizer["param_groups"]]
        optimizer = {**optimizer, "param_groups": groups}
    return Run.of(
        tree.get("model"),
        optimizer,
        schedulers if isinstance(schedulers, list) else [schedulers],
        None if step is None else int(step),
        names=names,
        unread=unread,
        extra={k: v for k, v in tree.items() if k not in known},
    )


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
            form = _Old(h5py, file) if version == "0.4" else _New(h5py, file)
            spec = form.spec()
            keys = list(_keys(spec))
            if len(set(keys)) < len(keys):
                raise ValueError("two leaves have the same path")
            tree = _join(spec, map(form.leaf, keys))
    except FileNotFoundError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    unread: list[str] = []
    return _without_objects(tree, "", unread), unread


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
    spec = _split(tree, leaves)
    keys = list(_keys(spec))
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(f"several leaves have the path {twice[0]!r}")
    # Thousands of attributes are slow in the oldest form of HDF5, which is the default.
    with written_whole(path) as temporary, h5py.File(temporary, "w", libver=("v110",) * 2) as file:
        write = _write_04 if version == "0.4" else _write_05
        write(hdf5.Sink(h5py, file), spec, dict(zip(keys, leaves, strict=True)))


# --- the tree ------------------------------------------------------------------------------------

_MAPPINGS = ("dict", "OrderedDict", "defaultdict", "TensorScalarDict")
_SEQUENCES = {"list": list, "tuple": tuple, "set": set}


class _Spec(NamedTuple):
    """A node of the tree, with None for leaves: what it is, a mapping's keys, what is in it."""

    kind: str
    keys: list | None
    children: list[Any]


def _keys(spec: _Spec | None, path: str = "") -> Iterator[str]:
    """The paths of all leaves, in order."""
    if spec is None:
        yield path
        return
    for key, child in zip(_names(spec), spec.children, strict=True):
        yield from _keys(child, f"{path}.{key}" if path else f"{key}")


def _names(spec: _Spec) -> Sequence[Any]:
    return range(len(spec.children)) if spec.keys is None else spec.keys


def _join(spec: _Spec | None, leaves: Iterator[Any]) -> Any:
    if spec is None:
        return next(leaves)
    children = [_join(child, leaves) for child in spec.children]
    if spec.kind in _MAPPINGS:
        return dict(zip(_names(spec), children, strict=True))
    return _SEQUENCES[spec.kind](children)


def _split(tree: Any, leaves: list[Any]) -> _Spec | None:
    """The spec of a tree; its leaves are appended to ``leaves``."""
    if isinstance(tree, Mapping):
        return _Spec("dict", list(tree), [_split(v, leaves) for v in tree.values()])
    if isinstance(tree, set | frozenset):
        return _Spec("set", None, [_split(v, leaves) for v in sorted(tree, key=repr)])
    if isinstance(tree, list | tuple):
        kind = "list" if isinstance(tree, list) else "tuple"
        return _Spec(kind, None, [_split(v, leaves) for v in tree])
    leaves.append(tree)
    return None


def _make_spec(kind: Any, keys: Any, children: list[Any]) -> _Spec | None:
    """A node as a file describes it, checked."""
    if kind is None:
        return None
    name = str(kind).rpartition(".")[2].removesuffix("Type").replace("Dict", "dict", 1)
    name = {"Ordereddict": "OrderedDict", "Tuple": "tuple", "List": "list"}.get(name, name)
    if name not in _MAPPINGS and name not in _SEQUENCES:
        raise ValueError(f"the tree has a node of the unknown kind {kind}")
    if name in _MAPPINGS and len(keys) != len(children):
        raise ValueError(f"a mapping has {len(keys)} keys and {len(children)} values")
    return _Spec(name, list(keys) if name in _MAPPINGS else None, children)


class _Object:
    """Stands for a pickled object, which is not read."""


def _without_objects(tree: Any, path: str, left: list[str]) -> Any:
    below = f"{path}." if path else ""
    if isinstance(tree, _Object):
        left.append(path)
        return None
    if isinstance(tree, dict):
        values = {k: _without_objects(v, f"{below}{k}", left) for k, v in tree.items()}
        return {k: v for k, v in values.items() if not isinstance(tree[k], _Object)}
    if isinstance(tree, list | tuple):
        return type(tree)(_without_objects(v, f"{below}{i}", left) for i, v in enumerate(tree))
    return tree


# --- arrays --------------------------------------------------------------------------------------


def _as_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in the dtype that it stands for: HDF5 has no bfloat16, but its bits."""
    if dtype.name == "bfloat16" and array.itemsize == 2:
        return array.view(dtype)
    return array if array.dtype == dtype else array.astype(dtype)


def _storable(array: np.ndarray) -> np.ndarray:
    return array.view(np.int16) if array.dtype == ml_dtypes.bfloat16 else array


def _constant(shape: Any, value: Any, dtype: np.dtype) -> np.ndarray:
    """A constant of any size in the memory of one number."""
    if value is None:
        raise ValueError("a constant without a value")
    return np.broadcast_to(np.array(value).astype(dtype), tuple(map(int, shape)))


def _as_array(key: str, leaf: Any) -> np.ndarray:
    if not hasattr(leaf, "shape"):
        raise TypeError(
            f"{key}: a {type(leaf).__name__} cannot be written, only arrays, numbers, "
            "strings and None"
        )
    return np.asarray(leaf)


# --- format 0.4 ----------------------------------------------------------------------------------


class _Old(hdf5.Source):
    def spec(self) -> _Spec | None:
        root = inert.load(io.BytesIO(bytes.fromhex(self.file.attrs["__spec__"])))
        spec, unread = inert.interpret(root, _TREESPEC)
        if unread or not isinstance(spec, _Spec | None):
            raise ValueError("its __spec__ is no tree spec")
        return spec

    def leaf(self, key: str) -> Any:
        name = quote(key, safe="")
        dataset = self.dataset(name)
        attrs = dataset.attrs
        kind = attrs["__H5_TYPE__"]
        dtype = np.dtype(ml_dtypes.bfloat16) if attrs.get("is_bfloat16") else dataset.dtype
        match kind:
            case "TorchTensorH5Type" | "NumpyArrayH5Type":
                return _as_dtype(self.array(name, dataset), dtype)
            case "ScalarH5Type":
                return self.array(name, dataset).item()
            case "StringH5Type":
                return str(attrs["string_value"])
            case "NoneH5Type":
                return None
            case "ObjectH5Type":
                return _Object()
            case "FullTensorH5Type" | "DeferredFullTensor":
                return _constant(attrs["shape"], attrs["fill_value"], dtype)
            case "DeferredH5Tensor" if attrs.get("link_to_self"):
                target = self.dataset(str(attrs["key"]))
                is_bfloat16 = target.attrs.get("is_bfloat16")
                dtype = np.dtype(ml_dtypes.bfloat16) if is_bfloat16 else target.dtype
                return _as_dtype(self.array(name, target), dtype)
        raise ValueError(f"{key!r} is of kind {kind}, which refers to other files or to programs")


def _treespec(record: inert.Record) -> _Spec | None:
    """torch's TreeSpec: a constructor's call, or the fields as a dict, or as a list in order."""
    state = record.state
    if isinstance(state, tuple):
        state = next((part for part in state if part), None)
    if isinstance(state, dict):
        kind, keys, children = (state[k] for k in ("type", "context", "children_specs"))
    else:
        kind, keys, children = (state or record.args)[:3]
    if isinstance(kind, inert.Global):
        kind = kind.name
    return _make_spec(kind, keys, children)


_TREESPEC: inert.Meanings = {
    "torch.utils._pytree.TreeSpec": _treespec,
    "torch.utils._pytree.LeafSpec": lambda record: None,
    "dill._dill._load_type": lambda record: str(record.args[0]),
}


def _write_04(sink: hdf5.Sink, spec: _Spec | None, leaves: Mapping[str, Any]) -> None:
    sink.attributes(sink.file.id, __spec__=_pickled(spec).hex(), __version__=0.4)
    for key, leaf in leaves.items():
        name = quote(key, safe="")
        if leaf is None:
            sink.attributes(sink.dataset(name, None), __H5_TYPE__="NoneH5Type")
        elif isinstance(leaf, str):
            kind = "StringH5Type"
            sink.attributes(sink.dataset(name, None), __H5_TYPE__=kind, string_value=leaf)
        elif isinstance(leaf, bool | int | float):
            sink.attributes(sink.dataset(name, np.asarray(leaf)), __H5_TYPE__="ScalarH5Type")
        else:
            array = _as_array(key, leaf)
            sink.attributes(
                sink.dataset(name, _storable(array)),
                __H5_TYPE__="TorchTensorH5Type",
                is_bfloat16=array.dtype == ml_dtypes.bfloat16,
            )


def _pickled(spec: _Spec | None) -> bytes:
    """A pickle of the tree as torch's TreeSpec, in instructions: torch itself is not needed.

    A call of the constructor is understood by every release of torch; its fields are not.
    """
    known: dict[Any, bytes] = {}

    def once(code: bytes) -> bytes:
        """The code where it is first needed, its result from the memo from then on."""
        if code not in known:
            known[code] = b"j" + struct.pack("<I", len(known))
            return code + b"r" + known[code][1:]
        return known[code]

    def name(module: str, name: str) -> bytes:
        return once(f"c{module}\n{name}\n".encode())

    def key(value: Any) -> bytes:
        if isinstance(value, str):
            data = value.encode()
            return once(b"X" + struct.pack("<I", len(data)) + data)
        if type(value) is int:
            return f"L{value}L\n".encode()
        raise TypeError(f"the key {value!r} is neither a string nor an int")

    def node(spec: _Spec | None) -> bytes:
        if spec is None:
            return name("torch.utils._pytree", "LeafSpec") + b")R"
        kind = "list" if spec.kind == "set" else spec.kind
        keys = b"N" if spec.keys is None else b"](" + b"".join(map(key, spec.keys)) + b"e"
        parts = [
            name("torch.utils._pytree", "TreeSpec"),
            b"(",
            name("builtins", kind),
            keys,
            b"](",
            *map(node, spec.children),
            b"etR",
        ]
        return b"".join(parts)

    return b"\x80\x04" + node(spec) + b"."


# --- format 0.5 ----------------------------------------------------------------------------------

_METADATA = "__metadata__"
_RTFX_DTYPES = {
    "bool": 1, "int16": 3, "int32": 4, "int64": 5, "uint8": 6, "uint16": 7, "uint32": 8,
    "uint64": 9, "float16": 10, "float32": 11, "float64": 12, "bfloat16": 15,
}  # fmt: skip


class _New(hdf5.Source):
    def spec(self) -> _Spec | None:
        if not self.file.attrs.get("__SUCCESS__"):
            raise ValueError("its writer did not finish")
        _, text = json.loads(self.file.attrs["__spec__"])
        return self.node(json.loads(text)[1])

    def node(self, node: Mapping[str, Any]) -> _Spec | None:
        context = node["context"]
        keys = None if context is None else json.loads(context)
        children = [self.node(child) for child in node["children_spec"]]
        return _make_spec(node["type"], keys, children)

    def metadata(self, key: str) -> Mapping[str, Any]:
        every = json.loads(self.file.attrs[f"{key}.{_METADATA}"])
        if every["__objects__"] != [key]:
            raise ValueError(f"{key!r} is made of several objects, by a program")
        return every[f"{key}.{_METADATA}"]

    def leaf(self, key: str) -> Any:
        metadata = self.metadata(key)
        if metadata["__TYPE__"] == "LinkedObject":
            metadata, key = self.metadata(metadata["key"]), metadata["key"]
        match metadata["__TYPE__"]:
            case "TorchTensorSerializer":
                return _as_dtype(
                    self.array(key, self.dataset(key)), _torch_dtype(metadata["dtypes"][0])
                )
            case "NumpyArraySerializer":
                array = self.array(key, self.dataset(key))
                is_bfloat16 = metadata.get("is_bfloat16")
                return _as_dtype(array, _torch_dtype("bfloat16") if is_bfloat16 else array.dtype)
            case "ScalarSerializer":
                return metadata["scalar_value"]
            case "StringSerializer":
                return str(metadata["string_value"])
            case "NoneSerializer":
                return None
            case "ObjectSerializer":
                return _Object()
            case "DeferredFullTensor":
                dtype = _torch_dtype(metadata["dtype"])
                return _constant(metadata["shape"], metadata["fill_value"], dtype)
        raise ValueError(
            f"{key!r} is of kind {metadata['__TYPE__']}, which refers to other files or to programs"
        )


def _torch_dtype(name: str) -> np.dtype:
    name = name.removeprefix("torch.")
    if name in ("int8", "complex64", "complex128"):
        return np.dtype(name)
    if name not in _RTFX_DTYPES:
        raise ValueError(f"unknown dtype {name!r}")
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _write_05(sink: hdf5.Sink, spec: _Spec | None, leaves: Mapping[str, Any]) -> None:
    text = json.dumps([None, _treespec_text(spec)])
    sink.attributes(sink.file.id, __spec__=text, __version__=0.5)
    for key, leaf in leaves.items():
        metadata: dict[str, Any] = {"__NONE__": True}
        if leaf is None:
            metadata["__TYPE__"] = "NoneSerializer"
        elif isinstance(leaf, str):
            metadata |= {"__TYPE__": "StringSerializer", "string_value": leaf}
        elif isinstance(leaf, bool | int | float):
            metadata |= {"__TYPE__": "ScalarSerializer", "scalar_value": leaf}
        else:
            array = _as_array(key, leaf)
            name = array.dtype.name
            if name not in _RTFX_DTYPES:
                raise TypeError(f"{key}: the format has no arrays of {name}")
            metadata = {
                "__TYPE__": "TorchTensorSerializer", "__TORCH__": True, "__NUMPY__": True,
                "compressed": False, "shapes": [list(array.shape)],
                "dtypes": [f"torch.{name}"], "rtfx_dtypes": [_RTFX_DTYPES[name]],
            }  # fmt: skip
            sink.attributes(sink.dataset(key, _storable(array)), **metadata)
        itself = _treespec_text(_Spec("dict", [key], [None]))
        about = {
            "__spec__": [{key: "*"}, itself],
            "__objects__": [key],
            f"{key}.{_METADATA}": metadata,
        }
        sink.attributes(sink.file.id, **{f"{key}.{_METADATA}": json.dumps(about)})
    sink.attributes(sink.file.id, __SUCCESS__=True)


def _treespec_text(spec: _Spec | None) -> str:
    """torch's own JSON of a tree spec."""

    def node(spec: _Spec | None) -> dict[str, Any]:
        if spec is None:
            return {"type": None, "context": None, "children_spec": []}
        children = [node(child) for child in spec.children]
        context = json.dumps(spec.keys)
        return {"type": f"builtins.{spec.kind}", "context": context, "children_spec": children}

    return json.dumps([1, node(spec)])
