"""Sparsity from the ``sparsity`` section of a recipe, in the spelling of any release."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cerebras_jax import schedules
from cerebras_jax.checks import is_number
from cerebras_jax.sparse.algorithms import GMP, SET, Algorithm, RigL, Static
from cerebras_jax.sparse.selection import Pattern, Sparsity
from cerebras_jax.sparse.values import At, Every, exponential, linear

_ALGORITHMS: dict[str, type[Algorithm]] = {
    "static": Static,
    "gmp": GMP,
    "set": SET,
    "rigl": RigL,
}
_VALUES = ("sparsity", "drop_fraction")
_PLAIN = ("init_method", "balance_in_groups", "balance_out_groups")
_IGNORED = ("add_summaries",)


def configure_sparsity(section: Any, seed: int = 0) -> Sparsity | None:
    """Reads a ``sparsity`` section; None if it says that everything is dense.

    Understood are a number (static); a dict; a list of dicts, each with its own ``param_filter``.
    Keys of a dict:

    * ``algorithm``, in 2.0 ``type``: static (the default), gmp, set or rigl.
    * ``sparsity``, from 2.2 on also ``schedule``: a number; a list, which gives its next value at
      every update; ``{type: constant | linear | exp | power | cosine | cycling | polynomial}``.
    * ``update``, in 2.0 ``schedule``: ``{freq, start, stop}`` or ``{steps}``; in 2.0 also a number
      or a list of steps. 2.0's ``sparsity_schedule`` holds pairs of a step and a sparsity.
    * ``init_method``, ``drop_fraction``, ``balance_in_groups``, ``balance_out_groups``.
    * ``param_filter``: globs for whole names; or 2.0's ``param_name_patterns``: regular
      expressions to search, or a dict from them to values of their own.

    Args:
      section: what the configuration holds.
      seed: of random masks.

    Raises:
      ValueError: names the key, the rule and the value.
      TypeError: if the keys of a ``{type: ...}`` do not fit it.

    >>> section = {"algorithm": "rigl", "sparsity": 0.75, "update": {"freq": 100, "stop": 3584},
    ...            "param_filter": "*linear_layer.weight"}
    >>> configure_sparsity(section).assign({"0.linear_layer.weight": (8, 8), "0.norm.bias": (8,)})
    {'0.linear_layer.weight': RigL(sparsity=0.75, init_method='random', update=Every(freq=100, \
start=0, stop=3584), drop_fraction=0.3, balance_in_groups=None, balance_out_groups=None, \
axes=(-2, -1))}
    """
    groups = tuple(_groups(section, "sparsity"))
    return Sparsity(groups, seed) if groups else None


_Group = tuple[tuple[Pattern, ...] | None, Algorithm]


def _groups(section: Any, where: str) -> Iterator[_Group]:
    """Pairs of patterns (None: the default) and algorithms."""
    if section is None:
        return
    if is_number(section) or isinstance(section, str):
        section = {"sparsity": section}
    if isinstance(section, list | tuple):
        for i, item in enumerate(section):
            yield from _groups(item, f"{where}[{i}]")
        return
    if not isinstance(section, Mapping):
        raise ValueError(f"{where} must be a number, a dict or a list of dicts, got {section!r}")
    if "groups" in section:  # configuration classes nest what files write flat
        yield from _groups(section["groups"], f"{where}.groups")
        return
    section = {**{k: v for k, v in section.items() if k != "params"}, **_nested(section, where)}
    named = section.pop("param_name_patterns", None)
    globs = section.pop("param_filter", None)
    if named is not None and globs is not None:
        raise ValueError(f"{where}: param_filter and param_name_patterns exclude each other")
    if isinstance(named, Mapping):
        for pattern, own in named.items():
            inner = f"{where}.param_name_patterns[{pattern!r}]"
            if not isinstance(own or {}, Mapping):
                raise ValueError(f"{inner} must be a dict of values or null, got {own!r}")
            algorithm = _algorithm(_merged(section, own or {}), inner)
            if algorithm is not None:
                yield (_regex(pattern, inner),), algorithm
        return
    algorithm = _algorithm(section, where)
    if algorithm is None:
        return
    if named is not None:
        where = f"{where}.param_name_patterns"
        yield tuple(_regex(p, where) for p in _strings(named, where)), algorithm
    elif globs is not None:
        yield _strings(globs, f"{where}.param_filter"), algorithm
    else:
        yield None, algorithm


def _nested(section: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    params = section.get("params") or {}
    if not isinstance(params, Mapping):
        raise ValueError(f"{where}.params must be a dict, got {params!r}")
    return params


def _merged(section: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The section's values, and in their place those of one of its groups."""
    if "sparsity_schedule" in own:
        section = {k: v for k, v in section.items() if k not in ("sparsity", "schedule")}
    elif "sparsity" in own or "schedule" in own:
        section = {k: v for k, v in section.items() if k != "sparsity_schedule"}
    return {**section, **own}


def _strings(value: Any, where: str) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{where} must be a string or a list of strings, got {value!r}")
    return tuple(values)


def _regex(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{where}: {pattern!r} is no regular expression: {error}") from None


# --- one algorithm --------------------------------------------------------------------------------


def _algorithm(section: Mapping[str, Any], where: str) -> Algorithm | None:
    values = {k: v for k, v in section.items() if k not in _IGNORED}
    name = values.pop("algorithm", None) or values.pop("type", None) or "static"
    values.pop("type", None)
    cls = _ALGORITHMS.get(str(name).lower())
    if cls is None:
        raise ValueError(f"{where}: algorithm must be one of {list(_ALGORITHMS)}, got {name!r}")
    values = _modern(values, where)
    if "sparsity" not in values:
        raise ValueError(f"{where}: sparsity is missing")
    if values["sparsity"] is None:
        return None
    known = set(cls.__dataclass_fields__) - {"_", "axes"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where}: {name} takes {sorted(known)}, got {unknown}")
    arguments = {k: v for k, v in values.items() if k in _PLAIN}
    for key in _VALUES:
        if key in values:
            arguments[key] = _value(values[key], f"{where}.{key}")
    if values.get("update") is not None:
        arguments["update"] = _update(values["update"], f"{where}.update")
    try:
        return cls(**arguments)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from None


def _modern(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values by the names of 2.4."""
    values = dict(values)
    if "sparsity_schedule" in values:
        both = [k for k in ("sparsity", "schedule", "update") if k in values]
        if both:
            raise ValueError(f"{where}: sparsity_schedule excludes {both}")
        pairs = values.pop("sparsity_schedule")
        if not isinstance(pairs, list | tuple) or not all(
            isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
        ):
            raise ValueError(
                f"{where}: sparsity_schedule must hold [step, sparsity], got {pairs!r}"
            )
        values["update"] = {"steps": [step for step, _ in pairs]}
        values["sparsity"] = [sparsity for _, sparsity in pairs]
    elif "schedule" in values:
        # In 2.0 it says when, beside a sparsity; from 2.2 on it is another name for the sparsity.
        meaning = "update" if "sparsity" in values else "sparsity"
        if meaning in values:
            raise ValueError(f"{where}: schedule is given beside both sparsity and update")
        values[meaning] = values.pop("schedule")
    return values


def _update(update: Any, where: str) -> Every | At:
    if isinstance(update, Every | At):
        return update
    try:
        if isinstance(update, int) and not isinstance(update, bool):
            return Every(update)
        if isinstance(update, list | tuple):
            return At(update)
        if isinstance(update, Mapping) and "steps" in update:
            return At(update["steps"])
        if isinstance(update, Mapping) and ("freq" in update or "type" in update):
            freq = update.get("freq", 1000)  # 2.0's default of {type: FreqSchedule}
            unknown = sorted(set(update) - {"freq", "start", "stop", "type"})
            if not unknown:
                return Every(freq, update.get("start") or 0, update.get("stop"))
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from None
    raise ValueError(f"{where} must be {{freq, start, stop}} or {{steps}}, got {update!r}")


# --- values ---------------------------------------------------------------------------------------


def _cosine(init: float, half_period: int, minimum: float = 0.0) -> schedules.Schedule:
    return schedules.cosine_annealing(init, half_period, minimum)


def _power(init: float, beta: float) -> schedules.Schedule:
    return schedules.multiplicative(init, beta)


def _polynomial(
    init: float, final: float, total_iters: int, power: float = 3.0, start: int = 0
) -> schedules.Schedule:
    curve = schedules.polynomial(init, final, total_iters, power)
    if start == 0:
        return curve
    return schedules.sequential([schedules.constant(init), curve], [start])


_TYPES: dict[str, Callable[..., Any]] = {
    "constant": lambda value: value,
    "cycling": lambda values: list(values),
    "linear": linear,
    "exp": exponential,
    "power": _power,
    "cosine": _cosine,
    "polynomial": _polynomial,
}


def _value(value: Any, where: str) -> Any:
    """A number, a list of numbers, or a schedule."""
    if isinstance(value, list | tuple):
        return [_number(x, f"{where}[{i}]") for i, x in enumerate(value)]
    if not isinstance(value, Mapping):
        return value if callable(value) else _number(value, where)
    arguments = {k: _argument(v, f"{where}.{k}") for k, v in value.items() if k != "type"}
    name = str(value.get("type", "")).lower().removesuffix("hyperparameter")
    if name not in _TYPES:
        raise ValueError(f"{where}: type must be one of {list(_TYPES)}, got {value.get('type')!r}")
    try:
        return _TYPES[name](**arguments)
    except TypeError as error:
        raise TypeError(f"{where}: {name}: {error}") from None


def _argument(value: Any, where: str) -> Any:
    return _value(value, where) if isinstance(value, list | tuple) else _number(value, where)


def _number(value: Any, where: str) -> Any:
    """A number, or the one that a string such as ``"1e-3"`` stands for, as YAML reads it."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    if not is_number(value):
        raise ValueError(f"{where} must be a number, got {value!r}")
    return value
