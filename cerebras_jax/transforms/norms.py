"""Norms of gradients, updates and parameters, one for each parameter, for logging."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cerebras_jax.engine.placement import beside, home_of
from cerebras_jax.engine.trees import align, leaf_paths
from cerebras_jax.transforms.clipping import global_norm
from cerebras_jax.transforms.loss_scale import unscale
from cerebras_jax.types import Array

KINDS = ("gradients", "updates", "parameters")


@jax.tree_util.register_pytree_node_class
class NamedNorms(Mapping[str, Array]):
    """A norm for each parameter, by its name: a float32 scalar, not read from the device.

    One vector is behind it, so that a step of a thousand parameters has one more result, not a
    thousand. It is a pytree with that vector as its only leaf.

    Args:
      values: float32 vector, in the order of the names; more axes in front of it stay.
      names: of the parameters.

    >>> norms = NamedNorms(jnp.array([0.5, 2.0]), ("bias", "kernel"))
    >>> norms["kernel"], dict(norms) == {"bias": 0.5, "kernel": 2.0}
    (Array(2., dtype=float32), True)
    """

    def __init__(self, values: Array, names: Sequence[str]):
        self.values_vector = values
        self.names = tuple(names)

    def __getitem__(self, name: str) -> Array:
        if name not in self.names:
            raise KeyError(f"no parameter is called {name!r}")
        return self.values_vector[..., self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"NamedNorms({self.values_vector}, {list(self.names)})"

    __eq__ = object.__eq__
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

    def tree_flatten(self) -> tuple[tuple[Array], tuple[str, ...]]:
        """For JAX: the vector, and the names."""
        return (self.values_vector,), self.names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], children: Sequence[Any]) -> "NamedNorms":
        """For JAX: the inverse of `tree_flatten`."""
        return cls(children[0], names)


class Norms(NamedTuple):
    """Euclidean norms by parameter name, in float32; None for what is not measured.

    Attributes:
      gradients: of the gradients, unscaled and before clipping; 0 where there is none.
      updates: of what the step added to the parameters; 0 in a step that was not taken.
      parameters: of the parameters before the step.
    """

    gradients: NamedNorms | None
    updates: NamedNorms | None
    parameters: NamedNorms | None

    @classmethod
    def start(cls, names: Sequence[str], kinds: Sequence[str] = KINDS) -> "Norms":
        """Zeros, before the first step.

        Args:
          names: of the parameters.
          kinds: what is measured, of `KINDS`.
        """

        def zeros() -> NamedNorms:
            return NamedNorms(jnp.zeros(len(names), jnp.float32), names)

        return cls(*(zeros() if kind in kinds else None for kind in KINDS))

    def of(self, gradients: Any, updates: Any, parameters: Any) -> "Norms":
        """The norms of a step, of what is measured.

        Args:
          gradients, updates, parameters: lists of arrays, None among them, in the order of the
            names.
        """
        given = (gradients, updates, parameters)
        return Norms(
            *(
                None if old is None else NamedNorms(_vector(leaves), old.names)
                for old, leaves in zip(self, given, strict=True)
            )
        )

    def called(self, names: Sequence[str]) -> "Norms":
        """The same norms under other names, in the same order."""
        return Norms(*(None if x is None else NamedNorms(x.values_vector, names) for x in self))


class NormsState(NamedTuple):
    """State of `measure_norms`.

    Attributes:
      inner: the state of what is measured.
      norms: those of the last step; zeros before the first.
    """

    inner: Any
    norms: Norms


def measure_norms(
    tx: optax.GradientTransformation,
    kinds: Sequence[str] = KINDS,
    *,
    returns_params: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Notes in its state the norm of every gradient, of every update, and of every parameter.

    Nothing is changed: gradients go in and updates come out as they are. The norms are those of
    whole arrays, computed in float32 whatever their dtype. Around `guard` it notes the gradients
    before clipping, and updates of 0 where a step is not taken; the ratio of an update's norm to
    its parameter's is what to watch.

    ``update`` needs the parameters, and takes ``loss_scale``, which the gradients are divided by
    for their norm; it and all other extra arguments are passed on.

    Args:
      tx: what to measure.
      kinds: what to note: of "gradients", "updates" and "parameters".
      returns_params: ``tx`` returns new parameters in place of updates, as `guard` can; the
        updates are what they differ by from the old ones.

    Returns:
      An optax pair with a `NormsState`.

    Raises:
      TypeError, ValueError: if ``kinds`` are others; from ``update``, without parameters.

    >>> tx = measure_norms(optax.sgd(0.5))
    >>> params = {"b": jnp.zeros(1), "w": jnp.array([3.0, 4.0])}
    >>> updates, state = tx.update({"b": None, "w": params["w"]}, tx.init(params), params)
    >>> state.norms.updates["w"], state.norms.gradients["b"]
    (Array(2.5, dtype=float32), Array(0., dtype=float32))
    """
    kinds = check_kinds(kinds)
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> NormsState:
        norms = Norms.start(leaf_paths(params), kinds)
        return beside(NormsState(inner.init(params), norms), home_of(params))

    def update(
        grads: Any, state: NormsState, params: Any = None, **extra: Any
    ) -> tuple[Any, NormsState]:
        if params is None:
            raise ValueError("update needs the parameters: call update(grads, state, params)")
        out, new_inner = inner.update(grads, state.inner, params, **extra)
        old, treedef = jax.tree.flatten(params)
        seen, updates = (
            align(treedef, tree, what, lambda: leaf_paths(params))
            for tree, what in [(grads, "the gradients"), (out, "the updates")]
        )
        if returns_params:
            updates = _differences(updates, old)
        norms = state.norms.of(unscale(seen, extra.get("loss_scale")), updates, old)
        return out, NormsState(new_inner, norms)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def check_kinds(kinds: Any) -> tuple[str, ...]:
    """What is to be measured, of `KINDS`; True stands for all of them, False and None for none.

    Raises:
      TypeError, ValueError: if it is something else.
    """
    if kinds is None or isinstance(kinds, bool):
        return KINDS if kinds else ()
    if not isinstance(kinds, list | tuple):
        raise TypeError(f"measure_norms must be True, False or some of {KINDS}, got {kinds!r}")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"measure_norms must be True, False or some of {KINDS}, got {kinds!r}")
    return tuple(kind for kind in KINDS if kind in kinds)


def _differences(new: Sequence[Array], old: Sequence[Array]) -> list[Array]:
    """What was added to arrays, in at least float32."""

    def wide(x: Array) -> Array:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    return [wide(a) - wide(b) for a, b in zip(new, old, strict=True)]


@jax.jit
def _vector(leaves: Sequence[Any]) -> Array:
    """The norms of arrays; 0 of None."""
    if not leaves:
        return jnp.zeros(0, jnp.float32)
    return jnp.stack([global_norm(x).astype(jnp.float32) for x in leaves])
