"""Spikes: losses and gradient norms far above the recent ones."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cerebras_jax.checks import check
from cerebras_jax.types import Array


class SpikeState(NamedTuple):
    """The recent past, without non-finite values.

    Attributes:
      losses: float32 ``(window,)``, in a ring; NaN where there is none.
      norms: float32 ``(window,)``, in a ring; NaN where there is none.
      position: int32 scalar, where the next values go.
    """

    losses: Array
    norms: Array
    position: Array


@dataclasses.dataclass(frozen=True)
class SkipSpikes:
    r"""What counts as a spike: a loss or a gradient norm far above those of the steps before.

    .. math::

        x - \operatorname{mean}(w) > \sigma \, \max(\operatorname{std}(w),
            10^{-6} \max(1, |\operatorname{mean}(w)|))

    where w holds the last finite values before x, and std divides by one less than their number.
    As MaxText and OLMo-core, except that non-finite values never enter w (one NaN would switch
    the test off, or on, for a whole window), and that a constant past has a standard deviation.
    A finite spike does enter: a lasting new level becomes the rule.

    Args:
      window: how many values are kept, an integer >= 2.
      sigma: how many standard deviations above the mean a spike begins, > 0.
      min_history: an integer in [2, window + 1]: how many values, the newest included, must be
        known for it to be judged; by default ``max(2, window // 2)``. Two past values always
        are: one has no standard deviation.

    Raises:
      ValueError: if a number is outside its range.
      TypeError: if a number is not a number.

    >>> SkipSpikes(window=1)
    Traceback (most recent call last):
      ...
    ValueError: window must be an integer >= 2, got 1
    """

    window: int = 128
    sigma: float = 6.0
    min_history: int | None = None

    def __post_init__(self) -> None:
        if not _is_integer(self.window) or self.window < 2:
            raise ValueError(f"window must be an integer >= 2, got {self.window!r}")
        if not isinstance(self.sigma, int | float | np.number):  # it is part of a program's key
            raise TypeError(f"sigma must be a number, got {self.sigma!r}")
        check("sigma", self.sigma, "> 0")
        known = self.min_history
        if known is not None and not (_is_integer(known) and 2 <= known <= self.window + 1):
            raise ValueError(
                f"min_history must be None or an integer in [2, window + 1], got {known!r}"
            )

    def init(self) -> SpikeState:
        """An empty past."""
        return SpikeState(
            losses=jnp.full((self.window,), jnp.nan, jnp.float32),
            norms=jnp.full((self.window,), jnp.nan, jnp.float32),
            position=jnp.zeros((), jnp.int32),
        )

    def is_spike(self, state: SpikeState, norm: Array, loss: Any = None) -> Array:
        """Whether the norm, or the loss if there is one, is far above its past."""
        spike = self._is_above(norm, state.norms)
        return spike if loss is None else spike | self._is_above(loss, state.losses)

    def record(self, state: SpikeState, norm: Array, loss: Any, finite: Array) -> SpikeState:
        """The past with this step in it, if that is ``finite``."""

        def put(ring: Array, x: Any) -> Array:
            x = jnp.asarray(jnp.nan if x is None else x, jnp.float32)
            return ring.at[state.position].set(jnp.where(finite, x, ring[state.position]))

        following = (state.position + 1) % self.window
        return SpikeState(
            losses=put(state.losses, loss),
            norms=put(state.norms, norm),
            position=jnp.where(finite, following, state.position),
        )

    def _is_above(self, x: Any, ring: Array) -> Array:
        known = ~jnp.isnan(ring)
        n = known.sum()
        needed = max(2, self.window // 2) if self.min_history is None else self.min_history
        mean = jnp.sum(ring, where=known) / jnp.maximum(n, 1)
        variance = jnp.sum(jnp.square(ring - mean), where=known) / jnp.maximum(n - 1, 1)
        std = jnp.maximum(jnp.sqrt(variance), 1e-6 * jnp.maximum(1, jnp.abs(mean)))
        above = jnp.asarray(x, jnp.float32) - mean > self.sigma * std
        return above & (n + 1 >= needed) & (n >= 2)


def _is_integer(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)
