"""Optimizers, schedulers and parameter groups from the values of a configuration."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from cerebras_jax.checks import check, is_number
from cerebras_jax.optim import lr_scheduler
from cerebras_jax.optim.lr_scheduler import LRScheduler
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.optim.param_groups import ParamGroups, matching
from cerebras_jax.optim.scheduler import Scheduler
from cerebras_jax.optim.shell import ShellOptimizer
from cerebras_jax.optim.sources import make_source

_LEGACY_OPTIMIZER = {"weight_decay_rate": "weight_decay", "epsilon": "eps"}
_LEGACY_SCHEDULER = {
    "steps": "total_iters",
    "decay_steps": "total_iters",
    "boundaries": "milestones",
    "values": "learning_rates",
}
_DEFAULT_LR = 0.1  # where an optimizer has no default and a schedule will set it
_CHAINED = {"chained", "chainedlr", "chainedscheduler"}


# --- optimizers -----------------------------------------------------------------------------------


def configure_optimizer(optimizer_type: str, params: Any, **kwargs: Any) -> Optimizer:
    """An optimizer by name, with the keyword arguments that its signature takes.

    Args:
      optimizer_type: a class name in any case: ``"AdamW"``, ``"adamw"``, ``"AdaFactor"``, or the
        name of one's own subclass of `Optimizer`.
      params: what the optimizer's constructor takes.
      **kwargs: hyper-parameters; numbers may be strings such as ``"1e-6"``. ``learning_rate`` is
        another name of ``lr`` when it is a number; a schedule there leaves ``lr`` at its
        default. What the signature lacks is ignored with one warning.

    Raises:
      ValueError: if there is no such optimizer, or a value is out of range.

    >>> import jax.numpy as jnp
    >>> opt = configure_optimizer("adamw", jnp.ones(3), learning_rate="1e-4", betas=[0.9, 0.95])
    >>> opt.param_groups[0]["lr"], opt.param_groups[0]["betas"]
    (0.0001, (0.9, 0.95))
    """
    cls = find_class(optimizer_type, Optimizer)
    return cls(params, **optimizer_arguments(cls, kwargs))


def optimizer_arguments(cls: type[Optimizer], values: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments of ``cls`` among configuration values, coerced."""
    values = _modern(values, _LEGACY_OPTIMIZER, cls.__name__)
    if "beta1" in values and "beta2" in values:
        _warn_legacy("beta1, beta2", "betas", cls.__name__)
        values["betas"] = (values.pop("beta1"), values.pop("beta2"))
    signature = inspect.signature(cls).parameters
    learning_rate = values.pop("learning_rate", None)
    if isinstance(learning_rate, str) or is_number(learning_rate):
        if "lr" in values and to_number("lr", values["lr"]) != to_number("lr", learning_rate):
            raise ValueError(f"lr={values['lr']!r} and learning_rate={learning_rate!r} differ")
        values["lr"] = learning_rate
    if "lr" in signature and "lr" not in values and signature["lr"].default is inspect._empty:
        values["lr"] = None if values.get("relative_step") in (True, "true") else _DEFAULT_LR
    return _accepted(cls, values, skip={"params"})


def find_class(name: str, base: type) -> Any:
    """The subclass of ``base`` called ``name``, in any case; schedulers also without "LR"/"WD".

    Raises:
      ValueError: lists the names there are.
    """
    classes = {c.__name__: c for c in _subclasses(base) if not c.__name__.startswith("_")}
    folded = {n.lower(): c for n, c in classes.items()}
    wanted = str(name).lower()
    suffixes = ("", "lr", "wd", "scheduler") if issubclass(base, Scheduler) else ("",)
    for suffix in suffixes:
        if wanted + suffix in folded:
            return folded[wanted + suffix]
    kind = "scheduler" if issubclass(base, Scheduler) else "optimizer"
    raise ValueError(f"there is no {kind} {name!r}; there are {sorted(classes)}")


def _subclasses(base: type) -> list[type]:
    """All concrete subclasses that a user can name, later definitions last."""
    result = []
    for cls in base.__subclasses__():
        is_generated_base = vars(cls).keys() & {"maker", "schedule_type"}
        is_shell = cls is ShellOptimizer
        if not inspect.isabstract(cls) and not is_generated_base and not is_shell:
            result.append(cls)
        result += _subclasses(cls)
    return result


# --- schedulers -----------------------------------------------------------------------------------


def configure_lr_scheduler(
    optimizer: Optimizer,
    learning_rate: Any,
    adjust_learning_rate: Mapping[str, Any] | None = None,
) -> Any:
    """The scheduler that a ``learning_rate`` value describes.

    Args:
      optimizer: the optimizer to schedule.
      learning_rate: a number (ConstantLR); a dict with ``scheduler`` and its arguments; a list
        of such dicts (one after another for ``total_iters`` steps each, or multiplied if an
        entry has ``main_scheduler: ChainedLR``); the nested form ``{"CosineDecayLR": {...}}``;
        or None for no scheduler.
      adjust_learning_rate: if given, each group's own ``adjust_learning_rate`` (see
        `configure_param_groups`) multiplies the schedule.

    Returns:
      A scheduler, or None.

    Raises:
      ValueError: names the entry, the rule and the value.

    >>> import jax.numpy as jnp
    >>> from cerebras_jax import optim
    >>> opt = optim.SGD(jnp.ones(3), lr=1.0)
    >>> configure_lr_scheduler(opt, [
    ...     {"scheduler": "Linear", "initial_learning_rate": 0.0, "end_learning_rate": 0.1,
    ...      "total_iters": 10},
    ...     {"scheduler": "CosineDecay", "initial_learning_rate": 0.1, "end_learning_rate": 0.0,
    ...      "total_iters": 90},
    ... ]).schedule(10)
    0.1
    """
    scheduler = configure_scheduler(optimizer, learning_rate, LRScheduler)
    if not adjust_learning_rate or scheduler is None:
        return scheduler
    if isinstance(scheduler, lr_scheduler.ChainedScheduler):
        raise ValueError("adjust_learning_rate cannot be combined with a chained scheduler")
    return lr_scheduler.ScalePerParamLR(optimizer, scheduler)


def configure_scheduler(
    optimizer: Optimizer, value: Any, base: type[Scheduler], where: str = "learning_rate"
) -> Any:
    """The scheduler of kind ``base`` that a configuration value describes."""
    if value is None:
        return None
    if isinstance(value, str) or is_number(value):
        return find_class("Constant", base)(optimizer, to_number(where, value))
    if isinstance(value, Mapping):
        return _one_scheduler(optimizer, value, base, where)
    if isinstance(value, list | tuple) and value:
        return _scheduler_list(optimizer, value, base, None, {}, where=where)
    raise ValueError(
        f"{where} must be a number, a dict with 'scheduler', or a list of them, got {value!r}"
    )


def _one_scheduler(optimizer: Optimizer, entry: Any, base: type[Scheduler], where: str) -> Any:
    name, values = _named(entry, where)
    cls = find_class(name, base)
    if "schedulers" in values:
        is_chain = cls.__name__.lower() in _CHAINED
        children = values["schedulers"]
        if not isinstance(children, list | tuple) or not children:
            raise ValueError(f"{where}: schedulers must be a list of schedulers, got {children!r}")
        extra = {k: v for k, v in values.items() if k not in ("schedulers", "milestones")}
        milestones = None if is_chain else values.get("milestones")
        return _scheduler_list(optimizer, children, base, milestones, extra, is_chain, where)
    values = _modern(values, _LEGACY_SCHEDULER, cls.__name__)
    values.pop("main_scheduler", None)
    parameters = inspect.signature(cls).parameters
    if "total_iters" not in parameters:
        values.pop("total_iters", None)  # it only says how long the entry lasts
    arguments = _accepted(cls, values, skip={"optimizer"})
    missing = [
        n
        for n, p in parameters.items()
        if p.default is p.empty
        and p.kind is p.POSITIONAL_OR_KEYWORD
        and n not in arguments
        and n != "optimizer"
    ]
    if missing:
        raise ValueError(f"{where}: {cls.__name__} needs {missing}, got {sorted(arguments)}")
    try:
        return cls(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {cls.__name__}: {error}") from None


def _scheduler_list(
    optimizer: Optimizer,
    entries: Sequence[Any],
    base: type[Scheduler],
    milestones: Sequence[int] | None,
    extra: Mapping[str, Any],
    is_chain: bool = False,
    where: str = "learning_rate",
) -> Any:
    mains = {
        str(e["main_scheduler"]).lower()
        for e in entries
        if isinstance(e, Mapping) and e.get("main_scheduler") is not None
    }
    unknown = mains - _CHAINED - {"sequential", "sequentiallr"}
    if unknown:
        raise ValueError(f"main_scheduler must be SequentialLR or ChainedLR, got {sorted(unknown)}")
    is_chain = is_chain or bool(mains & _CHAINED)
    children = [
        _one_scheduler(optimizer, entry, base, f"{where}[{i}]") for i, entry in enumerate(entries)
    ]
    if len(children) == 1:
        return children[0]
    if is_chain:
        return find_class("Chained", base)(children)
    if milestones is None:
        milestones, total = [], 0
        for i, entry in enumerate(entries[:-1]):
            total += _total_iters(entry, f"{where}[{i}]")
            milestones.append(total)
    return find_class("Sequential", base)(optimizer, children, milestones, **extra)


def _total_iters(entry: Any, where: str) -> int:
    _, values = _named(entry, where)
    values = {_LEGACY_SCHEDULER.get(k, k): v for k, v in values.items()}
    total = values.get("total_iters")
    if total is None and "schedulers" in values:
        return sum(_total_iters(e, where) for e in values["schedulers"])
    number: Any = to_number("total_iters", total) if isinstance(total, str) else total
    if not is_number(number) or float(number) != int(number) or number <= 0:
        raise ValueError(
            f"{where}: total_iters must be a positive whole number on every entry "
            f"but the last, got {total!r}"
        )
    return int(number)


def _named(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    """(scheduler name, arguments) of an entry in either style."""
    if isinstance(entry, Mapping):
        if "scheduler" in entry:
            return entry["scheduler"], {k: v for k, v in entry.items() if k != "scheduler"}
        if len(entry) == 1:
            name, values = next(iter(entry.items()))
            if isinstance(values, Mapping):
                return name, dict(values)
    raise ValueError(
        f"{where} must be a dict with the key 'scheduler', or {{name: arguments}}, got {entry!r}"
    )


# --- parameter groups -----------------------------------------------------------------------------

_NORM_LAYERS = (nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.GroupNorm)
_NORM_NAME = re.compile(r".*norm.*|(ln|bn|gn)([_\d].*)?", re.IGNORECASE)
_NO_DECAY = {"weight_decay": 0.0, "no_weight_decay": True}
_LAYER_TYPES = {
    "decoder_kernel": lambda name: _is_decoder_kernel(name),
    "embedding": lambda name: any("embed" in part for part in name.lower().split(".")),
}


def configure_param_groups(params: Any, optimizer_params: Mapping[str, Any]) -> ParamGroups:
    """Groups of parameters with and without weight decay, and with their own learning rates.

    Biases, and the scale and bias of normalisation layers, get no weight decay, and are marked
    ``no_weight_decay`` so that weight-decay schedulers leave them alone. In a module such
    layers are known by their type, in a tree by their names: whole path components such as
    ``norm1``, ``LayerNorm_0``, ``ln_f`` or ``bn2``.

    Args:
      params: a pytree of arrays or an nnx.Module.
      optimizer_params: of its keys are read: ``adjust_learning_rate``, a dict from a layer type
        (``decoder_kernel``, ``embedding``) or glob pattern(s) to a factor, which the group gets as
        ``adjust_learning_rate``; and ``params``, a list of ``{"params": patterns, "tag": name}``,
        further values of such a dict overriding the group's.

    Raises:
      ValueError: if a layer type is unknown, or a pattern matches no parameter.

    >>> import jax.numpy as jnp
    >>> tree = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    >>> configure_param_groups(tree, {"adjust_learning_rate": {"decoder_kernel": 0.5}})
    [{'params': ['dense.bias'], 'weight_decay': 0.0, 'no_weight_decay': True}, \
{'params': ['dense.kernel'], 'adjust_learning_rate': 0.5}]
    """
    source, _ = make_source(params)
    norms = _norm_prefixes(params)
    values: dict[str, dict[str, Any]] = {
        name: dict(_NO_DECAY) if _has_no_decay(name, norms) else {} for name in source.names
    }
    for layer_type, factor in (optimizer_params.get("adjust_learning_rate") or {}).items():
        factor = to_number(f"adjust_learning_rate[{layer_type!r}]", factor)
        check(f"adjust_learning_rate[{layer_type!r}]", factor, ">= 0")
        for name in _layer_names(layer_type, source.names):
            values[name]["adjust_learning_rate"] = factor
    for i, rule in enumerate(optimizer_params.get("params") or []):
        patterns = rule.get("params")
        for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
            names = matching(pattern, source.names)
            if not names:
                raise ValueError(f"params[{i}]: pattern {pattern!r} matches no parameter")
            for name in names:
                values[name] |= {k: v for k, v in rule.items() if k != "params"}
    groups: list[dict[str, Any]] = []
    for name in source.names:
        for group in groups:
            if {k: v for k, v in group.items() if k != "params"} == values[name]:
                group["params"].append(name)
                break
        else:
            groups.append({"params": [name], **values[name]})
    return ParamGroups(params, groups)


def _norm_prefixes(params: Any) -> set[str]:
    if not isinstance(params, nnx.Module):
        return set()
    return {
        ".".join(map(str, path))
        for path, node in nnx.iter_graph(params)
        if isinstance(node, _NORM_LAYERS)
    }


def _has_no_decay(name: str, norms: set[str]) -> bool:
    *parents, last = name.split(".")
    if last in ("bias", "scale"):
        return True
    if ".".join(parents) in norms:
        return True
    return bool(parents) and bool(_NORM_NAME.fullmatch(parents[-1]))


def _is_decoder_kernel(name: str) -> bool:
    lower = name.lower()
    return ("weight" in lower or "kernel" in lower) and ("linear" in lower or "dense" in lower)


def _layer_names(layer_type: Any, names: Sequence[str]) -> list[str]:
    patterns = [layer_type] if isinstance(layer_type, str) else list(layer_type)
    found = []
    for pattern in patterns:
        test = _LAYER_TYPES.get(pattern)
        mine = [n for n in names if test(n)] if test else matching(pattern, names)
        if not mine:
            known = sorted(_LAYER_TYPES)
            raise ValueError(
                f"adjust_learning_rate: {pattern!r} is neither a layer type with parameters here "
                f"({known}) nor a pattern that matches one of {list(names[:8])}"
            )
        found += mine
    return found


# --- values ---------------------------------------------------------------------------------------


def _accepted(cls: type, values: Mapping[str, Any], skip: set[str]) -> dict[str, Any]:
    """The values that the signature takes, coerced; one warning names the others."""
    parameters = {k: p for k, p in inspect.signature(cls).parameters.items() if k not in skip}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unused = [k for k in values if k not in parameters and not takes_any]
    if unused:
        warnings.warn(
            f"{cls.__name__} got {len(unused)} unexpected and unused parameters: {unused}.",
            stacklevel=4,
        )
    return {
        k: _coerce(k, v, parameters[k]) if k in parameters else v
        for k, v in values.items()
        if k not in unused
    }


def _coerce(name: str, value: Any, parameter: inspect.Parameter) -> Any:
    """Strings as the numbers or flags they stand for, unless the argument is a string."""
    if parameter.name == "param_group_tags":
        return value
    if isinstance(value, list | tuple):
        return [_coerce(f"{name}[{i}]", v, parameter) for i, v in enumerate(value)]
    if not isinstance(value, str) or "str" in str(parameter.annotation):
        return value
    if value.lower() in ("none", "null", "~"):
        return None
    if isinstance(parameter.default, bool) or "bool" in str(parameter.annotation):
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        return value.lower() == "true"
    return to_number(name, value)


def to_number(name: str, value: Any) -> Any:
    """A number, or the number that a string such as ``"1e-6"`` stands for."""
    if not isinstance(value, str):
        if not is_number(value):
            raise ValueError(f"{name} must be a number, got {value!r}")
        return value
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"{name} must be a number, got {value!r}") from None
    return int(number) if re.fullmatch(r"[+-]?\d+", value.strip()) else number


def _modern(values: Mapping[str, Any], legacy: Mapping[str, str], owner: str) -> dict[str, Any]:
    result = {}
    for key, value in values.items():
        if key in legacy:
            _warn_legacy(key, legacy[key], owner)
            if legacy[key] in values:
                raise ValueError(f"{owner}: {key!r} and {legacy[key]!r} are the same argument")
        result[legacy.get(key, key)] = value
    return result


def _warn_legacy(old: str, new: str, owner: str) -> None:
    warnings.warn(f"{owner}: {old!r} is now {new!r}", DeprecationWarning, stacklevel=5)
