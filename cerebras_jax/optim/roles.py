"""What parameters are in a network: hidden matrices, embeddings and heads, vectors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from flax import nnx

from cerebras_jax.optim.selection import module_of
from cerebras_jax.optim.sources import make_source

OUTER_NAMES = re.compile(r".*embed.*|wte|wpe|(lm_?)?head|logits?", re.IGNORECASE)
"""Path components of embeddings and output layers."""

_NORM_NAMES = re.compile(r".*norm.*|(ln|bn|gn)([_\d].*)?", re.IGNORECASE)
_VECTOR_NAMES = {"bias", "scale"}


class Role(NamedTuple):
    """A parameter's place in a network.

    Attributes:
      kind: "hidden": a matrix between layers; "outer": of an embedding or output layer, or a
        depthwise convolution, whose matrices are columns; "vector": a bias, a scale or a scalar,
        stacked or not; "unknown": an array of rank > 2 whose axes nothing tells.
      axes: one letter per axis of a matrix (see `Layout`); None if they are not known.
      split: how many matrices stand side by side along the outputs.
    """

    kind: str
    axes: str | None = None
    split: int = 1


def has_outer_name(name: str) -> bool:
    """Whether a dotted path names an embedding or an output layer."""
    return any(OUTER_NAMES.fullmatch(part) for part in name.split("."))


def shapes_of(params: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by dotted name."""
    source, values = make_source(params)
    return {name: tuple(v.shape) for name, v in zip(source.names, values, strict=True)}


def roles(params: Any, matrix_axes: str = "io") -> dict[str, Role]:
    """The role of every parameter: in a module by the types of its layers, else by name and rank.

    Args:
      params: a tree of arrays or of shapes, or an nnx.Module.
      matrix_axes: letters of the arrays of rank 2 that no layer's type explains.
    """
    layers = _layers(params)
    return {
        name: _role(name, shape, layers.get(name.rpartition(".")[0]), matrix_axes)
        for name, shape in shapes_of(params).items()
    }


def _layers(params: Any) -> dict[str, nnx.Module]:
    module = module_of(params)
    if module is None:
        return {}
    return {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Module)
    }


def _role(name: str, shape: Sequence[int], layer: nnx.Module | None, matrix_axes: str) -> Role:
    *parents, last = name.split(".")
    is_norm = bool(parents) and bool(_NORM_NAMES.fullmatch(parents[-1]))
    if len(shape) < 2 or last in _VECTOR_NAMES or is_norm:
        return Role("vector")
    kind = "outer" if has_outer_name(name) else "hidden"
    known = _layer_role(last, layer)
    if known is not None:
        role, own_shape = known
        stacked = len(shape) - len(own_shape)
        if stacked >= 0 and tuple(shape[stacked:]) == own_shape:
            kind = kind if role.kind == "hidden" else role.kind
            return role._replace(kind=kind, axes="b" * stacked + (role.axes or ""))
    elif len(shape) == len(matrix_axes):
        return Role(kind, matrix_axes)
    return Role("outer" if kind == "outer" else "unknown")


def _layer_role(last: str, layer: nnx.Module | None) -> tuple[Role, tuple[int, ...]] | None:
    """The role and the shape that a layer's type gives to its array; None if it does not."""
    match layer, last:
        case nnx.Linear(), "kernel":
            return Role("hidden", "io"), (layer.in_features, layer.out_features)
        case nnx.LinearGeneral(), "kernel":
            batch, inputs, outputs = (
                layer.batch_axis.values(),
                layer.in_features,
                layer.out_features,
            )
            axes = "b" * len(batch) + "i" * len(inputs) + "o" * len(outputs)
            return Role("hidden", axes), (*batch, *inputs, *outputs)
        case nnx.Conv(), "kernel":
            shape, groups = tuple(layer.kernel_shape), layer.feature_group_count
            is_depthwise = groups > 1 and shape[-2] == 1
            axes = "i" * (len(shape) - 1) + "o"
            return Role("outer" if is_depthwise else "hidden", axes, groups), shape
        case nnx.ConvTranspose(), "kernel":
            axes = "i" * (len(layer.kernel_shape) - 2) + ("oi" if layer.transpose_kernel else "io")
            return Role("hidden", axes), tuple(layer.kernel_shape)
        case nnx.Einsum(), "kernel" if layer.einsum_str:
            return Role("hidden", _einsum_axes(layer.einsum_str)), tuple(layer.kernel_shape)
        case nnx.Embed(), "embedding":
            return Role("outer", "io"), (layer.num_embeddings, layer.features)
    return None


def _einsum_axes(equation: str) -> str:
    """Letters of the kernel, the second operand: reduced, output, or in both and so stacking."""
    operands, result = equation.replace(" ", "").split("->")
    given, kernel = operands.split(",")
    return "".join("i" if a not in result else "b" if a in given else "o" for a in kernel)
