"""Steps that are better not taken: non-finite gradients, spikes."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from cerebras_jax.checks import check_flag, shown
from cerebras_jax.engine.placement import beside, home_of
from cerebras_jax.transforms.branch import branch
from cerebras_jax.transforms.clipping import (
    check_bounds,
    clip_factor,
    clip_gradients,
    global_norm,
)
from cerebras_jax.transforms.loss_scale import unscale
from cerebras_jax.transforms.spikes import SkipSpikes, SpikeState
from cerebras_jax.types import Array, Scalar


class GuardState(NamedTuple):
    """State of `guard`, `skip_nonfinite` and `skip_spikes`.

    Attributes:
      inner: the state of what is guarded.
      num_skipped_steps: int32 scalar, the steps not taken so far.
      skipped_in_a_row: int32 scalar, the steps not taken since the last that was.
      took_step: bool scalar, whether the last step was taken; True before the first.
      norm: float32 scalar, the last global norm of the gradients, before clipping.
      clip_factor: float32 scalar, what the last gradients were multiplied with to clip them.
      spikes: the past that spikes are told by, or None.
    """

    inner: Any
    num_skipped_steps: Array
    skipped_in_a_row: Array
    took_step: Array
    norm: Array
    clip_factor: Array
    spikes: SpikeState | None

    @classmethod
    def start(cls, inner: Any, skip_spikes: SkipSpikes | None) -> "GuardState":
        """The state before the first step."""
        return cls(
            inner=inner,
            num_skipped_steps=jnp.zeros((), jnp.int32),
            skipped_in_a_row=jnp.zeros((), jnp.int32),
            took_step=jnp.ones((), bool),
            norm=jnp.zeros((), jnp.float32),
            clip_factor=jnp.ones((), jnp.float32),
            spikes=None if skip_spikes is None else skip_spikes.init(),
        )


def guard(
    tx: optax.GradientTransformation,
    max_norm: Scalar | None = None,
    max_value: Scalar | None = None,
    skip_nonfinite: bool = False,
    skip_spikes: SkipSpikes | None = None,
    *,
    returns_params: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Measures the gradients once, and by that clips them, or does not take the step.

    The order: unscale; global norm in float32; verdict; clip; inner update. A step that is not
    taken calls no inner update, leaves the inner state as it was, and returns updates of -0.0,
    with which `optax.apply_updates` keeps every parameter's value.

    ``update`` takes these extra arguments, and passes all others on:

    * ``loss``: the loss of the step, a scalar; judged like the norm, and passed on too.
    * ``loss_scale``: what the loss was multiplied with before it was differentiated. The
      gradients are divided by it, in float32, which they then stay in.

    A traced update costs one more pass over the gradients, and stores the updates, which XLA
    would otherwise fuse with the sum; ``returns_params`` saves that, and then no array is copied
    and no temporary made. An eager update waits for the verdict. Within ``jax.shard_map`` the
    gradients must be the same on all devices, or each would decide for itself: JAX refuses that.

    Args:
      tx: what to guard; anything between it and the gradients is not seen.
      max_norm: bound of the global norm, > 0, a number or a tracer; see `clip`.
      max_value: bound of every element, > 0, likewise.
      skip_nonfinite: take no step whose norm is not below infinity or whose loss is not finite.
        Finite gradients whose squares overflow float32, above 1.8e19, count as infinite.
      skip_spikes: take no step whose norm or loss this calls a spike, nor a non-finite one.
      returns_params: the inner update returns new parameters in place of updates, and so does
        this one; it returns the old ones where no step is taken. For those who apply updates
        inside, where XLA fuses them with the rule.

    Returns:
      An optax pair with a `GuardState`.

    Raises:
      TypeError, ValueError: if an argument is outside its range.

    >>> tx = guard(optax.sgd(1.0, momentum=0.5), max_norm=1.0, skip_nonfinite=True)
    >>> params = jnp.array([0.0, 0.0])
    >>> state = tx.init(params)
    >>> updates, state = tx.update(jnp.array([3.0, 4.0]), state, params)
    >>> updates, state.norm, state.clip_factor
    (Array([-0.6, -0.8], dtype=float32), Array(5., dtype=float32), Array(0.2, dtype=float32))
    >>> updates, state = tx.update(jnp.array([3.0, jnp.nan]), state, params)
    >>> updates, state.took_step
    (Array([-0., -0.], dtype=float32), Array(False, dtype=bool))
    """
    check_bounds(max_norm, max_value)
    check_flag("skip_nonfinite", skip_nonfinite)
    if not isinstance(skip_spikes, SkipSpikes | None):
        raise TypeError(f"skip_spikes must be a SkipSpikes or None, got {skip_spikes!r}")
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> GuardState:
        return beside(GuardState.start(inner.init(params), skip_spikes), home_of(params))

    def update(
        updates: Any,
        state: GuardState,
        params: Any = None,
        *,
        loss: Any = None,
        loss_scale: Any = None,
        **extra: Any,
    ) -> tuple[Any, GuardState]:
        if loss is not None:
            check_loss(loss)
            extra["loss"] = loss
        norm = global_norm(unscale(updates, loss_scale))
        factor = clip_factor(norm, max_norm)

        def take() -> tuple[Any, Any]:
            # Unscaled again, from what is in memory: no array has to be kept for it.
            grads = unscale(updates, loss_scale)
            clipped = clip_gradients(grads, None if max_norm is None else factor, max_value)
            return inner.update(clipped, state.inner, params, **extra)

        ok, spikes = jnp.ones((), bool), state.spikes
        if skip_nonfinite or skip_spikes is not None:
            ok = norm < jnp.inf if loss is None else (norm < jnp.inf) & jnp.isfinite(loss)
            if skip_spikes is not None and state.spikes is not None:
                spikes = skip_spikes.record(state.spikes, norm, loss, finite=ok)
                ok &= ~skip_spikes.is_spike(state.spikes, norm, loss)
            held = (lambda: params) if returns_params else None
            out, new_inner = branch(ok, take, lambda: state.inner, held)
        else:
            out, new_inner = take()
        skipped = (~ok).astype(jnp.int32)
        return out, GuardState(
            inner=new_inner,
            num_skipped_steps=state.num_skipped_steps + skipped,
            skipped_in_a_row=(state.skipped_in_a_row + skipped) * skipped,
            took_step=ok,
            norm=norm.astype(jnp.float32),
            clip_factor=factor.astype(jnp.float32),
            spikes=spikes,
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def skip_nonfinite(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Takes no step whose gradients, or whose loss, are not finite.

    The criterion is Cerebras': the global norm in float32 is below infinity. ``update`` also
    takes ``loss``, which must be finite then. Parameters, states, clocks and schedules inside
    ``tx`` stay as if the step had not been; a schedule in a link outside does not. It never
    gives up, as ``optax.apply_if_finite`` does, and never multiplies by zero, which keeps NaN.

    Args:
      tx: what to guard, e.g. ``optim.adamw()``; several links in one ``optax.chain``.

    Returns:
      An optax pair with a `GuardState`; see `guard`, which can clip as well.

    >>> tx = skip_nonfinite(optax.sgd(1.0))
    >>> params = jnp.array([1.0, -0.0])
    >>> updates, state = tx.update(jnp.array([jnp.inf, 1.0]), tx.init(params), params)
    >>> optax.apply_updates(params, updates), state.num_skipped_steps
    (Array([ 1., -0.], dtype=float32), Array(1, dtype=int32))
    """
    return guard(tx, skip_nonfinite=True)


def skip_spikes(
    tx: optax.GradientTransformation,
    window: int = 128,
    sigma: float = 6.0,
    min_history: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Takes no step whose gradient norm, or whose loss, is far above the recent ones.

    Non-finite ones are not taken either. ``update`` takes ``loss``; without it the norm decides.

    Args:
      tx: what to guard.
      window, sigma, min_history: what a spike is; see `SkipSpikes`.

    Returns:
      An optax pair with a `GuardState`.

    >>> tx = skip_spikes(optax.sgd(1.0), window=4)
    >>> params = jnp.array([0.0])
    >>> state = tx.init(params)
    >>> for loss in [1.0, 1.1, 1.0, 30.0]:
    ...     _, state = tx.update(params, state, params, loss=loss)
    >>> state.took_step
    Array(False, dtype=bool)
    """
    return guard(tx, skip_spikes=SkipSpikes(window, sigma, min_history))


def check_skips(state: Any, max_in_a_row: int = 10) -> None:
    """Raises if too many steps in a row were not taken; waits for the last one.

    Args:
      state: the state of `guard`, `skip_nonfinite` or `skip_spikes`, or the report of a class.
      max_in_a_row: how many are accepted.

    Raises:
      FloatingPointError: with the counts and the norm of the last gradients.

    >>> tx = skip_nonfinite(optax.sgd(1.0))
    >>> _, state = tx.update(jnp.array([jnp.nan]), tx.init(jnp.array([1.0])))
    >>> check_skips(state, max_in_a_row=0)
    Traceback (most recent call last):
      ...
    FloatingPointError: 1 step in a row was not taken, 1 in all; the last gradient norm was nan
    """
    in_a_row = int(state.skipped_in_a_row)
    if in_a_row > max_in_a_row:
        steps = "1 step in a row was" if in_a_row == 1 else f"{in_a_row} steps in a row were"
        raise FloatingPointError(
            f"{steps} not taken, {int(state.num_skipped_steps)} in all; "
            f"the last gradient norm was {float(state.norm):g}"
        )


def check_loss(loss: Any) -> None:
    """Refuses a loss that cannot be judged: anything but a real floating point scalar.

    Raises:
      TypeError, ValueError: names what it is instead.

    >>> check_loss(jnp.array([1.0, 2.0]))
    Traceback (most recent call last):
      ...
    ValueError: loss must be a scalar, got shape (2,)
    """
    dtype = getattr(loss, "dtype", None)
    if dtype is None and isinstance(loss, int | float | complex):
        dtype = np.result_type(loss)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"loss must be a floating point scalar, got {shown(loss) if dtype is None else dtype}"
        )
    if np.shape(loss) != ():
        raise ValueError(f"loss must be a scalar, got shape {np.shape(loss)}")
