"""Loss scaling: gradients of a float16 model, kept within float16's range."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cerebras_jax.checks import check, is_number
from cerebras_jax.stateful import Stateful
from cerebras_jax.types import Array, Scalar

SMALLEST = 2.0**-14  # the smallest normal float16


class LossScaleState(NamedTuple):
    """State of `LossScaling`.

    Attributes:
      loss_scale: float32 scalar, what the loss is multiplied with.
      steps_since_rescale: int32 scalar, the steps since the scale was last set.
      overflows_since_rescale: int32 scalar, those of them that were not finite.
      num_skipped_steps: int32 scalar, all steps that were not finite.
    """

    loss_scale: Array
    steps_since_rescale: Array
    overflows_since_rescale: Array
    num_skipped_steps: Array


def unscale(grads: Any, loss_scale: Scalar | None) -> Any:
    """Gradients of the loss from those of the scaled loss, in at least float32.

    Widened first: a float16 gradient may underflow without its scale. None stays None; a scale of
    None changes nothing.

    >>> unscale({"w": jnp.array([2.0], jnp.float16)}, 2.0**15)
    {'w': Array([6.1035156e-05], dtype=float32)}
    """
    if loss_scale is None:
        return grads

    def unscale_leaf(g: Any) -> Array:
        g = jnp.asarray(g)
        g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
        return g * (1 / jnp.asarray(loss_scale, g.real.dtype))

    return jax.tree.map(unscale_leaf, grads)


def scale_loss(loss: Any, loss_scale: Scalar) -> Array:
    """The loss to differentiate: ``loss * loss_scale`` in at least float32."""
    loss = jnp.asarray(loss)
    loss = loss.astype(jnp.promote_types(loss.dtype, jnp.float32))
    return loss * jnp.asarray(loss_scale, loss.dtype)


@dataclasses.dataclass(frozen=True)
class LossScaling:
    """Loss scaling, static or dynamic, as pure functions of a `LossScaleState`.

    For models that compute in float16. In bfloat16 or float32, whose exponents have 8 bits,
    scaling changes nothing but the rounding of subnormal numbers.

    The dynamic scale is halved when more than a given part of the steps since it was last set
    were not finite, and doubled after a number of steps; always within its bounds. As in
    Cerebras, one overflow among twenty or more steps is within the tolerance of 0.05, growth
    takes ``steps_per_increase + 1`` steps, and both counters start again at a bound too.

    Args:
      loss_scale: a number > 0, or ``"dynamic"``.
      init_scale: the first dynamic scale, > 0; at most ``max_loss_scale`` is used.
      steps_per_increase: a positive integer.
      min_loss_scale: lower bound of the dynamic scale, >= 2**-14; it wins over the upper one.
      max_loss_scale: upper bound of the dynamic scale, > 0.
      overflow_tolerance: part of the steps that may overflow, >= 0. This default is that of
        Cerebras' release 2.0; 2.1 and later have 0, which halves at every overflow.

    None means the default, and so does 0 except for the tolerance, as in Cerebras. Static scales
    need neither the lower bound nor the tolerance; they are not looked at then.

    Raises:
      TypeError: if an argument is not a number.
      ValueError: if it is outside its range.

    >>> scaling = LossScaling("dynamic", overflow_tolerance=0.0)
    >>> state = scaling.init()
    >>> state = scaling.update(state, finite=False)
    >>> state.loss_scale, state.num_skipped_steps
    (Array(16384., dtype=float32), Array(1, dtype=int32))
    """

    loss_scale: float | Literal["dynamic"] | None = 1.0
    init_scale: float = 2.0**15
    steps_per_increase: int = 2000
    min_loss_scale: float = SMALLEST
    max_loss_scale: float = 2.0**15
    overflow_tolerance: float = 0.05

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # As Cerebras: what is false takes the default.
            value = getattr(self, field.name)
            if not value and (value is None or field.name != "overflow_tolerance"):
                object.__setattr__(self, field.name, field.default)
        _check_constant("init_scale", self.init_scale, "> 0")
        _check_constant("max_loss_scale", self.max_loss_scale, "> 0")
        steps = self.steps_per_increase
        if not isinstance(steps, int | np.integer) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"steps_per_increase must be a positive integer, got {steps!r}")
        if not self.is_dynamic:
            _check_constant("loss_scale", self.loss_scale, "> 0", ', or "dynamic"')
            return
        _check_constant("min_loss_scale", self.min_loss_scale, "> 0")
        if self.min_loss_scale < SMALLEST:
            raise ValueError(
                "min_loss_scale must be >= 2**-14, the smallest normal float16, "
                f"got {self.min_loss_scale:g}"
            )
        _check_constant("overflow_tolerance", self.overflow_tolerance, ">= 0")

    @property
    def is_dynamic(self) -> bool:
        """Whether the scale moves."""
        return self.loss_scale == "dynamic"

    def init(self) -> LossScaleState:
        """The first scale, and counters of zero."""
        first = min(self.init_scale, self.max_loss_scale) if self.is_dynamic else self.loss_scale
        zeros = (jnp.zeros((), jnp.int32) for _ in range(3))
        return LossScaleState(jnp.asarray(first, jnp.float32), *zeros)

    def scale(self, state: LossScaleState, loss: Any) -> Array:
        """The loss to differentiate: ``loss * loss_scale`` in at least float32."""
        return scale_loss(loss, state.loss_scale)

    def unscale(self, state: LossScaleState, grads: Any) -> Any:
        """The gradients of the loss itself, in at least float32; None stays None."""
        return unscale(grads, state.loss_scale)

    def update(self, state: LossScaleState, finite: Any) -> LossScaleState:
        """The state after a step whose gradients were, or were not, ``finite``.

        A step that was held back for another reason, such as a spike, is finite.
        """
        overflow = jnp.logical_not(finite).astype(jnp.int32)
        skipped = state.num_skipped_steps + overflow
        if not self.is_dynamic:
            return state._replace(num_skipped_steps=skipped)
        steps = state.steps_since_rescale + 1
        overflows = state.overflows_since_rescale + overflow
        ratio = overflows.astype(jnp.float32) / steps.astype(jnp.float32)
        shrink = ratio > jnp.float32(self.overflow_tolerance)
        grow = ~shrink & (steps > self.steps_per_increase)
        factor = jnp.where(shrink, 0.5, jnp.where(grow, 2.0, 1.0)).astype(jnp.float32)
        scale = jnp.minimum(state.loss_scale * factor, jnp.float32(self.max_loss_scale))
        same = ~(shrink | grow)
        return LossScaleState(
            loss_scale=jnp.maximum(scale, jnp.float32(self.min_loss_scale)),
            steps_since_rescale=steps * same,
            overflows_since_rescale=overflows * same,
            num_skipped_steps=skipped,
        )


@functools.partial(jax.jit, static_argnums=0)
def _moved(scaling: LossScaling, state: LossScaleState, finite: Any) -> LossScaleState:
    return scaling.update(state, finite)


class GradScaler(Stateful):
    """Cerebras' gradient scaler: `LossScaling` that holds its state.

    ``opt.step(loss_fn, scaler=scaler)`` does all of it: it scales the loss, unscales the
    gradients, takes no step that is not finite, and updates the scaler. By hand:

    >>> scaler = GradScaler("dynamic", init_scale=16.0)
    >>> loss_fn = lambda w: (w * 3).sum()
    >>> grads = jax.grad(lambda w: scaler.scale(loss_fn(w)))(jnp.array([1.0], jnp.float16))
    >>> grads, scaler.unscale(grads)
    (Array([48.], dtype=float16), Array([3.], dtype=float32))
    >>> scaler.update(finite=False)
    >>> scaler.get_scale()
    8.0

    Attributes:
      scaling: the constants and the rule, a `LossScaling`.
      state: a `LossScaleState`.
      max_gradient_norm: the bound that a step with this scaler clips gradients to, or None.

    Args:
      loss_scale: a number > 0, ``"dynamic"``, or None, which is 1; see `LossScaling`, also for
        what follows.
      init_scale: the first dynamic scale.
      steps_per_increase: the clean steps after which it doubles.
      min_loss_scale: its lower bound.
      max_loss_scale: its upper bound.
      overflow_tolerance: the part of the steps that may overflow.
      max_gradient_norm: clip the unscaled gradients to this global norm, > 0; None: do not.

    Raises:
      TypeError, ValueError: if an argument is outside its range; see `LossScaling`.
    """

    def __init__(
        self,
        loss_scale: float | Literal["dynamic"] | None = None,
        init_scale: float = 2.0**15,
        steps_per_increase: int = 2000,
        min_loss_scale: float = SMALLEST,
        max_loss_scale: float = 2.0**15,
        overflow_tolerance: float = 0.05,
        max_gradient_norm: float | None = None,
    ):
        self.scaling = LossScaling(
            loss_scale,
            init_scale,
            steps_per_increase,
            min_loss_scale,
            max_loss_scale,
            overflow_tolerance,
        )
        if max_gradient_norm is not None:
            _check_constant("max_gradient_norm", max_gradient_norm, "> 0")
        self.max_gradient_norm = max_gradient_norm
        self.state = self.scaling.init()

    @classmethod
    def of(cls, scaling: LossScaling) -> "GradScaler":
        """A scaler with these constants, at its first scale."""
        fields = (getattr(scaling, field.name) for field in dataclasses.fields(scaling))
        return cls(*fields)

    def scale(self, loss: Any) -> Array:
        """The loss to differentiate."""
        return self.scaling.scale(self.state, loss)

    def unscale(self, grads: Any) -> Any:
        """The gradients of the loss itself, from those of the scaled loss, as float32."""
        return self.scaling.unscale(self.state, grads)

    def update(self, finite: Any) -> None:
        """Moves the scale after a step whose gradients were, or were not, ``finite``."""
        with self.lock:
            self.state = _moved(self.scaling, self.state, finite)

    def get_scale(self) -> float:
        """The scale in force; waits for the step that computes it."""
        return float(self.state.loss_scale)

    def state_dict(self) -> dict[str, np.ndarray]:
        """The state for a checkpoint: the scale in float32, counts in int64."""
        return {
            name: np.asarray(value, np.float32 if name == "loss_scale" else np.int64)
            for name, value in self.state._asdict().items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over the state of another scaler; what is not in it starts anew.

        Cerebras' scalers save nothing off their own device and only ``loss_scale`` when static.

        Raises:
          ValueError: if there is an entry of another name, or a value that no scaler has.
        """
        state = self.scaling.init()
        unknown = sorted(set(state_dict) - set(state._fields))
        if unknown:
            raise ValueError(f"a scaler's state has {list(state._fields)}, got {unknown}")
        for name, value in state_dict.items():
            number = value.item() if hasattr(value, "item") and np.shape(value) == () else value
            if not is_number(number) or np.shape(number) != () or not 0 <= number < np.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
            if name == "loss_scale":
                check(name, number, "> 0")  # as float32 has it
                loaded = jnp.float32(number)
            elif float(number) % 1 == 0:
                loaded = jnp.int32(min(int(number), jnp.iinfo(jnp.int32).max))
            else:
                raise ValueError(f"{name} must be a whole number, got {value!r}")
            state = state._replace(**{name: loaded})
        with self.lock:
            self.state = state

    def __repr__(self) -> str:
        return f"GradScaler({self.scaling}, max_gradient_norm={self.max_gradient_norm})"


def _check_constant(name: str, value: Any, rule: str, alternative: str = "") -> None:
    if not is_number(value) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} must be a number{alternative}, got {value!r}")
    check(name, value, rule)
