"""Does a training step change activations by the same amount at every width?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class CoordinateCheck:
    """How much activations change at each width; see `coordinate_check`.

    Attributes:
      widths: the widths that were tried.
      names: names of the activations.
      changes: mean of abs(x_t - x_0), of shape (steps, widths, names).
    """

    widths: tuple[int, ...]
    names: tuple[str, ...]
    changes: np.ndarray

    @property
    def slopes(self) -> dict[str, float]:
        """Of log2(change) over log2(width) after the last step: 0 is as it should be."""
        lines = np.polyfit(np.log2(self.widths), np.log2(self.changes[-1]), 1)
        return {name: float(slope) for name, slope in zip(self.names, lines[0], strict=True)}

    def __str__(self) -> str:
        """A row for each width, and the slopes."""
        cells = [["", *self.names]]
        cells += [
            [str(n), *(f"{x:.3g}" for x in row)]
            for n, row in zip(self.widths, self.changes[-1], strict=True)
        ]
        cells.append(["slope", *(f"{slope:.2f}" for slope in self.slopes.values())])
        sizes = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(f"{cell:>{n}}" for cell, n in zip(row, sizes, strict=True)) for row in cells
        )

    def plot(self, ax: Any = None) -> Any:
        """Draws the changes of the last step over width, and returns the matplotlib axes."""
        from matplotlib import pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(5, 3), layout="constrained")
        for k, (name, slope) in enumerate(self.slopes.items()):
            ax.plot(self.widths, self.changes[-1, :, k], "o-", label=f"{name}: slope {slope:.2f}")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xlabel("width")
        ax.set_ylabel(f"mean |x{_subscript(len(self.changes))} - x₀|")
        ax.legend()
        return ax


def _subscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def coordinate_check(
    make: Callable[[int], tuple[Any, Callable[[Any, Any], tuple[Any, dict[str, Any]]], Any]],
    widths: Sequence[int],
    batch: Any,
    steps: int = 4,
) -> CoordinateCheck:
    """Trains networks of several widths for a few steps, and measures how activations change.

    With muP the change does not depend on the width; where it grows or vanishes with the width, a
    learning rate, an initial deviation or a multiplier is wrong.

    Args:
      make: width -> (parameters, function, optimizer). The function takes parameters and batch, and
        returns the loss and a dict of activations; the optimizer is an optax pair.
      widths: at least two.
      batch: what every step is taken on.
      steps: how many steps, at least 1.

    Returns:
      the changes by step, width and activation, with ``slopes``, ``print`` and ``plot``.

    Raises:
      ValueError: if there are fewer than two widths or no step, or an activation does not change.

    References:
      Yang et al., Tensor Programs V, appendix D.1, https://arxiv.org/abs/2203.03466

    >>> import jax.numpy as jnp
    >>> def make(width):  # the sum of all inputs: its change grows with the width
    ...     def f(w, x):
    ...         out = w.sum() * x
    ...         return out, {"out": out}
    ...     return jnp.zeros(width), f, optax.sgd(0.1)
    >>> print(coordinate_check(make, [16, 64], 1.0))
             out
       16    6.4
       64   25.6
    slope   1.00
    """
    if len(set(widths)) < 2:
        raise ValueError(f"widths must be at least two, got {list(widths)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    names: tuple[str, ...] = ()
    table = []
    for width in widths:
        params, function, tx = make(width)
        first, *later = _activations(params, function, tx, batch, steps)
        names = tuple(first)
        table.append([[np.abs(x[n] - first[n]).mean() for n in names] for x in later])
    changes = np.swapaxes(np.array(table), 0, 1)
    still = [name for k, name in enumerate(names) if not (changes[-1, :, k] > 0).all()]
    if still:
        raise ValueError(f"activations {still} do not change; widths {list(widths)}")
    return CoordinateCheck(tuple(widths), names, changes)


def _activations(params: Any, function: Any, tx: Any, batch: Any, steps: int) -> list[Any]:
    """Activations before the first and after every step."""

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any, Any]:
        grads, seen = jax.grad(function, has_aux=True)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, seen

    state, result = tx.init(params), []
    for _ in range(steps + 1):
        params, state, seen = step(params, state)
        result.append({name: np.asarray(x, np.float64) for name, x in seen.items()})
    return result
