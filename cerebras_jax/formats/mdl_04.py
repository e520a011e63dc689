"""Cerebras' ``.mdl`` in format 0.4: a pickle of torch's TreeSpec, and attributes of each leaf."""

import io
import struct
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import ml_dtypes
import numpy as np

from cerebras_jax.formats import hdf5, inert, records
from cerebras_jax.formats.mdl_tree import (
    PickledObject,
    Spec,
    as_array,
    as_dtype,
    constant,
    make_spec,
    storable,
)


class Reader(hdf5.Source):
    def spec(self) -> Spec | None:
        root = inert.load(io.BytesIO(bytes.fromhex(self.file.attrs["__spec__"])))
        spec, unread = records.interpret(root, _MEANINGS)
        if unread or not isinstance(spec, Spec | None):
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
                return as_dtype(self.array(name, dataset), dtype)
            case "ScalarH5Type":
                return self.array(name, dataset).item()
            case "StringH5Type":
                return str(attrs["string_value"])
            case "NoneH5Type":
                return None
            case "ObjectH5Type":
                return PickledObject()
            case "FullTensorH5Type" | "DeferredFullTensor":
                return constant(attrs["shape"], attrs["fill_value"], dtype)
            case "DeferredH5Tensor" if attrs.get("link_to_self"):
                target = self.dataset(str(attrs["key"]))
                is_bfloat16 = target.attrs.get("is_bfloat16")
                dtype = np.dtype(ml_dtypes.bfloat16) if is_bfloat16 else target.dtype
                return as_dtype(self.array(name, target), dtype)
        raise ValueError(f"{key!r} is of kind {kind}, which refers to other files or to programs")


def _treespec(record: inert.Record) -> Spec | None:
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
    return make_spec(kind, keys, children)


_MEANINGS: records.Meanings = {
    "torch.utils._pytree.TreeSpec": _treespec,
    "torch.utils._pytree.LeafSpec": lambda record: None,
    "dill._dill._load_type": lambda record: str(record.args[0]),
}


def write(sink: hdf5.Sink, spec: Spec | None, leaves: Mapping[str, Any]) -> None:
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
            array = as_array(key, leaf)
            sink.attributes(
                sink.dataset(name, storable(array)),
                __H5_TYPE__="TorchTensorH5Type",
                is_bfloat16=array.dtype == ml_dtypes.bfloat16,
            )


def _pickled(spec: Spec | None) -> bytes:
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

    def node(spec: Spec | None) -> bytes:
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
