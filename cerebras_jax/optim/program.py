"""The step of an optimizer as one compiled program: what of it is static, and how long it lives."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cerebras_jax.engine.trees import as_array, check_grads
from cerebras_jax.optim.makers import Maker
from cerebras_jax.optim.numbers import join
from cerebras_jax.programs import Programs
from cerebras_jax.transforms import clipping
from cerebras_jax.transforms.grouped import grouped
from cerebras_jax.types import Array

Wrapper = Callable[[optax.GradientTransformation], optax.GradientTransformation]
"""A function from pair to pair, such as ``lambda tx: optax.MultiSteps(tx, 4)``."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What of a step is static; two equal plans are one program.

    Attributes:
      maker: makes the pair of a group.
      statics: per group, the flags and the places of the numbers.
      groups: per group, the names of its parameters.
      same: per group, which of its parameters are known to have equal clocks; see `lift`.
      names: of all parameters, in the order of the leaves.
      params: the structure of the parameters.
      state: the structure of the state; None while it is made.
      absent: positions of the parameters that have no gradient.
      clips: which bounds of the gradients there are.
      around: the wrappers, outermost first.
      state_dtype: see `per_parameter`.
    """

    maker: Maker
    statics: tuple
    groups: tuple[tuple[str, ...], ...]
    same: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    params: Any
    state: Any
    absent: tuple[int, ...]
    clips: tuple[str, ...]
    around: tuple[Wrapper, ...]
    state_dtype: Any

    @functools.cached_property
    def _hash(self) -> int:
        dtype = self.state_dtype
        dtype = tuple(sorted(dtype.items())) if isinstance(dtype, dict) else dtype
        rest = (self.statics, self.groups, self.same, self.absent, self.clips, self.around)
        return hash((self.maker, *rest, self.params, str(dtype)))

    def __hash__(self) -> int:
        return self._hash


def transformation(
    plan: Plan, numbers: Sequence[Sequence[Any]], bounds: Sequence[Any]
) -> optax.GradientTransformationExtraArgs:
    """The optax pair that a step applies: the wrappers around the clipping around the groups.

    Args:
      plan: what is static.
      numbers: per group, the numbers in force.
      bounds: the bounds of the gradients, in the order of ``plan.clips``.
    """
    pairs = [
        plan.maker.pair(join(values, static), plan.state_dtype, same)
        for values, static, same in zip(numbers, plan.statics, plan.same, strict=True)
    ]
    tx: Any = grouped(pairs, plan.groups)
    if plan.absent:
        tx = without_gradients(tx, {plan.names[i] for i in plan.absent}, plan)
    if plan.clips:
        tx = _after_clipping(tx, dict(zip(plan.clips, bounds, strict=True)))
    for wrap in reversed(plan.around):
        tx = wrap(tx)
        if isinstance(tx, optax.MultiSteps):
            tx = tx.gradient_transformation()
    return optax.with_extra_args_support(tx)


def _after_clipping(tx: Any, bounds: dict[str, Any]) -> Any:
    """The pair with clipped gradients; the state is the pair's own."""
    link = clipping.clip(bounds.get("max_gradient_norm"), bounds.get("max_gradient_value"))

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        grads, _ = link.update(grads, optax.EmptyState(), params)
        return tx.update(grads, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)  # pyright: ignore


def without_gradients(tx: Any, absent: set[str], plan: Plan) -> Any:
    """Wrappers see zeros where there is no gradient; the groups see that there is none."""
    names = plan.names

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        treedef = jax.tree.structure(params)
        held = dict(zip(names, [n in absent for n in names], strict=True))
        flags = jax.tree.leaves(_named(plan, params, held))
        leaves = treedef.flatten_up_to(grads)
        hidden = [None if h else g for g, h in zip(leaves, flags, strict=True)]
        return tx.update(treedef.unflatten(hidden), state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)  # pyright: ignore


def _named(plan: Plan, params: Any, values: dict[str, Any]) -> Any:
    """The values as a tree like ``params``, which may lack parameters that a wrapper masks."""
    full = plan.params.unflatten([values[n] for n in plan.names])
    is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(lambda p, v: p if is_masked(p) else v, params, full, is_leaf=is_masked)


def _take_step(
    plan: Plan, state: list, params: list, grads: list, numbers: Sequence[Any], bounds: list
) -> tuple[list[Array], list[Array]]:
    """One step: the leaves of the new state, and the new parameters.

    The state comes first: JAX pairs donated buffers with results by shape and order, and new
    parameters in the buffer of a moment would cost a copy.
    """
    check_grads(grads, params, lambda: plan.names)
    absent = set(plan.absent)
    filled = [
        jnp.zeros_like(p) if i in absent else as_array(g)
        for i, (g, p) in enumerate(zip(grads, params, strict=True))
    ]
    tx = transformation(plan, numbers, bounds)
    updates, new_state = tx.update(
        plan.params.unflatten(filled), plan.state.unflatten(state), plan.params.unflatten(params)
    )
    leaves, structure = jax.tree.flatten(new_state)
    if structure != plan.state:
        raise ValueError(
            f"a step must keep the structure of the state {plan.state}, got {structure}"
        )
    leaves = [jnp.asarray(new, old.dtype) for new, old in zip(leaves, state, strict=True)]
    new_params = [
        p if i in absent else (p + u).astype(p.dtype)
        for i, (p, u) in enumerate(zip(params, plan.params.flatten_up_to(updates), strict=True))
    ]
    return leaves, new_params


class Program:
    """A compiled step; it is freed when nothing refers to it any more."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.run = jax.jit(functools.partial(_take_step, plan), donate_argnums=(0, 1))


_PROGRAMS: Programs[Plan, Program] = Programs(Program)


def program_of(plan: Plan, owner: Any) -> Program:
    """The compiled step for a plan, which the owner keeps alive."""
    return _PROGRAMS.get(plan, [owner])
