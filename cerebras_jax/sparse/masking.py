"""Masks applied to trees: parameters, gradients, and the states of any optimizer."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cerebras_jax.engine.lift import RuleState
from cerebras_jax.engine.memory import on_device
from cerebras_jax.engine.trees import align, leaf_paths
from cerebras_jax.sparse.order import zero_after
from cerebras_jax.transforms.packed import PackedState
from cerebras_jax.types import Array, Params


class SparseState(NamedTuple):
    """State of `sparsify`.

    Attributes:
      step: int32 scalar, the number of steps taken.
      bits: a tree like the parameters: uint8 arrays of their shape, see `pack`; None for dense.
      inner: the state of the wrapped transformation.
    """

    step: Array
    bits: Params
    inner: Any

    @property
    def masks(self) -> Params:
        """A tree like the parameters: bool arrays of their shape, None for dense ones."""
        return jax.tree.map(is_on, self.bits)


def pack(mask: Any, before: Any = None) -> Array:
    """A mask as a state keeps it: bit 0 is the mask, bit 1 the one ``before`` its last update.

    Bit 1 is read in the step of an update only. With both in one array, a step in which no update
    is due reads one byte for each entry, and XLA neither copies masks nor allocates for them.

    >>> pack(jnp.array([True, True, False, False]), jnp.array([True, False, True, False]))
    Array([3, 1, 2, 0], dtype=uint8)
    """
    now = (jnp.asarray(mask) != 0).astype(jnp.uint8)
    return now if before is None else now | (jnp.asarray(before) != 0).astype(jnp.uint8) << 1


def is_on(packed: Any, bits: Any = 1) -> Array:
    """The mask in packed bits; with ``bits=2`` the one before, with 3 what is on in both."""
    return (on_device(packed) & bits) == bits


def find_state(state: Any) -> SparseState:
    """The `SparseState` in the state of any optax transformation.

    Raises:
      ValueError: if there is none, or more than one.
    """
    found = _sparse_states(state)
    if len(found) != 1:
        raise ValueError(f"the state must hold one SparseState, found {len(found)}")
    return found[0]


def holds_masks(state: Any) -> bool:
    """Whether there is a `SparseState` in the state of an optax transformation."""
    return bool(_sparse_states(state))


def _sparse_states(state: Any) -> list[SparseState]:
    nodes: list[Any] = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SparseState))
    return [x for x in nodes if isinstance(x, SparseState)]


def masks(state: Any) -> Params:
    """The masks in a state: bool arrays like the parameters, None for dense ones."""
    return find_state(state).masks


def density(state: Any) -> dict[str, Array]:
    """The fraction of entries that are on, by the name of each sparse parameter; for logging."""
    tree = masks(state)
    return dict(zip(leaf_paths(tree), map(fraction_on, jax.tree.leaves(tree)), strict=True))


def fraction_on(mask: Array) -> Array:
    """The fraction of entries that are on: float32 scalar, 0 for an empty mask."""
    return jnp.sum(mask, dtype=jnp.int32) / max(mask.size, 1)


def prune(params: Params, state: Any) -> Params:
    """The parameters with exact zeros where the masks in ``state`` prune."""
    return mask_tree(masks(state), params, "the parameters")


def mask_tree(masks: Params, tree: Any, what: str = "the tree") -> Any:
    """A tree like the parameters with zeros where the masks prune; None leaves stay None."""
    mask_leaves, treedef = jax.tree.flatten(masks, is_leaf=_is_absent)
    leaves = align(treedef, tree, what, lambda: leaf_paths(masks, _is_absent))
    return treedef.unflatten(map(select, mask_leaves, leaves))


def select(mask: Any, x: Any, done: Array | None = None) -> Any:
    """``x``, and zero where the mask prunes; not a product, so a NaN vanishes.

    The bits are masked: in XLA's eyes the arithmetic before and after is that of a dense step, so
    it contracts the same products and sums, and what is kept is equal bit for bit.

    With ``done``, the zero is known only when that array is, see `order.zero_after`.
    """
    if _is_absent(mask) or _is_absent(x):
        return x
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.where(mask, x, jnp.zeros((), x.dtype))
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    zero = jnp.zeros((), bits.dtype) if done is None else zero_after(done, bits.dtype)
    return jax.lax.bitcast_convert_type(bits & (zero - mask.astype(bits.dtype)), x.dtype)


def _is_absent(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def mask_gradients(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Gives masked gradients to all that is between this wrapper and `sparsify`.

    So the norm that clips, or that decides whether a step is taken, does not see what the mask
    hides. The dense gradients go on as the extra argument ``dense_grads``, which RigL reads.

    >>> from cerebras_jax import optim, sparse
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
    >>> half = sparse.Static(0.5, init_method="topk")
    >>> tx = mask_gradients(
    ...     optax.chain(optax.clip_by_global_norm(1.0), sparse.sparsify(optim.sgd(lr=1.0), half)))
    >>> grads = {"kernel": jnp.array([[jnp.nan, 3.0], [4.0, 100.0]])}
    >>> tx.update(grads, tx.init(params), prune(params, tx.init(params)))[0]
    {'kernel': Array([[-0. , -0.6],
           [-0.8, -0. ]], dtype=float32)}
    """
    inner = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Params = None, **extra: Any) -> Any:
        masked = mask_tree(masks(state), updates, "the gradients")
        return inner.update(masked, state, params, dense_grads=updates, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


# --- the states of the wrapped optimizer ----------------------------------------------------------


def mask_states(
    inner: Any,
    masks: Params,
    params: Params,
    names: Sequence[str] | None = None,
    late: Any = None,
) -> Any:
    """The state of an optimizer with zeros where the masks prune.

    Args:
      inner: the state of any optax transformation; of a partitioned one too, which has
        ``optax.MaskedNode`` in place of what another part holds.
      masks: a tree like the parameters.
      params: the parameters.
      names: which states of our optimizers to mask. By default, and in other transformations,
        every tree like the parameters; of each array only one of its parameter's shape.
      late: the same state computed another time, from which masked arrays are taken.
    """
    leaves, treedef = jax.tree.flatten(params)
    paths = functools.cache(lambda: leaf_paths(params))
    mask_leaves = align(treedef, masks, "the masks", paths)

    def is_like_params(node: Any) -> bool:
        try:
            found = treedef.flatten_up_to(node)
        except (ValueError, TypeError, KeyError):
            return False
        return all(
            isinstance(x, optax.MaskedNode) or getattr(x, "shape", None) == p.shape
            for x, p in zip(found, leaves, strict=True)
        )

    def mask(tree: Any, late: Any, what: str = "a state") -> Any:
        pairs = (align(treedef, x, what, paths) for x in (tree, late))
        rows = zip(*pairs, mask_leaves, strict=True)
        return treedef.unflatten(
            select(m, y) if getattr(m, "shape", None) == getattr(x, "shape", ()) else x
            for x, y, m in rows
        )

    def by_path(values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(paths(), values, strict=True))

    def visit(node: Any, late: Any) -> Any:
        if isinstance(node, PackedState):
            return _mask_packed(node, late, by_path(mask_leaves), by_path(leaves), names)
        if isinstance(node, RuleState):
            chosen = {
                name: mask(tree, getattr(late.states, name), f"state {name!r}")
                for name, tree in node.states._asdict().items()
                if tree is not None and (names is None or name in names)
            }
            low = node.low_bits
            if low is not None:  # a part of the parameters
                low = mask(low, late.low_bits, "low_bits")
            return node._replace(states=node.states._replace(**chosen), low_bits=low)
        return mask(node, late) if is_like_params(node) else node

    return jax.tree.map(
        visit,
        inner,
        inner if late is None else late,
        is_leaf=lambda x: isinstance(x, RuleState | PackedState) or is_like_params(x),
    )


def _mask_packed(
    state: PackedState,
    late: PackedState,
    masks: Mapping[str, Any],
    params: Mapping[str, Any],
    names: Sequence[str] | None,
) -> PackedState:
    """`mask_states` where parameters are packed; those without a mask are on everywhere."""
    joined = state.packs.join(masks, lambda shape: jnp.ones(shape, bool))
    shapes = {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in params.items()}
    seen = state.packs.join(shapes)
    return state._replace(inner=mask_states(state.inner, joined, seen, names, late.inner))
