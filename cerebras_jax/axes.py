"""Arrays as matrices: which axes are reduced, which are outputs, which only stack matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cerebras_jax.messages import shown
from cerebras_jax.types import Array

EXAMPLES = (
    "a convolution 'iiio', stacked layers 'bio', stacked experts 'bbio', "
    "flax's query, key and value 'ioo', its attention output 'iio', torch's layout 'oi'"
)


class Layout(NamedTuple):
    """How an array holds matrices that map inputs to outputs, ``y = x @ w``.

    Attributes:
      axes: one letter per axis: ``i`` is reduced, ``o`` is an output, ``b`` stacks matrices.
      split: how many matrices stand side by side along the outputs, as in a fused
        query-key-value kernel.

    >>> Layout("bio").matrix_shape((12, 64, 256))
    (12, 64, 256)
    >>> Layout("iiio").matrix_shape((3, 3, 8, 32))
    (72, 32)
    >>> Layout("io", split=3).matrix_shape((64, 192))
    (3, 64, 64)
    """

    axes: str = "io"
    split: int = 1

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(stacked ..., inputs, outputs) of an array of that shape.

        Raises:
          ValueError: if the letters do not fit the shape, or split does not divide the outputs.
        """
        if len(shape) != len(self.axes):
            raise ValueError(
                f"axes must have one letter per axis of the shape {tuple(shape)}, "
                f"got {self.axes!r}; for example {EXAMPLES}"
            )
        batch, inputs, outputs = (self._sizes(letter, shape) for letter in "bio")
        n = math.prod(outputs)
        if n % self.split:
            raise ValueError(
                f"split must divide the {n} outputs of the shape {tuple(shape)} with axes "
                f"{self.axes!r}, got {shown(self.split)}"
            )
        stack = batch if self.split == 1 else (*batch, self.split)
        return (*stack, math.prod(inputs), n // self.split)

    def to_matrices(self, x: Array) -> Array:
        """The matrices in the last two axes; those before them stack."""
        *stack, inputs, outputs = self.matrix_shape(x.shape)
        x = x.transpose(self._order())
        if self.split == 1:
            return x.reshape(*stack, inputs, outputs)
        x = x.reshape(*stack[:-1], inputs, self.split, outputs)
        return x.swapaxes(-2, -3)

    def from_matrices(self, x: Array, shape: Sequence[int]) -> Array:
        """The inverse of `to_matrices`, for an array of that shape."""
        if self.split > 1:
            x = x.swapaxes(-2, -3)
        order = self._order()
        x = x.reshape([shape[k] for k in order])
        return x.transpose([order.index(k) for k in range(len(order))])

    def _order(self) -> list[int]:
        return [k for letter in "bio" for k, a in enumerate(self.axes) if a == letter]

    def _sizes(self, letter: str, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(n for a, n in zip(self.axes, shape, strict=True) if a == letter)


def check_axes(axes: object) -> None:
    """Refuses what is not a string of the letters i, o and b with an i and an o in it.

    >>> check_axes("ii")
    Traceback (most recent call last):
      ...
    ValueError: axes must have the letters i, o and b, at least one i and one o, got 'ii'
    """
    if not isinstance(axes, str):
        raise TypeError(f"axes must be a string with one letter per axis, got {shown(axes)}")
    if not (set(axes) <= set("iob") and {"i", "o"} <= set(axes)):
        raise ValueError(
            f"axes must have the letters i, o and b, at least one i and one o, got {shown(axes)}"
        )
