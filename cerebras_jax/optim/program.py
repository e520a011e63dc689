"""The step of an optimizer as one compiled program: what of it is static, and how long it lives."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cerebras_jax.engine.trees import as_array, check_grads, leaf_paths
from cerebras_jax.optim.guarding import Guard, MeasuredState
from cerebras_jax.optim.makers import How, Maker
from cerebras_jax.optim.masking import Masking
from cerebras_jax.optim.numbers import join
from cerebras_jax.programs import Programs
from cerebras_jax.transforms.grouped import grouped
from cerebras_jax.transforms.loss_scale import unscale
from cerebras_jax.transforms.norms import differences
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
      masking: what of it is sparse.
      guard: what watches over the step.
      around: the wrappers, outermost first.
      how: how arrays are kept.
    """

    maker: Maker
    statics: tuple
    groups: tuple[tuple[str, ...], ...]
    same: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    params: Any
    state: Any
    absent: tuple[int, ...]
    masking: Masking
    guard: Guard
    around: tuple[Wrapper, ...]
    how: How

    @functools.cached_property
    def _hash(self) -> int:
        rest = (self.statics, self.groups, self.same, self.absent, self.guard, self.around)
        return hash((self.maker, *rest, self.masking, self.params, self.how))

    def __hash__(self) -> int:
        return self._hash


def transformation(
    plan: Plan, numbers: Sequence[Sequence[Any]], bounds: Sequence[Any], *, applied: bool = False
) -> optax.GradientTransformationExtraArgs:
    """The optax pair that a step applies.

    Outermost first: the wrappers, the masking of gradients, the guard, the masks, the groups.

    Args:
      plan: what is static.
      numbers: per group, the numbers in force.
      bounds: the bounds of the gradients, in the order of ``plan.guard.clips``.
      applied: whether its update returns new parameters; only where there are no wrappers.
    """
    pairs = [
        plan.maker.pair(join(values, static), plan.how, same, applied)
        for values, static, same in zip(numbers, plan.statics, plan.same, strict=True)
    ]
    tx: Any = plan.masking.around(grouped(pairs, plan.groups), applied)
    if plan.absent and not applied:
        tx = _without_gradients(tx, {plan.names[i] for i in plan.absent})
    tx = plan.guard.around(tx, dict(zip(plan.guard.clips, bounds, strict=True)), applied)
    if plan.guard.is_on:
        tx = plan.masking.before(tx)
    for wrap in reversed(plan.around):
        tx = wrap(tx)
        if isinstance(tx, optax.MultiSteps):
            tx = tx.gradient_transformation()
    return optax.with_extra_args_support(tx)


def _without_gradients(tx: Any, absent: set[str]) -> optax.GradientTransformationExtraArgs:
    """Wrappers see zeros where there is no gradient; the groups see that there is none."""

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        # Fewer leaves than there are parameters, if a wrapper masks some.
        names, treedef = leaf_paths(params), jax.tree.structure(params)
        leaves = zip(names, treedef.flatten_up_to(grads), strict=True)
        hidden = treedef.unflatten([None if name in absent else g for name, g in leaves])
        return tx.update(hidden, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)  # pyright: ignore


class Inputs(NamedTuple):
    """What a step takes beside state and parameters.

    Attributes:
      grads: in the order of the leaves; None where there is none.
      numbers: per group, the numbers in force.
      bounds: of the gradients, in the order of ``plan.guard.clips``.
      loss: of this step, where it is known and judged.
      loss_scale: what it was multiplied with before it was differentiated.
    """

    grads: list[Any]
    numbers: Sequence[Any]
    bounds: Sequence[Any]
    loss: Any = None
    loss_scale: Any = None


def _take_step(
    plan: Plan, state: list, params: list, inputs: Inputs
) -> tuple[list[Array], list[Array]]:
    """One step: the leaves of the new state, and the new parameters.

    The state comes first: JAX pairs donated buffers with results by shape and order, and new
    parameters in the buffer of a moment would cost a copy.
    """
    check_grads(inputs.grads, params, lambda: plan.names)
    step = _step_within_wrappers if plan.around else _plain_step
    tree = plan.state.unflatten(state)
    inner = tree.inner if plan.guard.norms else tree
    new_params, new_state = step(plan, inner, params, inputs)
    if plan.guard.norms:
        # Those that the masks leave, as `guard` sees them.
        seen = plan.masking.prune(plan.params.unflatten(inputs.grads), inner)
        grads = unscale(plan.params.flatten_up_to(seen), inputs.loss_scale)
        norms = tree.norms.of(grads, differences(new_params, params), params)
        new_state = MeasuredState(new_state, norms)
    leaves, structure = jax.tree.flatten(new_state)
    if structure != plan.state:
        raise ValueError(
            f"a step must keep the structure of the state {plan.state}, got {structure}"
        )
    return [jnp.asarray(new, old.dtype) for new, old in zip(leaves, state, strict=True)], new_params


def _plain_step(plan: Plan, state: Any, params: list, inputs: Inputs) -> tuple[list[Array], Any]:
    grads = [None if g is None else as_array(g) for g in inputs.grads]
    tx = transformation(plan, inputs.numbers, inputs.bounds, applied=True)
    extra = {"loss": inputs.loss, "loss_scale": inputs.loss_scale} if plan.guard.is_on else {}
    new, state = tx.update(
        plan.params.unflatten(grads), state, plan.params.unflatten(params), **extra
    )
    return plan.params.flatten_up_to(new), state


def _step_within_wrappers(
    plan: Plan, state: Any, params: list, inputs: Inputs
) -> tuple[list[Array], Any]:
    """What is around the groups sees zeros for absent gradients, and none that is scaled."""
    absent = set(plan.absent)
    grads = [
        jnp.zeros_like(p) if i in absent else unscale(as_array(g), inputs.loss_scale)
        for i, (g, p) in enumerate(zip(inputs.grads, params, strict=True))
    ]
    tx = transformation(plan, inputs.numbers, inputs.bounds)
    extra = {} if inputs.loss is None else {"loss": inputs.loss}
    updates, state = tx.update(
        plan.params.unflatten(grads), state, plan.params.unflatten(params), **extra
    )
    new = [
        p if i in absent else (p + u).astype(p.dtype)
        for i, (p, u) in enumerate(zip(params, plan.params.flatten_up_to(updates), strict=True))
    ]
    # Whatever the wrappers made of the updates.
    pruned = plan.masking.prune(plan.params.unflatten(new), state)
    return plan.params.flatten_up_to(pruned), state


class Program:
    """A compiled step; it is freed when nothing refers to it any more."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.run = jax.jit(functools.partial(_take_step, plan), donate_argnums=(0, 1))


_PROGRAMS: Programs[Plan, Program] = Programs(Program)


def program_of(plan: Plan, owner: Any) -> Program:
    """The compiled step for a plan, which the owner keeps alive."""
    return _PROGRAMS.get(plan, [owner])
