"""State dicts in torch's layout: made of entries and groups, matched, checked, and read."""

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cerebras_jax.checks import is_number, is_traced
from cerebras_jax.engine.memory import put
from cerebras_jax.engine.placement import copy_to, is_at_hand
from cerebras_jax.messages import shown, warn_caller
from cerebras_jax.schedules import Schedule

_BOOKKEEPING = {"params", "param_names"}
_METADATA = {"name", "tag", "tags", "adjust_learning_rate", "no_weight_decay", "initial_lr"}

Group = Mapping[str, Any]
Entry = Mapping[str, Any]
"""The states of one parameter by name."""


def to_state_dict(groups: Sequence[Group], entries: Mapping[str, Entry]) -> dict[str, Any]:
    """State and groups in torch's layout; parameters are numbered in the order of the groups.

    Args:
      groups: parameter groups, with their names under ``"params"``.
      entries: states by parameter name.
    """
    order = [name for group in groups for name in group["params"]]
    number = {name: i for i, name in enumerate(order)}
    saved = [
        {
            **{k: _storable(v) for k, v in group.items() if k != "params"},
            "params": [number[name] for name in group["params"]],
            "param_names": list(group["params"]),
        }
        for group in groups
    ]
    return {
        "state": {i: dict(entries.get(name, {})) for i, name in enumerate(order)},
        "param_groups": saved,
    }


class Match(NamedTuple):
    groups: list[Group]  # loaded, in our order
    entries: dict[str, Entry]  # loaded state by our parameter name
    has_state: bool
    by_order: list[list[str]]  # names that the dict does not have, group by group


def match_parameters(state_dict: Mapping[str, Any], ours: Sequence[Group]) -> Match:
    """Finds for each of our parameters its entry: by name if all names are ours, else by position.

    Raises:
      TypeError, ValueError: if a part is missing or of another kind, or groups or sizes differ.
    """
    loaded, state = checked_layout(state_dict)
    numbers = [n for group in loaded for n in group["params"]]
    our_names = [name for group in ours for name in group["params"]]
    their_names = [n for group in loaded for n in group.get("param_names") or ()]
    is_named = all(
        group["params"] and len(group.get("param_names") or ()) == len(group["params"])
        for group in loaded
    )
    if is_named and sorted(their_names) == sorted(our_names):
        by_name = dict(zip(their_names, numbers, strict=True))
        group_of = {
            name: i for i, group in enumerate(loaded) for name in group.get("param_names") or ()
        }
        groups: list[Group] = [_group_for(i, mine, loaded, group_of) for i, mine in enumerate(ours)]
        by_order = []
    else:
        by_name, groups = _by_position(loaded, ours, their_names), loaded
        by_order = [] if their_names else [list(group["params"]) for group in ours]
    extra = sorted(set(state) - set(numbers))
    if extra:
        raise ValueError(f"the state dict has state for parameters {extra[:5]} of no group")
    entries = {n: state[k] for n, k in by_name.items() if k in state}
    return Match(groups, entries, bool(state), by_order)


def with_names(state_dict: Any, param_names: Iterable[str] | None) -> Any:
    """A state dict whose groups have these ``param_names``, group after group.

    Raises:
      ValueError: if there are more or fewer of them than parameters in the groups.
    """
    if param_names is None:
        return state_dict
    loaded, _ = checked_layout(state_dict)
    param_names = param_names if isinstance(param_names, str) else list(param_names)
    count, names = sum(len(group["params"]) for group in loaded), iter(param_names)
    if isinstance(param_names, str) or len(param_names) != count:
        raise ValueError(
            f"param_names must be the {count} names of the state dict's parameters, got "
            f"{shown(param_names)}"
        )
    groups = [{**g, "param_names": list(itertools.islice(names, len(g["params"])))} for g in loaded]
    return {**state_dict, "param_groups": groups}


def warn_of_order(groups: Sequence[Sequence[str]], entries: Mapping[str, Entry]) -> None:
    """Warns if nothing but their order told parameters of a group apart.

    That is so where two have states of the same shapes. Items of a list are in the same order
    everywhere; of other names ours are sorted, and another program's are as they were defined.

    Args:
      groups: the names that were matched by their order, group by group.
      entries: our states by parameter name.
    """
    doubtful: list[str] = []
    for group in groups:
        alike: dict[Any, list[str]] = {}
        for name in group:
            shapes = [(k, np.shape(v)) for k, v in sorted(entries[name].items()) if np.ndim(v)]
            if shapes:
                alike.setdefault(tuple(shapes), []).append(name)
        for names in alike.values():
            if not all(_is_listed_before(a, b) for a, b in itertools.pairwise(names)):
                doubtful += names
    if doubtful:
        warn_caller(
            "the state dict has no names of parameters, so their order told which state is whose, "
            f"and ours is sorted: {shown(doubtful)} have the same shapes and may have each "
            "other's states; load_state_dict(..., param_names=[...]) says the state dict's order"
        )


def _is_listed_before(a: str, b: str) -> bool:
    """Whether two names first differ in the index of a list, in its order."""
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            return x.isdecimal() and y.isdecimal() and int(x) < int(y)
    return False


def checked_layout(state_dict: Any) -> tuple[list[Group], dict[int, Entry]]:
    """Groups and state of a state dict, whose numbers are ints.

    Raises:
      TypeError, ValueError: if a part is missing, or is of another kind than in torch's layout.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"a state dict is a dict, got {type(state_dict).__name__}")
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(
                f"a state dict has the keys 'state' and 'param_groups', no {key!r}; got "
                f"{shown(list(state_dict))}"
            )
    loaded, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(loaded, list | tuple):
        raise TypeError(f"'param_groups' must be a list of dicts, got {shown(loaded)}")
    for i, group in enumerate(loaded):
        if not isinstance(group, Mapping) or not all(isinstance(k, str) for k in group):
            raise TypeError(f"param_groups[{i}] must be a dict with names, got {shown(group)}")
        for key in ("params", "param_names"):
            members = group.get(key, () if key == "param_names" else None)
            kind = str if key == "param_names" else int
            is_list = isinstance(members, list | tuple) or (members is None and kind is str)
            if not is_list or not all(
                isinstance(m, kind) and not isinstance(m, bool) for m in members or ()
            ):
                raise TypeError(
                    f"param_groups[{i}][{key!r}] must be a list of {kind.__name__}, "
                    f"got {shown(members)}"
                )
    numbers = [n for group in loaded for n in group["params"]]
    if len(set(numbers)) < len(numbers):
        raise ValueError("a parameter of the state dict is in several of its param_groups")
    if not isinstance(state, Mapping):
        raise TypeError(f"'state' must be a dict, got {shown(state)}")
    result = {}
    for key, entry in state.items():
        if isinstance(key, bool) or not (isinstance(key, int) or str(key).isdecimal()):
            raise TypeError(f"keys of 'state' must be numbers of parameters, got {shown(key)}")
        if not isinstance(entry, Mapping) or not all(isinstance(k, str) for k in entry):
            raise TypeError(f"state[{key!r}] must be a dict with names, got {shown(entry)}")
        result[int(key)] = entry
    return list(loaded), result


def check_rule(state_dict: Mapping[str, Any], ours: str) -> None:
    """Refuses a state dict that says it is another algorithm's.

    Raises:
      TypeError: if what it says is no name.
      ValueError: says whose it is.
    """
    theirs = state_dict.get("optimizer")
    if theirs is not None and not isinstance(theirs, str):
        raise TypeError(f"'optimizer' must be the name of an algorithm, got {shown(theirs)}")
    if problem := other_rule("the state dict", theirs, ours):
        raise ValueError(f"{problem}; without its entry 'optimizer' it is taken if its states fit")


def other_rule(what: str, theirs: str | None, ours: str) -> str | None:
    """Why the states of one algorithm are not another's, if they are known to be."""
    if theirs in (None, ours):
        return None
    return f"{what} was saved by {theirs}, this is {ours}, whose states mean something else"


def _group_for(
    i: int, mine: Group, loaded: Sequence[Group], group_of: Mapping[str, int]
) -> dict[str, Any]:
    """The values that our group takes from the groups its parameters were in."""
    sources = [loaded[j] for j in dict.fromkeys(group_of[name] for name in mine["params"])]
    if not sources:
        return {k: v for k, v in mine.items() if k != "params"}
    values = [{k: plain_value(v) for k, v in g.items() if k not in _BOOKKEEPING} for g in sources]
    for other in values[1:]:
        differing = sorted(
            k for k in set(values[0]) | set(other) if _differ(values[0].get(k), other.get(k))
        )
        if differing:
            raise ValueError(
                f"param_groups[{i}] joins groups of the state dict that differ in {differing}: "
                f"{shown(values[0].get(differing[0]))}, {shown(other.get(differing[0]))}"
            )
    return values[0]


def _differ(a: Any, b: Any) -> bool:
    return type(a) is not type(b) or bool(np.any(np.asarray(a != b)))


def _by_position(
    loaded: Sequence[Group], ours: Sequence[Group], their_names: Sequence[str]
) -> dict[str, int]:
    if len(loaded) != len(ours):
        raise ValueError(f"the state dict has {len(loaded)} parameter groups, ours {len(ours)}")
    by_name: dict[str, int] = {}
    for i, (theirs, mine) in enumerate(zip(loaded, ours, strict=True)):
        numbers, names = list(theirs["params"]), list(mine["params"])
        if len(numbers) != len(names):
            raise ValueError(
                f"group {i} of the state dict has {len(numbers)} parameters, ours {len(names)}"
            )
        found = theirs.get("param_names")
        if found and sorted(found) == sorted(names):
            names = list(found)
        by_name |= dict(zip(names, numbers, strict=True))
    if their_names:
        warn_caller(
            "the state dict's param_names are not ours, so it is matched by position: "
            f"{list(their_names)[:3]} ... as {list(by_name)[:3]} ..."
        )
    return by_name


def check_keys(group: Group, defaults: Mapping[str, Any]) -> None:
    """Refuses a key that looks like a misspelt hyper-parameter; others are the user's own.

    Raises:
      TypeError: if a key is no string.
      ValueError: names the key that was meant.
    """
    for key in list(group):
        if not isinstance(key, str):
            raise TypeError(f"keys of a parameter group are strings, got {shown(key)}")
        if key in defaults or key in _BOOKKEEPING | _METADATA:
            continue
        meant = difflib.get_close_matches(key, defaults, 1, 0.8)
        rates = {"lr", "learning_rate"}
        if key in rates:
            meant = [k for k in rates if k in defaults]
        if meant:
            raise ValueError(f"a parameter group has no {key!r}; did you mean {meant[0]!r}?")


def load_array(name: str, entry: Any, ours: Entry) -> dict[str, Any]:
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
    return {key: _load_one(key, name, entry[key], like) for key, like in ours.items()}


def _load_one(key: str, name: str, value: Any, like: Any) -> Any:
    if value is None:  # torch's momentum_buffer before the first step
        return jnp.zeros_like(like)
    try:
        array = value if isinstance(value, jax.Array) else to_numpy(value)
    except (TypeError, ValueError):  # such as lists of unequal lengths
        array = np.array(None)
    if array.dtype == object or not (
        jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool
    ):
        raise TypeError(f"state {key!r} of parameter {name!r} must be an array, got {shown(value)}")
    if array.shape != np.shape(like):
        raise ValueError(
            f"state {key!r} of parameter {name!r} has shape {array.shape}, "
            f"expected {np.shape(like)}; parameters are matched by param_names, else by position"
        )
    if jnp.issubdtype(array.dtype, jnp.complexfloating) and not jnp.iscomplexobj(like):
        raise TypeError(
            f"state {key!r} of parameter {name!r} is {array.dtype}, expected {like.dtype}"
        )
    return _placed(array, like) if isinstance(like, jax.Array) else np.array(array)


def _placed(array: Any, like: jax.Array) -> jax.Array:
    """A copy in the dtype and the sharding of ours; no device gets more than its part."""
    if isinstance(array, jax.Array) or len(like.sharding.device_set) == 1:
        new = jnp.array(array, like.dtype, copy=True)
        # One that was free to move stays so, or a step would be compiled once more.
        return put(new, like.sharding) if like.committed or new.committed else new
    return copy_to(array.astype(like.dtype), like.sharding)


def load_shared(given: Any, ours: Mapping[str, Any]) -> dict[str, Any]:
    """The states of wrappers, by path, checked against ours; without any given, ours."""
    if given is None and not ours:
        return {}
    if given is None:
        raise ValueError(
            f"the state dict lacks 'around', the states {sorted(ours)[:5]} of wrappers"
        )
    if not isinstance(given, Mapping):
        raise TypeError(f"'around' must be a dict, got {shown(given)}")
    missing, extra = sorted(set(ours) - set(given)), sorted(map(str, set(given) - set(ours)))
    if missing or extra:
        raise ValueError(f"states of wrappers: missing {missing[:5]}, unexpected {extra[:5]}")
    return {path: _load_one(path, "around", given[path], like) for path, like in ours.items()}


def load_known(given: Any, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Of what was measured, that which both sides have, in our shapes; the rest stays ours."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"'guard' must be a dict, got {shown(given)}")
    fits = {k: v for k, v in ours.items() if k in given and np.shape(given[k]) == v.shape}
    return {key: _load_one(key, "guard", given[key], like) for key, like in fits.items()}


def to_numpy(x: Any) -> np.ndarray:
    """A NumPy array from a JAX or NumPy array, a number, or a torch tensor (bfloat16 too).

    Of an array of which other processes hold parts it is all: every process must call this.
    """
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.float() if str(x.dtype) == "torch.bfloat16" else x
    if not is_at_hand(x):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _storable(value: Any) -> Any:
    """A value that any file can hold: functions, such as schedules, as their repr."""
    if isinstance(value, list | tuple):
        return tuple(_storable(v) for v in value)
    return repr(value) if callable(value) else plain_value(value)


def plain_value(value: Any) -> Any:
    """Scalar arrays and tensors as Python numbers; functions, which no file can hold, as None."""
    if isinstance(value, list | tuple):
        return tuple(plain_value(v) for v in value)
    if not hasattr(value, "shape"):
        return None if callable(value) and not is_plain_schedule(value) else value
    if is_traced(value):
        return value
    return to_numpy(value).item() if tuple(value.shape) == () else value


def is_repr(value: Any) -> bool:
    """Whether a value stands for a function or a schedule, as `to_state_dict` writes them."""
    return isinstance(value, str) and value.endswith((")", ">"))


def with_functions(value: Any, ours: Any) -> Any:
    """A loaded value, with ours where a function was saved: None or its repr stand for it."""
    if is_repr(value) and (callable(ours) or is_number(ours)):
        if value != repr(ours):
            warn_caller(f"{value} was saved, which only a program can hold; {ours!r} is kept")
        return ours
    if isinstance(value, list | tuple) and isinstance(ours, list | tuple):
        if len(value) == len(ours):
            return type(ours)(with_functions(v, o) for v, o in zip(value, ours, strict=True))
        return value
    return ours if value is None and callable(ours) else value


def is_plain_schedule(value: Any) -> bool:
    """Whether a schedule is a value: one of ours that holds no function."""
    if not isinstance(value, Schedule):
        return False
    parts = jax.tree.leaves(list(vars(value).values()), is_leaf=callable)
    return all(not callable(x) or is_plain_schedule(x) for x in parts)
