"""Cerebras' ``.mdl`` in format 0.5: the tree and the kinds of its leaves as JSON in attributes."""

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from cerebras_jax.formats import hdf5
from cerebras_jax.formats.mdl_tree import (
    PickledObject,
    Spec,
    as_array,
    as_dtype,
    constant,
    make_spec,
    storable,
)

_METADATA = "__metadata__"
_RTFX_DTYPES = {
    "bool": 1, "int16": 3, "int32": 4, "int64": 5, "uint8": 6, "uint16": 7, "uint32": 8,
    "uint64": 9, "float16": 10, "float32": 11, "float64": 12, "bfloat16": 15,
}  # fmt: skip


class Reader(hdf5.Source):
    def spec(self) -> Spec | None:
        if not self.file.attrs.get("__SUCCESS__"):
            raise ValueError("its writer did not finish")
        _, text = json.loads(self.file.attrs["__spec__"])
        return self.node(json.loads(text)[1])

    def node(self, node: Mapping[str, Any]) -> Spec | None:
        context = node["context"]
        keys = None if context is None else json.loads(context)
        children = [self.node(child) for child in node["children_spec"]]
        return make_spec(node["type"], keys, children)

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
                return as_dtype(
                    self.array(key, self.dataset(key)), _torch_dtype(metadata["dtypes"][0])
                )
            case "NumpyArraySerializer":
                array = self.array(key, self.dataset(key))
                is_bfloat16 = metadata.get("is_bfloat16")
                return as_dtype(array, _torch_dtype("bfloat16") if is_bfloat16 else array.dtype)
            case "ScalarSerializer":
                return metadata["scalar_value"]
            case "StringSerializer":
                return str(metadata["string_value"])
            case "NoneSerializer":
                return None
            case "ObjectSerializer":
                return PickledObject()
            case "DeferredFullTensor":
                dtype = _torch_dtype(metadata["dtype"])
                return constant(metadata["shape"], metadata["fill_value"], dtype)
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


def write(sink: hdf5.Sink, spec: Spec | None, leaves: Mapping[str, Any]) -> None:
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
            array = as_array(key, leaf)
            name = array.dtype.name
            if name not in _RTFX_DTYPES:
                raise TypeError(f"{key}: the format has no arrays of {name}")
            metadata = {
                "__TYPE__": "TorchTensorSerializer", "__TORCH__": True, "__NUMPY__": True,
                "compressed": False, "shapes": [list(array.shape)],
                "dtypes": [f"torch.{name}"], "rtfx_dtypes": [_RTFX_DTYPES[name]],
            }  # fmt: skip
            sink.attributes(sink.dataset(key, storable(array)), **metadata)
        itself = _treespec_text(Spec("dict", [key], [None]))
        about = {
            "__spec__": [{key: "*"}, itself],
            "__objects__": [key],
            f"{key}.{_METADATA}": metadata,
        }
        sink.attributes(sink.file.id, **{f"{key}.{_METADATA}": json.dumps(about)})
    sink.attributes(sink.file.id, __SUCCESS__=True)


def _treespec_text(spec: Spec | None) -> str:
    """torch's own JSON of a tree spec."""

    def node(spec: Spec | None) -> dict[str, Any]:
        if spec is None:
            return {"type": None, "context": None, "children_spec": []}
        children = [node(child) for child in spec.children]
        context = json.dumps(spec.keys)
        return {"type": f"builtins.{spec.kind}", "context": context, "children_spec": children}

    return json.dumps([1, node(spec)])
