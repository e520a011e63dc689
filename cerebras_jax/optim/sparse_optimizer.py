"""Sparse training in the class form: masks in the state, and in state dicts."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cerebras_jax import sharding
from cerebras_jax.checks import is_traced
from cerebras_jax.engine.memory import on_device
from cerebras_jax.formats.state_dict import checked_layout, with_names
from cerebras_jax.messages import shown
from cerebras_jax.optim import entries
from cerebras_jax.optim.entries import MASK, SPARSE_STEP
from cerebras_jax.optim.makers import RuleMaker
from cerebras_jax.optim.masking import Masking
from cerebras_jax.optim.watched import WatchedOptimizer
from cerebras_jax.sparse.entries import layout
from cerebras_jax.sparse.masking import fraction_on, holds_masks, select
from cerebras_jax.sparse.selection import Groups, Sparsity
from cerebras_jax.types import Array


class SparseOptimizer(WatchedOptimizer):
    """An optimizer whose parameters, gradients and states can be masked."""

    _sparsity: Sparsity | None = None

    @property
    def sparsity(self) -> Sparsity | None:
        """What `apply` was given; None: nothing, the optimizer is dense."""
        return self._sparsity

    def apply(self, sparsity: Sparsity | Groups) -> None:
        """Makes the optimizer sparse: prunes its parameters and states now and after every step.

        The masks are the states ``mask``: ``opt.state["dense.kernel"]["mask"]``. They are applied
        as `sparse.sparsify` does. Bounds, skipping and `report` see the gradients that the masks
        leave; a step that is not taken changes no mask. Wrappers (``around=``) see all gradients,
        and all are judged then. A parameter that is set afterwards is pruned by the next step.

        Args:
          sparsity: which parameters, by their names, and how: a `sparse.Sparsity`, or an
            algorithm or a dict that makes one.

        Raises:
          TypeError: if it is neither.
          ValueError: if a pattern matches nothing, an array cannot be cut, or the optimizer is
            sparse already. The optimizer is then as it was.
          RuntimeError: within a traced function.

        >>> from cerebras_jax import optim, sparse
        >>> opt = optim.SGD({"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}, lr=1.0)
        >>> opt.apply(sparse.Static(0.5, init_method="topk"))
        >>> opt.step({"kernel": jnp.ones((2, 2))})
        >>> opt.params["kernel"]
        Array([[ 0., -5.],
               [ 2.,  0.]], dtype=float32)
        """
        chosen = sparsity if isinstance(sparsity, Sparsity) else Sparsity(sparsity)
        with self.lock:
            if self._sparsity is not None:
                raise ValueError(f"the optimizer is sparse already: {self._sparsity}")
            if holds_masks(self._structure.unflatten(self._state)):
                raise ValueError("the optimizer is sparse already: by a wrapper in around=")
            self._regroup()
            params = self._treedef().unflatten(self._values())
            state = self._structure.unflatten(on_device(self._state))
            fitted = self._masking(chosen).fitted(state, params)
            if any(map(is_traced, jax.tree.leaves(fitted))):  # also a mask made of a seed alone
                raise RuntimeError("apply allocates masks: call it outside of traced functions")
            if self.zero_axis is not None:
                fitted = sharding.split_late(fitted, params, self.zero_axis)
            self._take_state(fitted)
            self._sparsity = chosen
            vars(self).pop("_cache", None)
            self._prune()

    def density(self) -> dict[str, Array]:
        """The fraction of entries that are on, by the name of each sparse parameter."""
        with self.lock:
            return {name: fraction_on(mask) for name, mask in self._masks().items()}

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """See `Optimizer.add_param_group`; what the sparsity says of new names holds for them."""
        super().add_param_group(group)
        with self.lock:
            self._prune()

    def _masking(self, sparsity: Sparsity | None = None) -> Masking:
        sparsity = sparsity or self._sparsity
        if sparsity is None:
            return Masking()
        is_rule = isinstance(self.maker, RuleMaker)
        named = tuple(self.state_names_to_sparsify()) if is_rule else ()
        names = tuple((path, name) for name, path in self._paths().items())
        return Masking(sparsity, names, named or None)

    @property
    def _is_sparse(self) -> bool:
        return self._sparsity is not None

    def _masks(self) -> dict[str, Array]:
        """The masks of the sparse parameters."""
        of = self._catalogue().of
        places = {name: of[name][MASK] for name in self._names if MASK in of[name]}
        return entries.read(self._state, places, {})

    def _prune(self) -> None:
        masks = self._masks()
        values = zip(self._names, self._values(), strict=True)
        self._set_values([select(masks.get(name), p) for name, p in values])

    # --- state dicts -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See `Optimizer.state_dict`.

        The states of wrappers are under ``"around"``, by path; what was measured and skipped is
        under ``"guard"``, which is taken over as far as both sides have it. Masks and their step
        are under ``"sparsity"``, in the layout of `sparse.to_entries`.
        """
        with self.lock:
            result = super().state_dict()
            if self._sparsity is None:
                return result
            step = result["around"].pop(SPARSE_STEP)
            if not result["around"]:
                del result["around"]
            return {**result, "sparsity": layout(self._masks(), self._sparsity, int(step))}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], param_names: Iterable[str] | None = None
    ) -> None:
        """See `Optimizer.load_state_dict`; a sparse optimizer takes over masks, and is pruned.

        Masks are matched by the names of their parameters in the state dict.
        """
        names = None if param_names is None else list(param_names)
        with self.lock:
            super().load_state_dict(self._with_masks(with_names(state_dict, names)), names)
            self._prune()

    def _with_masks(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state dict whose masks are where those of other states are."""
        groups, state = checked_layout(state_dict)
        section = state_dict.get("sparsity")
        if self._sparsity is None:
            if section is not None:
                raise ValueError("the state dict is that of a sparse run: call apply before")
            return state_dict
        if section is None:
            raise ValueError("the state dict has no 'sparsity', the masks: load it before apply")
        masks = _masks_of(section)
        numbers = [n for group in groups for n in group["params"]]
        names = [name for group in groups for name in group.get("param_names") or ()]
        number_of = dict(zip(names or self._grouped_names(), numbers, strict=False))
        unknown = [name for name in masks if name not in number_of]
        if unknown:
            raise ValueError(f"the state dict has masks of unknown parameters {shown(unknown)}")
        for name, mask in masks.items():
            number = number_of[name]
            state[number] = {**state.get(number, {}), MASK: mask}
        step = section.get("step")
        around = {**(state_dict.get("around") or {}), SPARSE_STEP: self._shared()[SPARSE_STEP]}
        if step is not None:
            around[SPARSE_STEP] = jnp.asarray(int(step), jnp.int32)
        return {**state_dict, "state": state, "around": around}


def _masks_of(section: Any) -> dict[str, Any]:
    """The masks in a section of a state dict, by name."""
    state = section.get("state") if isinstance(section, Mapping) else None
    if not isinstance(state, Mapping) or not all(
        isinstance(entry, Mapping) for entry in state.values()
    ):
        raise TypeError(
            f"'sparsity' must be a dict with the key 'state', from names to masks, "
            f"got {shown(section)}"
        )
    return {name: entry[MASK] for name, entry in state.items() if MASK in entry}
