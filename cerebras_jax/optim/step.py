"""The step of the stateful optimizers as one compiled program for all groups."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from cerebras_jax.checks import is_traced
from cerebras_jax.rule import GroupClock, Rule, as_array, check_grads, update_group
from cerebras_jax.types import Array


class Plan:
    """What of a step is static; its hash is worked out once.

    Attributes:
      factory: the factory of the rule.
      statics: per group, the flags and the places of the numbers.
      members: per group, the positions of its parameters.
      names: of all parameters, for errors.
    """

    def __init__(
        self,
        factory: Callable[..., Rule],
        statics: tuple,
        members: tuple[tuple[int, ...], ...],
        names: tuple[str, ...],
    ):
        self.factory, self.statics, self.members, self.names = factory, statics, members, names
        self.key = (factory, statics, members, names)
        self.hash = hash(self.key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Plan) and self.key == other.key)

    def __hash__(self) -> int:
        return self.hash


class Clipping(NamedTuple):
    """Bounds of the gradients: of their global norm, and of every element."""

    norm: Any
    value: Any

    def links(self) -> list[optax.GradientTransformation]:
        links = []
        if self.norm is not None:
            links.append(optax.clip_by_global_norm(self.norm))
        if self.value is not None:
            links.append(optax.clip(self.value))
        return links


class StepState(NamedTuple):
    """All that a step changes besides the parameters."""

    states: list[list[Any]]  # per group, per parameter: the rule's NamedTuple
    clocks: list[GroupClock]  # per group


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def take_step(
    plan: Plan,
    state: StepState,
    params: list,
    grads: list,
    numbers: Sequence[tuple],
    clipping: Clipping,
) -> tuple[StepState, list[Array]]:
    """One step of all groups, which takes the buffers of state and parameters.

    The state comes first: JAX pairs donated buffers with results by shape and order, and new
    parameters in the buffer of a moment would cost a copy.
    """
    check_grads(grads, params, lambda: plan.names)
    grads = [None if g is None else as_array(g) for g in grads]
    for clip in clipping.links():
        grads = cast(list, clip.update(grads, clip.init(grads))[0])
    new_params = list(params)
    states, clocks = [], []
    for i, (static, members) in enumerate(zip(plan.statics, plan.members, strict=True)):
        updated, clock, new = update_group(
            plan.factory,
            static,
            numbers[i],
            [grads[j] for j in members],
            state.clocks[i],
            state.states[i],
            [params[j] for j in members],
        )
        for j, p in zip(members, updated, strict=True):
            new_params[j] = p
        states.append(new)
        clocks.append(clock)
    return StepState(states, clocks), new_params


def as_argument(x: Any) -> Any:
    """A number as an argument of a compiled step: always the same type, whatever the value."""
    if is_traced(x):
        return x
    dtype = jax.dtypes.canonicalize_dtype(float)
    return x.astype(dtype) if isinstance(x, jax.Array) else _on_device(float(x), dtype)


@functools.lru_cache(maxsize=1024)
def _on_device(x: float, dtype: Any) -> Array:
    """A constant as an array; learning rates change, most other numbers come again."""
    with jax.ensure_compile_time_eval():
        return jnp.asarray(x, dtype)
