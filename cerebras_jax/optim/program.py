"""The step of an optimizer as one compiled program: what of it is static, and how long it lives."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cerebras_jax.engine.memory import in_memory_of, on_device
from cerebras_jax.engine.placement import Placement, explicit_shardings
from cerebras_jax.engine.trees import as_array, check_grads, leaf_paths
from cerebras_jax.optim.guarding import BOUNDS, Guard
from cerebras_jax.optim.makers import How, Maker
from cerebras_jax.optim.masking import Masking
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
      masking: what of it is sparse.
      guard: what watches over the step.
      around: the wrappers, outermost first.
      how: how arrays are kept.
      placement: where the arrays of state and parameters lie, and stay; see `Placements`.
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
    placement: Placement = None

    @functools.cached_property
    def _hash(self) -> int:
        rest = (self.statics, self.groups, self.same, self.absent, self.guard, self.around)
        return hash((self.maker, *rest, self.masking, self.params, self.how))

    def __hash__(self) -> int:
        return self._hash


def transformation(
    plan: Plan, numbers: Sequence[Sequence[Any]], bounds: Sequence[Any]
) -> optax.GradientTransformationExtraArgs:
    """The optax pair that a step applies; its update returns new parameters.

    Outermost first: the masking of gradients, the norms, the guard, the wrappers, the masks, the
    groups. So wrappers are given no step that is not taken, and their states stay with all others.
    Where there are wrappers, norms and guard see all that they see, and what they hand on is masked
    and clipped.

    Args:
      plan: what is static.
      numbers: per group, the numbers in force.
      bounds: the bounds of the gradients, in the order of ``plan.guard.clips``.
    """
    applied = not plan.around
    pairs = [
        plan.maker.pair(join(values, static), plan.how, same, applied)
        for values, static, same in zip(numbers, plan.statics, plan.same, strict=True)
    ]
    tx: Any = plan.masking.around(grouped(pairs, plan.groups), applied)
    given = dict(zip(plan.guard.clips, bounds, strict=True))
    if plan.around:
        tx = plan.guard.around(_wrapped(plan, tx, given), {})
        tx = _without_factor(tx) if given else tx
        return optax.with_extra_args_support(plan.guard.measured(tx))
    tx = plan.guard.measured(plan.guard.around(tx, given))
    return optax.with_extra_args_support(plan.masking.before(tx) if plan.guard.is_on else tx)


def _wrapped(plan: Plan, tx: Any, bounds: Mapping[str, Any]) -> Any:
    """The wrappers around the groups: they see zeros for absent gradients."""
    if plan.absent:
        tx = _without_gradients(tx, {plan.names[i] for i in plan.absent})
    if bounds:
        tx = plan.masking.before(clipping.bounded(tx, *map(bounds.get, BOUNDS)))
    for wrap in reversed(plan.around):
        tx = wrap(tx)
        if isinstance(tx, optax.MultiSteps):
            tx = tx.gradient_transformation()
    wrapped = optax.with_extra_args_support(tx)
    absent = set(plan.absent)

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        old = plan.params.flatten_up_to(params)
        given = zip(old, plan.params.flatten_up_to(grads), strict=True)
        filled = [jnp.zeros_like(p) if i in absent else g for i, (p, g) in enumerate(given)]
        updates, new_state = wrapped.update(plan.params.unflatten(filled), state, params, **extra)
        state = _like(state, new_state)  # or a step that is not taken would have other dtypes
        pairs = zip(old, plan.params.flatten_up_to(updates), strict=True)
        new = [p if i in absent else (p + u).astype(p.dtype) for i, (p, u) in enumerate(pairs)]
        # Whatever the wrappers made of the updates.
        return plan.masking.prune(plan.params.unflatten(new), state), state

    return optax.GradientTransformationExtraArgs(wrapped.init, update)  # pyright: ignore


def _without_factor(tx: Any) -> optax.GradientTransformationExtraArgs:
    """The guard around wrappers does not know by what their output was clipped."""

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        new_params, state = tx.update(grads, state, params, **extra)
        return new_params, state._replace(clip_factor=jnp.full((), jnp.nan, jnp.float32))

    return optax.GradientTransformationExtraArgs(tx.init, update)  # pyright: ignore


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
    """One step, in which XLA chooses the shardings, also where the mesh has explicit axes.

    States need not lie as their parameters do, and the formulas do not say how they meet. Those in
    the memory of the host are brought to the device, and back; see `sharding.streamed`.
    """
    step: Any = functools.partial(_step, plan)
    mesh, where = explicit_shardings((state, params))
    if mesh is not None:
        step = jax.sharding.auto_axes(step, axes=mesh.axis_names, out_sharding=where)
    new_state, new_params = step(on_device(state), params, inputs)
    return in_memory_of(state, new_state), new_params


def _step(plan: Plan, state: list, params: list, inputs: Inputs) -> tuple[list[Array], list[Array]]:
    """The leaves of the new state, and the new parameters.

    The state comes first: JAX pairs donated buffers with results by shape and order, and new
    parameters in the buffer of a moment would cost a copy.
    """
    check_grads(inputs.grads, params, lambda: plan.names)
    grads = [None if g is None else as_array(g) for g in inputs.grads]
    tx = transformation(plan, inputs.numbers, inputs.bounds)
    extra = {"loss": inputs.loss, "loss_scale": inputs.loss_scale} if plan.guard.is_on else {}
    new_params, new_state = tx.update(
        plan.params.unflatten(grads),
        plan.state.unflatten(state),
        plan.params.unflatten(params),
        **extra,
    )
    kept = _like(plan.state.unflatten(state), new_state)
    return jax.tree.leaves(kept), plan.params.flatten_up_to(new_params)


def _like(old: Any, new: Any) -> Any:
    """A new state in the dtypes of the old one.

    Raises:
      ValueError: if its structure is another.
    """
    leaves, structure = jax.tree.flatten(old)
    if jax.tree.structure(new) != structure:
        raise ValueError(
            "a step must keep the structure of the state "
            f"{structure}, got {jax.tree.structure(new)}"
        )
    pairs = zip(jax.tree.leaves(new), leaves, strict=True)
    return structure.unflatten([jnp.asarray(x, like.dtype) for x, like in pairs])


class Program:
    """A compiled step; it is freed when nothing refers to it any more."""

    def __init__(self, plan: Plan):
        self.plan = plan
        where: dict[str, Any] = {}
        if plan.placement is not None:
            n = plan.state.num_leaves
            where = {"out_shardings": ([*plan.placement[:n]], [*plan.placement[n:]])}

        def step(state: list, params: list, inputs: Inputs) -> tuple[list[Array], list[Array]]:
            return _take_step(plan, state, params, inputs)

        self.run = jax.jit(step, donate_argnums=(0, 1), **where)


_PROGRAMS: Programs[Plan, Program] = Programs(Program)


def program_of(plan: Plan, owner: Any) -> Program:
    """The compiled step for a plan, which the owner keeps alive."""
    return _PROGRAMS.get(plan, [owner])
