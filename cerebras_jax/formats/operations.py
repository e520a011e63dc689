"""What a name rule does to arrays, and its inverse; also for arrays that are means over an axis."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np

from cerebras_jax.formats.matching import Shape

Arrays: TypeAlias = list[np.ndarray]


class Operation(Protocol):
    """Arrays to arrays. ``reduced`` is an axis that a mean was taken over, of length 1."""

    def __call__(self, arrays: Arrays, reduced: int | None) -> tuple[Arrays, int | None]: ...
    def inverse(self) -> "Operation": ...


@dataclasses.dataclass(frozen=True)
class Transpose:
    axes: tuple[int, ...]

    def __call__(self, arrays: Arrays, reduced: int | None) -> tuple[Arrays, int | None]:
        moved = None if reduced is None else self.axes.index(reduced)
        return [a.transpose(self.axes) for a in arrays], moved

    def inverse(self) -> Operation:
        return Transpose(tuple(np.argsort(self.axes).tolist()))


@dataclasses.dataclass(frozen=True)
class Reshape:
    source: Shape
    target: Shape

    def __call__(self, arrays: Arrays, reduced: int | None) -> tuple[Arrays, int | None]:
        if reduced is not None and self.source != self.target:
            raise ValueError("cannot be reshaped")
        return [a.reshape(self.target) if reduced is None else a for a in arrays], reduced

    def inverse(self) -> Operation:
        return Reshape(self.target, self.source)


@dataclasses.dataclass(frozen=True)
class Stack:
    count: int

    def __call__(self, arrays: Arrays, reduced: int | None) -> tuple[Arrays, int | None]:
        return [np.stack(arrays)], None if reduced is None else reduced + 1

    def inverse(self) -> Operation:
        return Unstack(self.count)


@dataclasses.dataclass(frozen=True)
class Unstack:
    count: int

    def __call__(self, arrays: Arrays, reduced: int | None) -> tuple[Arrays, int | None]:
        if reduced == 0:
            raise ValueError("is a mean over the layers, and cannot be taken apart")
        (array,) = arrays
        if len(array) != self.count:
            raise ValueError(f"has {len(array)} layers, expected {self.count}")
        return list(array), None if reduced is None else reduced - 1

    def inverse(self) -> Operation:
        return Stack(self.count)


@dataclasses.dataclass(frozen=True)
class Split:
    axis: int
    sizes: tuple[int, ...]

    def __call__(self, arrays: Arrays, reduced: int | None) -> tuple[Arrays, int | None]:
        if reduced == self.axis:
            raise ValueError("is a mean over the parts, and cannot be split")
        (array,) = arrays
        return np.split(array, np.cumsum(self.sizes[:-1]), self.axis), reduced

    def inverse(self) -> Operation:
        return Concatenate(self.axis, self.sizes)


@dataclasses.dataclass(frozen=True)
class Concatenate:
    axis: int
    sizes: tuple[int, ...]

    def __call__(self, arrays: Arrays, reduced: int | None) -> tuple[Arrays, int | None]:
        if reduced == self.axis:
            raise ValueError("is a mean over one part, and cannot be joined")
        return [np.concatenate(arrays, self.axis)], reduced

    def inverse(self) -> Operation:
        return Split(self.axis, self.sizes)


def operation(
    what: str, kind: str, argument: Any, shape: Shape, parts: int
) -> tuple[Operation, Shape]:
    if kind == "transpose":
        axes = (1, 0) if argument is None else tuple(int(a) for a in argument)
        if sorted(axes) != list(range(len(shape))):
            raise ValueError(f"{what}: an array of shape {shape} has not the axes {axes}")
        return Transpose(axes), tuple(shape[a] for a in axes)
    if kind == "reshape":
        try:
            target = np.broadcast_to(0, shape).reshape(argument).shape
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
        return Reshape(shape, target), target
    given = argument if isinstance(argument, Mapping) else {"axis": argument}
    axis = given["axis"] % len(shape) if shape else 0
    if not -len(shape) <= given["axis"] < len(shape):
        raise ValueError(f"{what}: an array of shape {shape} has no axis {given['axis']}")
    sizes = tuple(given.get("sizes") or [shape[axis] // parts] * parts)
    if len(sizes) != parts or sum(sizes) != shape[axis]:
        raise ValueError(
            f"{what}: axis {axis} of {shape} cannot be split into {parts} parts {sizes}"
        )
    return Split(axis, sizes), shape
