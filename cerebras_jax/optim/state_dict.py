"""Reading state dicts, ours and other people's: matching, checking, converting."""

import difflib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cerebras_jax.checks import is_traced

# How torch executes a step; says nothing about what is computed.
_EXECUTION_FLAGS = {"foreach", "fused", "capturable", "differentiable"}
_BOOKKEEPING = {"params", "param_names"}
_METADATA = {"name", "tag", "tags", "adjust_learning_rate", "no_weight_decay", "initial_lr"}


class Match(NamedTuple):
    groups: list[Mapping[str, Any]]  # loaded, in our order
    entries: dict[str, Mapping[str, Any]]  # loaded state by our parameter name
    has_state: bool


def match_parameters(state_dict: Mapping[str, Any], ours: Sequence[Mapping[str, Any]]) -> Match:
    """Finds for each of our parameters its entry: by name if all names agree, else by position.

    Raises:
      ValueError: if the dict lacks a part, or groups or sizes differ.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"a state dict is a dict, got {type(state_dict).__name__}")
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"a state dict has the keys 'state' and 'param_groups', no {key!r}")
    loaded = list(state_dict["param_groups"])
    if len(loaded) != len(ours):
        raise ValueError(f"the state dict has {len(loaded)} parameter groups, ours {len(ours)}")
    state = {int(k): v for k, v in state_dict["state"].items()}
    entries: dict[str, Mapping[str, Any]] = {}
    known: set[int] = set()
    for i, (theirs, mine) in enumerate(zip(loaded, ours, strict=True)):
        numbers, names = list(theirs["params"]), list(mine["params"])
        if len(numbers) != len(names):
            raise ValueError(
                f"group {i} of the state dict has {len(numbers)} parameters, ours {len(names)}"
            )
        their_names = theirs.get("param_names")
        if their_names is not None and set(their_names) == set(names):
            names = list(their_names)
        elif their_names is not None:
            warnings.warn(
                f"the state dict's param_names are not ours, so group {i} is matched by position: "
                f"{list(their_names)[:3]} ... as {names[:3]} ...",
                stacklevel=3,
            )
        known |= set(numbers)
        entries |= {n: state[k] for n, k in zip(names, numbers, strict=True) if k in state}
    extra = sorted(set(state) - known)
    if extra:
        raise ValueError(f"the state dict has state for parameters {extra[:5]} of no group")
    return Match(loaded, entries, bool(state))


def check_group(
    group: Mapping[str, Any], defaults: Mapping[str, Any], torch_flags: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of a loaded group that mean something to us.

    Raises:
      ValueError: if a flag of torch asks for an algorithm that this optimizer is not.
    """
    result = {}
    for key, value in group.items():
        if key in _BOOKKEEPING or (key in _EXECUTION_FLAGS and key not in defaults):
            continue
        if key in torch_flags or (key == "maximize" and key not in defaults):
            expected = torch_flags.get(key, False)
            if bool(value) != expected:
                raise ValueError(f"this optimizer has {key}={expected}, got {key}={value}")
            continue
        result[key] = plain_value(value)
    return result


def check_keys(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses a key that looks like a misspelt hyper-parameter; others are the user's own.

    Raises:
      ValueError: names the key that was meant.
    """
    for key in set(group) - set(defaults) - _BOOKKEEPING - _METADATA:
        meant = (
            ["lr"] if key == "learning_rate" else difflib.get_close_matches(key, defaults, 1, 0.8)
        )
        if meant and meant[0] in defaults:
            raise ValueError(f"a parameter group has no {key!r}; did you mean {meant[0]!r}?")


def load_array(name: str, entry: Any, ours: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's loaded states, checked against ours and copied in their dtypes."""
    if entry is None:
        if ours:
            raise ValueError(f"the state dict lacks the state of parameter {name!r}")
        return {}
    missing = sorted(set(ours) - set(entry))
    extra = sorted(k for k in set(entry) - set(ours) if entry[k] is not None)
    if missing or extra:
        raise ValueError(
            f"state of parameter {name!r}: missing {missing}, unexpected {extra}, "
            f"expected {sorted(ours)}"
        )
    result = {}
    for key, like in ours.items():
        if entry[key] is None:  # torch's momentum_buffer before the first step
            result[key] = jnp.zeros_like(like)
            continue
        value = to_numpy(entry[key])
        if value.shape != np.shape(like):
            raise ValueError(
                f"state {key!r} of parameter {name!r} has shape {value.shape}, "
                f"expected {np.shape(like)}; without param_names, position decides which is which"
            )
        if isinstance(like, jax.Array):
            result[key] = jax.device_put(jnp.array(value, like.dtype, copy=True), like.sharding)
        else:
            result[key] = np.array(value, like.dtype)
    return result


def to_numpy(x: Any) -> np.ndarray:
    """A NumPy array from a JAX or NumPy array, a number, or a torch tensor (bfloat16 too)."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.float() if str(x.dtype) == "torch.bfloat16" else x
    return np.asarray(x)


def to_torch(x: Any) -> Any:
    """A torch tensor of a JAX or NumPy array, in the same dtype."""
    import torch  # pyright: ignore[reportMissingImports]

    is_bfloat16 = jnp.result_type(x) == jnp.bfloat16
    array = np.array(x, np.float32 if is_bfloat16 else None)
    tensor = torch.from_numpy(array) if array.ndim else torch.tensor(array.item())
    return tensor.bfloat16() if is_bfloat16 else tensor


def plain_value(value: Any) -> Any:
    """Scalar arrays and tensors as Python numbers; tracers and everything else as they are."""
    if isinstance(value, list | tuple):
        return tuple(plain_value(v) for v in value)
    if is_traced(value) or not hasattr(value, "shape"):
        return value
    return to_numpy(value).item() if tuple(value.shape) == () else value
