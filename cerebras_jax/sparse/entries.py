"""Checkpoints of masks: the layout of release 2.0, and the buffers of 2.2 and later.

2.0 keeps ``{"state": {parameter name: {"mask": array}}, "param_groups": [...], "step": ...}`` under
``"sparsity"`` in the optimizer's state dict. From 2.2 on a mask is a buffer of the model,
``<parameter name>_mask``, and ``"sparsity"`` at the top of the checkpoint has the steps.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cerebras_jax.engine.trees import align, leaf_paths
from cerebras_jax.sparse.algorithms import SET, Algorithm, Dynamic
from cerebras_jax.sparse.masking import SparseState, mask_states, pack
from cerebras_jax.sparse.selection import Sparsity, shorten
from cerebras_jax.types import Params

_SUFFIX = "_mask"


def to_entries(
    state: SparseState, sparsity: Sparsity, params: Params, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """The masks and the step in the layout of 2.0.

    Args:
      state: of `sparsify`.
      sparsity: what `sparsify` was given.
      params: the parameters, or their shapes.
      names: as given to `sparsify`.
    """
    return layout(_named_masks(state, params, names), sparsity, int(state.step))


def layout(masks: Mapping[str, Any], sparsity: Sparsity, step: int) -> dict[str, Any]:
    """The layout of 2.0 of masks by the names of their parameters, after so many steps."""
    algorithms = sparsity.assign({name: mask.shape for name, mask in masks.items()})
    members: dict[Algorithm, list[str]] = {}
    for name, algorithm in algorithms.items():
        members.setdefault(algorithm, []).append(name)
    groups = [
        {
            "name": own[0] if len(own) == 1 else f"group_{i + 1}",
            "param_names": tuple(own),
            **_values(algorithm, step),
        }
        for i, (algorithm, own) in enumerate(members.items())
    ]
    return {
        "state": {name: {"mask": mask} for name, mask in masks.items()},
        "param_groups": groups,
        "step": np.asarray(step, np.int64),
    }


def _values(algorithm: Algorithm, step: int) -> dict[str, Any]:
    """What 2.0 stores of a group: a constant of static sparsity, or where a list is."""
    if not isinstance(algorithm, Dynamic):
        return {"sparsity": algorithm.sparsity}
    used = algorithm.update.count(step + 1)
    result = {"sparsity": _place(algorithm.sparsity, used)}
    if isinstance(algorithm, SET):
        result["drop_fraction"] = _place(algorithm.drop_fraction, used - algorithm.starts_sparse)
    return result


def _place(value: Any, used: int) -> dict[str, Any]:
    return {"step": np.asarray(used % len(value), np.int64)} if isinstance(value, tuple) else {}


def from_entries(
    entries: Mapping[str, Any],
    state: SparseState,
    params: Params,
    names: Sequence[str] | None = None,
    states: Sequence[str] | None = None,
) -> SparseState:
    """A state with the masks and the step of a checkpoint, its inner states masked by them.

    Where a list of values is follows from the step, so what the file says of it is not read. Prune
    the parameters afterwards: ``params = sparse.prune(params, state)``.

    Args:
      entries: in the layout of 2.0; without ``"step"`` (static sparsity) the state keeps its own.
      state: of `sparsify`, made for these parameters.
      params: the parameters, or their shapes.
      names: as given to `sparsify`.
      states: as given to `sparsify`.

    Raises:
      ValueError: names the parameters whose mask is missing, unexpected or of another shape.
    """
    old = _named_masks(state, params, names)
    found = {name: entry["mask"] for name, entry in entries["state"].items() if "mask" in entry}
    for word, wrong in (
        ("no mask of", [name for name in old if name not in found]),
        ("masks of the unexpected parameters", [name for name in found if name not in old]),
    ):
        if wrong:
            raise ValueError(f"the checkpoint has {word} {shorten(wrong)}")
    for name, mask in old.items():
        if np.shape(found[name]) != mask.shape:
            raise ValueError(
                f"mask of {name!r} has shape {np.shape(found[name])}, its parameter {mask.shape}"
            )
    all_names = leaf_paths(params) if names is None else names
    masks = jax.tree.structure(params).unflatten(
        jax.device_put(np.asarray(found[name]) != 0, old[name].sharding) if name in old else None
        for name in all_names
    )
    step = entries.get("step")
    step = state.step if step is None else jnp.asarray(int(step), jnp.int32)
    inner = mask_states(state.inner, masks, params, states)
    return SparseState(step, jax.tree.map(pack, masks), inner)


def read_buffers(model: Mapping[str, Any], section: Any = None) -> dict[str, Any]:
    """The masks of a checkpoint of 2.2 or later, in the layout of 2.0.

    Args:
      model: names to arrays, the masks ``<parameter name>_mask`` among them.
      section: what the checkpoint has under ``"sparsity"``: the state of an algorithm, or a list.

    Raises:
      ValueError: if there is no mask, or if the algorithms are not at the same step.

    >>> read_buffers({"fc.weight": np.ones((2,)), "fc.weight_mask": np.array([True, False])},
    ...              [{"step": np.int64(7), "sparsity": {}}])
    {'state': {'fc.weight': {'mask': array([ True, False])}}, 'param_groups': [], 'step': 7}
    """
    state = {
        name.removesuffix(_SUFFIX): {"mask": value}
        for name, value in model.items()
        if name.endswith(_SUFFIX) and name.removesuffix(_SUFFIX) in model
    }
    if not state:
        raise ValueError(f"the checkpoint has no buffer *{_SUFFIX} of {shorten(list(model))}")
    sections = section if isinstance(section, list | tuple) else [section]
    steps = {int(x["step"]) for x in sections if isinstance(x, Mapping) and "step" in x}
    if len(steps) > 1:
        raise ValueError(f"the algorithms of the checkpoint are at different steps: {steps}")
    return {"state": state, "param_groups": [], **({"step": steps.pop()} if steps else {})}


def _named_masks(
    state: SparseState, params: Params, names: Iterable[str] | None
) -> dict[str, jax.Array]:
    treedef = jax.tree.structure(params)
    leaves = align(treedef, state.masks, "the masks", lambda: leaf_paths(params))
    names = leaf_paths(params) if names is None else names
    return {name: m for name, m in zip(names, leaves, strict=True) if m is not None}
