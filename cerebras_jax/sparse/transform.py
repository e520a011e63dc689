"""`sparsify`: an optax pair whose parameters, gradients and states are masked."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from cerebras_jax.checks import is_traced
from cerebras_jax.engine.hyper import saturating_increment
from cerebras_jax.engine.placement import beside, explicit_shardings, home_of
from cerebras_jax.engine.rounding import path_number
from cerebras_jax.engine.trees import align, as_array, check_grads, check_params, leaf_paths
from cerebras_jax.sparse import order
from cerebras_jax.sparse.algorithms import Algorithm, Dynamic
from cerebras_jax.sparse.masking import SparseState, holds_masks, is_on, mask_states, pack, select
from cerebras_jax.sparse.selection import Groups, Sparsity
from cerebras_jax.types import Array, Params


def sparsify(
    tx: optax.GradientTransformation,
    sparsity: Sparsity | Groups,
    *,
    names: Sequence[str] | Mapping[str, str] | None = None,
    states: Sequence[str] | None = None,
    returns_params: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer, so that pruned weights stay exactly zero; prune the model once first.

    ``params = sparse.prune(params, state)`` makes the weights of the first forward pass sparse;
    from then on every update leaves exact zeros where the mask prunes. A step masks the gradients
    by a select, so that a NaN in a pruned place vanishes; takes the step of ``tx``; sets pruned
    weights and their states to zero; and, if an update is due, chooses new masks by the new
    weights and the dense gradients. A None gradient leaves its mask alone. No update makes a weight
    zero that is infinite or NaN: `prune` does.

    This is the innermost wrapper: what holds steps back, accumulates or clips goes around it. To
    let that see masked gradients, put `mask_gradients` around it.

    Args:
      tx: any optax transformation.
      sparsity: which parameters, and how: a `Sparsity`, or what makes one.
      names: names of the leaves of the parameters, in the order of flattening or by dotted path;
        by default the paths. Patterns and random numbers go by these.
      states: the states of our optimizers to mask, such as ``("exp_avg",)``. By default, and in
        other transformations, all that have the shape of their parameter.
      returns_params: ``tx.update`` returns new parameters in place of updates, and so does this.

    Raises:
      ValueError: from ``init``, if a pattern matches nothing, an array cannot be cut, or ``tx`` is
        sparse already.

    >>> from cerebras_jax import optim, sparse
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
    >>> tx = sparsify(optim.sgd(lr=1.0), sparse.Static(0.5, init_method="topk"))
    >>> state = tx.init(params)
    >>> params = sparse.prune(params, state)
    >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, state, params)
    >>> optax.apply_updates(params, updates)
    {'kernel': Array([[ 0., -5.],
           [ 2.,  0.]], dtype=float32)}
    """
    chosen = sparsity if isinstance(sparsity, Sparsity) else Sparsity(sparsity)
    inner_update = optax.with_extra_args_support(tx).update

    def init(params: Params) -> SparseState:
        leaves, treedef = jax.tree.flatten(params)
        check_params(leaves, lambda: leaf_paths(params))
        members = _members(chosen, names, params)
        inner = tx.init(params)
        if holds_masks(inner):
            raise ValueError(f"sparsify wraps a transformation that is sparse already: {sparsity}")
        bits = treedef.unflatten(map(_first_mask, members, map(as_array, leaves)))
        state = SparseState(jnp.zeros((), jnp.int32), bits, inner)
        state = state._replace(inner=mask_states(state.inner, state.masks, params, states))
        return beside(state, home_of(leaves))

    def update(
        updates: Any, state: Any, params: Params = None, **extra: Any
    ) -> tuple[Any, SparseState]:
        if params is None:
            raise ValueError("update needs the parameters: call update(grads, state, params)")
        leaves, treedef = jax.tree.flatten(params)
        paths = functools.cache(lambda: leaf_paths(params))
        bits = align(treedef, state.bits, "the masks", paths)
        dense = align(treedef, extra.pop("dense_grads", updates), "the gradients", paths)
        grads = align(treedef, updates, "the gradients", paths)
        dense = [None if g is None else d for g, d in zip(grads, dense, strict=True)]
        check_grads(grads, leaves, paths)
        members = _members(chosen, names, params)
        step = saturating_increment(state.step)

        def take_step(
            masks: Sequence[Any], done: Iterable[Any] = itertools.repeat(None)
        ) -> tuple[list[Any], Any]:
            """What ``tx`` returns: a list of updates, or of parameters, and its state."""
            masked_grads = treedef.unflatten(map(select, masks, grads, done))
            masked_params = treedef.unflatten(map(select, masks, leaves))
            result, inner = inner_update(masked_grads, state.inner, masked_params, **extra)
            return align(treedef, result, "the updates", paths), inner

        def moved(result: Sequence[Any]) -> list[Any]:
            """The parameters after the step."""
            if returns_params:
                return list(result)
            return treedef.flatten_up_to(optax.apply_updates(params, treedef.unflatten(result)))

        def choose_from() -> list[Any]:
            """The parameters by which masks are chosen, and only in a step in which they are.

            When masks are due the step is taken again for it. If it handed over its results, they
            would have to be written to memory and read again in every step.
            """
            masks = [None if b is None else is_on(b) for b in bits]
            return moved(take_step(masks)[0])

        new_bits, during = _next_bits(members, step, bits, dense, choose_from)
        old = [None if b is None else is_on(b, d) for b, d in zip(new_bits, during, strict=True)]
        kept = [
            None if b is None else is_on(b, d | 1) for b, d in zip(new_bits, during, strict=True)
        ]
        result, inner = take_step(old)
        result = [
            select(m, r) if returns_params else _prune_update(m, r, p)
            for m, r, p in zip(kept, result, leaves, strict=True)
        ]
        late = take_step(old, moved(result))[1] if order.is_needed(step) else inner
        inner = mask_states(inner, treedef.unflatten(kept), params, states, late)
        return treedef.unflatten(result), SparseState(step, treedef.unflatten(new_bits), inner)

    return optax.GradientTransformationExtraArgs(init, update)


class _Member(NamedTuple):
    """A sparse parameter."""

    name: str
    algorithm: Algorithm
    seed: int

    @property
    def key(self) -> tuple[Any, Any]:
        """What random keys are made of: seed and name as numbers that do not recompile."""
        return np.asarray(self.seed).astype(np.uint32), path_number(self.name)


def _members(
    sparsity: Sparsity, names: Sequence[str] | Mapping[str, str] | None, params: Params
) -> list[Any]:
    """For every leaf a `_Member`, or None for a dense one."""
    leaves = jax.tree.leaves(params)
    if names is None or isinstance(names, Mapping):
        names = [names[path] if names else path for path in leaf_paths(params)]
    names = list(names)
    if len(names) != len(leaves) or len(set(names)) < len(names):
        raise ValueError(f"sparsify needs {len(leaves)} distinct names, got {names}")
    shapes = {name: jnp.shape(p) for name, p in zip(names, leaves, strict=True)}
    algorithms = sparsity.assign(shapes)
    return [
        _Member(name, algorithms[name], sparsity.seed) if name in algorithms else None
        for name in names
    ]


# --- one array ------------------------------------------------------------------------------------


def _first_mask(member: _Member | None, p: Array) -> Array | None:
    if member is None:
        return None
    sharding = None if is_traced(p) or not isinstance(p.sharding, NamedSharding) else p.sharding
    try:
        member.algorithm.cut(p)
        make: Any = functools.partial(_make_first_mask, member.algorithm, sharding)
        mesh, where = explicit_shardings(p)
        if mesh is not None:
            make = jax.sharding.auto_axes(make, axes=mesh.axis_names, out_sharding=where)
        return make(member.key, p)
    except ValueError as error:
        raise ValueError(f"parameter {member.name!r}: {error}") from None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _make_first_mask(algorithm: Algorithm, sharding: Any, key: Any, p: Array) -> Array:
    bits = pack(algorithm.first_mask(p, _random_key(key, jnp.uint32(0))))
    return bits if sharding is None else jax.lax.with_sharding_constraint(bits, sharding)


def _next_bits(
    members: Sequence[_Member | None],
    step: Array,
    bits: Sequence[Any],
    dense: Sequence[Any],
    choose_from: Callable[[], Sequence[Any]],
) -> tuple[list[Any], list[Any]]:
    """The masks after a step, new ones where an update is due; see `pack`.

    Args:
      members: of every leaf, as in `_members`.
      step: how many steps are taken with this one.
      bits: the masks before.
      dense: the gradients before they were masked.
      choose_from: returns the parameters after the step.

    Returns:
      The packed masks, and for each which bit is the mask during the step.
    """
    changing = {
        i: (member.algorithm, member.key)
        for i, member in enumerate(members)
        if member and isinstance(member.algorithm, Dynamic) and dense[i] is not None
    }
    new_bits = list(bits)
    during: list[Any] = [1 for _ in bits]
    if not changing:
        return new_bits, during
    due = {update: update.due(step) for update in {a.update: None for a, _ in changing.values()}}
    old = [bits[i] for i in changing]

    def choose() -> list[Array]:
        params = choose_from()
        return [
            _next_mask(algorithm, len(due) == 1, key, params[i], bits[i], dense[i], step)
            for i, (algorithm, key) in changing.items()
        ]

    any_due = functools.reduce(jnp.logical_or, due.values())
    if is_traced(any_due):
        chosen = jax.lax.cond(any_due, choose, lambda: old)
    else:
        chosen = choose() if any_due else old
    for (i, (algorithm, _)), mask in zip(changing.items(), chosen, strict=True):
        new_bits[i] = mask
        during[i] = jnp.where(due[algorithm.update], 2, 1).astype(mask.dtype)
    return new_bits, during


@functools.partial(jax.jit, static_argnums=(0, 1))
def _next_mask(
    algorithm: Dynamic, is_due: bool, key: Any, p: Array, bits: Array, g: Array, step: Array
) -> Array:
    """The new mask of one array if it is due, which may be known before; else the old one."""

    def choose() -> Array:
        mask = is_on(bits)
        new = algorithm.next_mask(select(mask, p), mask, g, step, _random_key(key, step))
        return pack(new, mask)

    return choose() if is_due else jax.lax.cond(algorithm.update.due(step), choose, lambda: bits)


def _prune_update(mask: Any, u: Any, p: Array) -> Any:
    """The update after which a pruned parameter is exactly zero."""
    return u if mask is None or u is None else jnp.where(mask, u, -p)


def _random_key(key: tuple[Array, Array], step: Array) -> Array:
    """A key for a parameter at a step, the same on any number of devices."""
    seed, name = key
    root = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(root, name), step)
