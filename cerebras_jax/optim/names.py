"""What configurations hold: names of classes, numbers as strings, keys of older releases."""

from __future__ import annotations

import inspect
import math
import re
import sys
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from cerebras_jax.checks import is_number
from cerebras_jax.messages import shown
from cerebras_jax.optim.scheduler import Scheduler
from cerebras_jax.optim.shell import ShellOptimizer

_PACKAGE = __name__.partition(".")[0]
_ALIASES = {"chainedlr": "chainedscheduler"}
_MOST_VALUES = 100_000
_MOST_LEVELS = 32


# --- names ----------------------------------------------------------------------------------------


def find_class(name: Any, base: type, where: str = "") -> Any:
    """The subclass of ``base`` called ``name``, in any case; schedulers also without "LR"/"WD".

    This package's classes come before a user's: a class of the same name is passed over with a
    warning. Of several classes of the user's, the last one counts, as in a notebook.

    Args:
      name: the name in the configuration.
      base: `Optimizer`, or a kind of `Scheduler`.
      where: the key that holds the name, for errors.

    Raises:
      TypeError: if the name is not a string.
      ValueError: lists the names there are.
    """
    kind = "scheduler" if issubclass(base, Scheduler) else "optimizer"
    place = f"{where}: " if where else ""
    if not isinstance(name, str):
        raise TypeError(f"{place}the {kind}'s name must be a string, got {shown(name)}")
    suffixes = ("", "lr", "wd", "scheduler") if issubclass(base, Scheduler) else ("",)
    lower = _ALIASES.get(name.lower(), name.lower())
    ours: dict[str, type] = {}
    users: dict[str, type] = {}
    for cls in _subclasses(base):
        (ours if _is_ours(cls) else users)[cls.__name__.lower()] = cls
    found = [
        next((classes[lower + s] for s in suffixes if lower + s in classes), None)
        for classes in (ours, users)
    ]
    if all(found):
        warnings.warn(
            f"{place}{name!r} stands for {_PACKAGE}'s {found[0].__name__}; "  # pyright: ignore
            f"{found[1].__module__}.{found[1].__qualname__} is not used: "  # pyright: ignore
            "give it a name of its own",
            stacklevel=3,
        )
    for cls in found:
        if cls is not None:
            return cls
    names = sorted(c.__name__ for c in (*ours.values(), *users.values()))
    raise ValueError(f"{place}there is no {kind} {shown(name)}; there are {names}")


def is_name_of(name: Any, base: type) -> bool:
    """Whether `find_class` would find it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return find_class(name, base) is not None
    except (TypeError, ValueError):
        return False


def _is_ours(cls: type) -> bool:
    module = sys.modules.get(cls.__module__)
    is_inside = cls.__module__.partition(".")[0] == _PACKAGE
    return is_inside and getattr(module, cls.__name__, None) is cls


def _subclasses(base: type) -> list[type]:
    """All concrete subclasses that a user can name, later definitions last."""
    result = []
    for cls in base.__subclasses__():
        is_generated_base = vars(cls).keys() & {"maker", "schedule_type"}
        is_hidden = cls is ShellOptimizer or cls.__name__.startswith("_")
        if not inspect.isabstract(cls) and not is_generated_base and not is_hidden:
            result.append(cls)
        result += _subclasses(cls)
    return result


# --- values ---------------------------------------------------------------------------------------


def check_plain(where: str, value: Any) -> None:
    """Refuses what no configuration can mean, so that everything else may walk through it.

    Raises:
      TypeError: names the place of a key that is not a string.
      ValueError: names the place of a number beyond float64; and if the value contains itself,
        is nested more than 32 deep, or holds more than 100,000 values.
    """
    left = _MOST_VALUES

    def visit(value: Any, path: tuple[str, ...]) -> None:
        nonlocal left
        left -= 1
        if left < 0 or len(path) > _MOST_LEVELS:
            most = f"hold at most {_MOST_VALUES} values"
            rule = most if left < 0 else f"be nested at most {_MOST_LEVELS} deep"
            raise ValueError(f"{where} must {rule}, it goes beyond at {''.join(path[:8])}")
        if isinstance(value, Mapping):
            for key, child in value.items():
                if not isinstance(key, str):
                    raise TypeError(
                        f"{''.join((where, *path))}: keys must be strings, got {shown(key)}"
                    )
                visit(child, (*path, f".{key}" if len(key) < 80 else f".{shown(key)}"))
        elif isinstance(value, list | tuple):
            for i, child in enumerate(value):
                visit(child, (*path, f"[{i}]"))
        elif isinstance(value, int) and not math.isfinite(_float(value)):
            raise ValueError(f"{''.join((where, *path))} must be finite, got {shown(value)}")

    visit(value, ())


def _float(x: int) -> float:
    try:
        return float(x)
    except OverflowError:
        return math.inf


def arguments_of(
    cls: type, values: Mapping[str, Any], skip: Collection[str], where: str = ""
) -> dict[str, Any]:
    """The values that the constructor takes, coerced; one warning names the others.

    Args:
      cls: an optimizer or a scheduler.
      values: names to configuration values.
      skip: parameters that no configuration gives.
      where: the place of the values, for errors.
    """
    parameters = {k: p for k, p in inspect.signature(cls).parameters.items() if k not in skip}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unused = [k for k in values if k not in parameters and not takes_any]
    if unused:
        warnings.warn(
            f"{cls.__name__} got {len(unused)} unexpected and unused parameters: {unused}.",
            stacklevel=4,
        )
    place = f"{where}: {cls.__name__}: " if where else ""
    return {
        k: _coerce(f"{place}{k}", v, parameters[k]) if k in parameters else v
        for k, v in values.items()
        if k not in unused
    }


def missing_arguments(cls: type, given: Collection[str], skip: Collection[str]) -> list[str]:
    """The constructor's parameters without a default that are not given."""
    return [
        name
        for name, p in inspect.signature(cls).parameters.items()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and name not in given
        and name not in skip
    ]


def rate_key(cls: type) -> str:
    """What the constructor calls the learning rate: ``"lr"``, or, as optax, ``"learning_rate"``."""
    names = inspect.signature(cls).parameters
    return "learning_rate" if "learning_rate" in names and "lr" not in names else "lr"


def _coerce(name: str, value: Any, parameter: inspect.Parameter) -> Any:
    """Strings as the numbers or flags they stand for, unless the argument is a string."""
    if parameter.name == "param_group_tags":
        return _tags(name, value)
    if parameter.name == "state_dtype":
        return value
    annotation = "" if parameter.annotation is parameter.empty else str(parameter.annotation)
    if isinstance(value, list | tuple):
        return [_coerce(f"{name}[{i}]", v, parameter) for i, v in enumerate(value)]
    if isinstance(value, Mapping) and not re.search("^$|dict|Mapping|Any", annotation):
        raise TypeError(f"{name} must be a number, a flag or a list, got {shown(value)}")
    if callable(value) and not re.search("^$|Callable|Number|Any", annotation):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    is_text = "str" in annotation or isinstance(parameter.default, str)
    if not isinstance(value, str) or is_text:
        return value
    if value.lower() in ("none", "null", "~"):
        return None
    if isinstance(parameter.default, bool) or "bool" in annotation:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, got {shown(value)}")
        return value.lower() == "true"
    return to_number(name, value)


def _tags(name: str, value: Any) -> tuple[str | None, ...] | None:
    """Tags as a tuple; None stands for all groups."""
    if value is None:
        return None
    tags = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not tags or not all(tag is None or isinstance(tag, str) for tag in tags):
        raise TypeError(f"{name} must be a tag or a list of tags, got {shown(value)}")
    return tags


def to_number(name: str, value: Any) -> Any:
    """A number, or the number that a string such as ``"1e-6"`` stands for."""
    if not isinstance(value, str):
        if not is_number(value):
            raise ValueError(f"{name} must be a number, got {shown(value)}")
        return value
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"{name} must be a number, got {shown(value)}") from None
    is_whole = re.fullmatch(r"[+-]?\d+", value.strip()) and math.isfinite(number)
    return int(number) if is_whole else number


# --- keys of older releases -----------------------------------------------------------------------


def modern(values: Mapping[str, Any], legacy: Mapping[str, str], owner: str) -> dict[str, Any]:
    """The values under the names of today; a DeprecationWarning for each old name."""
    result = {}
    for key, value in values.items():
        if key in legacy:
            warn_legacy(key, legacy[key], owner)
            if legacy[key] in values:
                raise ValueError(f"{owner}: {key!r} and {legacy[key]!r} are the same argument")
        result[legacy.get(key, key)] = value
    return result


def warn_legacy(old: str, new: str, owner: str) -> None:
    """Says that a key has another name now."""
    warnings.warn(f"{owner}: {old!r} is now {new!r}", DeprecationWarning, stacklevel=5)
