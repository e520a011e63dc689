"""Optimizers, schedulers and parameter groups from the values of a configuration."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from cerebras_jax import schedules
from cerebras_jax.checks import check, is_number
from cerebras_jax.messages import shown
from cerebras_jax.optim.decay import no_decay_rule
from cerebras_jax.optim.layer_types import layer_names
from cerebras_jax.optim.names import (
    arguments_of,
    check_plain,
    find_class,
    modern,
    rate_key,
    to_number,
    warn_legacy,
)
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.optim.param_groups import ParamGroups, matching, names_of
from cerebras_jax.optim.schedule_config import schedule_config
from cerebras_jax.optim.scheduler import Scheduler

_LEGACY = {"weight_decay_rate": "weight_decay", "epsilon": "eps"}
_DEFAULT_LR = 0.1  # where an optimizer has no default and a schedule will set it
_TEXTS = {"axes", "adjust_lr_fn"}  # of Muon's groups
_NO_DECAY = {"weight_decay": 0.0, "no_weight_decay": True}


# --- optimizers -----------------------------------------------------------------------------------


def configure_optimizer(optimizer_type: str, params: Any, **kwargs: Any) -> Optimizer:
    """An optimizer by name, with the keyword arguments that its signature takes.

    Args:
      optimizer_type: a class name in any case: ``"AdamW"``, ``"adamw"``, ``"AdaFactor"``, or the
        name of one's own subclass of `Optimizer`. A class of one's own that is called as one
        of this package's is passed over, with a warning.
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
    """The constructor arguments of ``cls`` among configuration values, coerced.

    Raises:
      TypeError, ValueError: names the argument, the rule and the value.
    """
    for key, value in values.items():
        check_plain(key, value)
    values = modern(values, _LEGACY, cls.__name__)
    if "beta1" in values and "beta2" in values:
        warn_legacy("beta1, beta2", "betas", cls.__name__)
        values["betas"] = (values.pop("beta1"), values.pop("beta2"))
    rate, learning_rate = rate_key(cls), values.pop("learning_rate", None)
    if "lr" in values:
        values[rate] = values.pop("lr")
    if isinstance(learning_rate, str) or is_number(learning_rate):
        number = to_number("learning_rate", learning_rate)
        check("learning_rate", number, ">= 0")
        if values.get(rate) is not None and to_number("lr", values[rate]) != number:
            raise ValueError(f"lr={shown(values[rate])} and learning_rate={number!r} differ")
        values[rate] = number
    signature = inspect.signature(cls).parameters
    if (
        rate in signature
        and rate not in values
        and signature[rate].default is inspect.Parameter.empty
    ):
        values[rate] = None if values.get("relative_step") in (True, "true") else _DEFAULT_LR
    return arguments_of(cls, values, skip={"params"})


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
        `configure_param_groups`) multiplies the schedule. If not, and there are groups with
        such a factor, a warning says that it is not used.

    Returns:
      A scheduler, or None.

    Raises:
      TypeError, ValueError: names the entry, the rule and the value.

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
    config = schedule_config(learning_rate)
    if config is None:
        return None
    if adjust_learning_rate:
        config = config.scaled()
    elif not config.is_scaled and any("adjust_learning_rate" in g for g in optimizer.param_groups):
        warnings.warn(
            "adjust_learning_rate of the parameter groups is not used by the scheduler; give it "
            "to configure_lr_scheduler too",
            stacklevel=2,
        )
    return config.attach(optimizer)


def configure_scheduler(
    optimizer: Optimizer, value: Any, base: type[Scheduler], where: str = "learning_rate"
) -> Any:
    """The scheduler of kind ``base`` that a configuration value describes, or None."""
    config = schedule_config(value, base, where)
    return None if config is None else config.attach(optimizer)


# --- parameter groups -----------------------------------------------------------------------------


def configure_param_groups(params: Any, optimizer_params: Mapping[str, Any]) -> ParamGroups:
    """Groups of parameters with and without weight decay, and with their own learning rates.

    Biases, and the scale and bias of normalisation layers, get no weight decay, and are marked
    ``no_weight_decay`` so that weight-decay schedulers leave them alone. A bias is what has
    ``bias`` in its name. Normalisation layers are known by their type in a module, and in a tree
    by their names: whole path components such as ``norm1``, ``LayerNorm_0``, ``ln_f`` or ``bn2``.

    Args:
      params: a pytree of arrays or an nnx.Module.
      optimizer_params: of its keys are read: ``adjust_learning_rate``, a dict from a layer type
        (``decoder_kernel``, ``embedding``, ...) or glob pattern(s) to a factor, which the group
        gets as ``adjust_learning_rate``, or to None, which leaves it out; the learning rate (as
        ``lr`` or ``learning_rate``) if it is a number: these groups get ``lr`` times their
        factor; and ``params``, one or several ``{"params": patterns, "tag": name}``. The group
        of a parameter has the tags of all that match it as ``tags``; further values of such a
        dict override the group's.

    Raises:
      TypeError: if one of these values has the wrong form.
      ValueError: if a layer type is unknown, or no pattern of a dict matches a parameter.

    >>> import jax.numpy as jnp
    >>> tree = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    >>> configure_param_groups(tree, {"adjust_learning_rate": {"decoder_kernel": 0.5}})
    [{'params': ['dense.bias'], 'weight_decay': 0.0, 'no_weight_decay': True}, \
{'params': ['dense.kernel'], 'adjust_learning_rate': 0.5}]
    """
    rate = optimizer_params.get("lr", optimizer_params.get("learning_rate"))
    rate = to_number("lr", rate) if isinstance(rate, str) else rate
    return make_param_groups(params, optimizer_params, "lr", rate)


def make_param_groups(
    params: Any,
    optimizer_params: Mapping[str, Any],
    key: str,
    rate: Any,
    own: Mapping[str, Mapping[str, Any]] | None = None,
) -> ParamGroups:
    """See `configure_param_groups`.

    Args:
      params: a pytree of arrays or an nnx.Module.
      optimizer_params: of its keys ``adjust_learning_rate`` and ``params`` are read.
      key: what the groups call the learning rate.
      rate: the learning rate; it is used if it is a number or a schedule.
      own: further values by parameter name, which those of the configuration override.
    """
    names = names_of(params)
    is_free = no_decay_rule(params)
    values: dict[str, dict[str, Any]] = {n: dict(_NO_DECAY) if is_free(n) else {} for n in names}
    for name, further in (own or {}).items():
        values[name] |= further
    for rule in param_filters(optimizer_params.get("params")):
        found = {name for pattern in rule.patterns for name in matching(pattern, names)}
        if not found:
            what = f"pattern {shown(rule.patterns[0])} matches"
            if len(rule.patterns) > 1:
                what = f"patterns {shown(rule.patterns)} match"
            raise ValueError(f"{rule.where}: {what} no parameter of {shown(names)}")
        for name in found:
            tags = {*values[name].get("tags", ()), *rule.tags}
            values[name] |= {**rule.values, **({"tags": tuple(sorted(tags))} if tags else {})}
    for layer_type, factor in lr_factors(optimizer_params.get("adjust_learning_rate")).items():
        for name in layer_names(layer_type, names):
            values[name]["adjust_learning_rate"] = factor
    for mine in values.values():
        own = mine.get(key, rate)
        if "adjust_learning_rate" in mine and (is_number(own) or callable(own)):
            mine[key] = _times(own, mine["adjust_learning_rate"])
    groups: list[dict[str, Any]] = []
    for name in names:
        for group in groups:
            if {k: v for k, v in group.items() if k != "params"} == values[name]:
                group["params"].append(name)
                break
        else:
            groups.append({"params": [name], **values[name]})
    return ParamGroups(params, groups)


def _times(rate: Any, factor: float) -> Any:
    return schedules.scaled(rate, factor) if callable(rate) else rate * factor


def lr_factors(adjust_learning_rate: Any) -> dict[Any, float]:
    """The factors by layer type or glob pattern(s), checked; those that are None left out.

    Raises:
      TypeError, ValueError: names the key, the rule and the value.
    """
    where, given = "adjust_learning_rate", adjust_learning_rate
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"{where} must map layer types or patterns to factors, got {shown(given)}")
    result = {}
    for key, factor in given.items():
        if not _are_texts(_listed(key)):
            raise TypeError(f"{where}: keys must be layer types or patterns, got {shown(key)}")
        if factor is not None:
            name = f"{where}[{shown(key)}]"
            check_plain(name, factor)
            factor = to_number(name, factor)
            check(name, factor, ">= 0")
            result[key] = float(factor)
    return result


class ParamFilter(NamedTuple):
    """One entry of the key ``params``: what the parameters that it matches get."""

    where: str
    patterns: list[str]
    tags: list[str]
    values: dict[str, Any]


def param_filters(filters: Any) -> list[ParamFilter]:
    """The entries of the key ``params``, which is a list of them, one of them, or None.

    Raises:
      TypeError, ValueError: names the entry, the rule and the value.
    """
    filters = [filters] if isinstance(filters, Mapping) else filters
    rule = 'must be {"params": patterns, "tag": name}'
    if filters is not None and not isinstance(filters, list | tuple):
        raise TypeError(f"params {rule} or a list of them, got {shown(filters)}")
    return [_param_filter(f"params[{i}]", given, rule) for i, given in enumerate(filters or ())]


def _param_filter(where: str, given: Any, rule: str) -> ParamFilter:
    if not isinstance(given, Mapping):
        raise TypeError(f"{where} {rule}, got {shown(given)}")
    check_plain(where, given)
    patterns = _listed(given.get("params"))
    tags = _listed(given.get("tag", given.get("tags", ())))
    for key, texts in (("params", patterns), ("tag", tags)):
        if not _are_texts(texts) or (key == "params" and not texts):
            raise TypeError(f"{where}: {key!r} must be strings, got {shown(texts)}")
    values = {
        k: to_number(f"{where}.{k}", v) if isinstance(v, str) and k not in _TEXTS else v
        for k, v in given.items()
        if k not in ("params", "tag", "tags")
    }
    if "adjust_learning_rate" in values:
        check(f"{where}.adjust_learning_rate", values["adjust_learning_rate"], ">= 0")
    return ParamFilter(where, [*patterns], [*tags], values)


def _listed(texts: Any) -> Any:
    return [texts] if isinstance(texts, str) else texts


def _are_texts(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(v, str) for v in values)
