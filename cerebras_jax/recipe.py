"""A training recipe from a Model Zoo configuration: optimizer, schedules, clipping, groups."""

from __future__ import annotations

import dataclasses
import html
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cerebras_jax import optim, schedules
from cerebras_jax.checks import check
from cerebras_jax.optim.configure import (
    configure_scheduler,
    find_class,
    optimizer_arguments,
    to_number,
)
from cerebras_jax.optim.lr_scheduler import LRScheduler
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.optim.param_groups import ParamGroups
from cerebras_jax.optim.scheduler import Scheduler
from cerebras_jax.optim.weight_decay_scheduler import WeightDecayScheduler
from cerebras_jax.transforms.clipping import clip
from cerebras_jax.yaml_config import read_config

# Read here or by the training loop, so that the optimizer need not warn of them.
_LOOP_KEYS = {
    "optimizer_type",
    "max_gradient_norm",
    "max_gradient_value",
    "adjust_learning_rate",
    "params",
    "loss_scaling_factor",
    "initial_loss_scale",
    "max_loss_scale",
    "min_loss_scale",
    "steps_per_increase",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a configuration says about optimization, ready to be used in either form.

    Attributes:
      optimizer_class: e.g. `optim.AdamW`.
      optimizer_values: its constructor arguments.
      schedulers: configuration values of the schedulers, as they were given.
      max_gradient_norm: clip gradients to this global norm; None: do not.
      max_gradient_value: clip every gradient element to this; None: do not.
      adjust_learning_rate: factors by layer type or pattern.
      params: further groups: ``[{"params": patterns, "tag": name}, ...]``.
      warnings: what was ignored, one sentence each.
    """

    optimizer_class: type[Optimizer]
    optimizer_values: dict[str, Any]
    schedulers: tuple[Any, ...] = ()
    max_gradient_norm: float | None = None
    max_gradient_value: float | None = None
    adjust_learning_rate: dict[str, Any] | None = None
    params: list[dict[str, Any]] | None = None
    warnings: tuple[str, ...] = ()

    def optimizer(self, params: Any) -> tuple[Optimizer, list[Scheduler]]:
        """The class form: the optimizer, which clips gradients, and the schedulers to step."""
        opt = self.optimizer_class(self.param_groups(params), **self.optimizer_values)
        opt.max_gradient_norm = self.max_gradient_norm
        opt.max_gradient_value = self.max_gradient_value
        return opt, self._make_schedulers(opt)

    def transformation(self, params: Any) -> optax.GradientTransformationExtraArgs:
        """The pure form: an optax chain of clipping and the optimizer, with groups and schedules.

        Args:
          params: the parameters, as an example of their structure: a pytree or nnx.Module.
        """
        groups = self.param_groups(params)
        parts: dict[Any, Any] = {
            str(i): self.optimizer_class.pure(**values)  # pyright: ignore
            for i, values in enumerate(self._values_of(groups))
        }
        label = {name: str(i) for i, group in enumerate(groups) for name in group["params"]}
        labels = [label[name] for name in groups.names]

        def label_tree(tree: Any) -> Any:
            return jax.tree.structure(tree).unflatten(labels)

        update = parts["0"] if len(parts) == 1 else optax.partition(parts, label_tree)
        if self.max_gradient_norm is None and self.max_gradient_value is None:
            return optax.chain(update)
        return optax.chain(clip(self.max_gradient_norm, self.max_gradient_value), update)

    def _values_of(self, groups: ParamGroups) -> list[dict[str, Any]]:
        """The hyper-parameters of each group, schedules in place of what they drive."""
        probe = _probe(groups)
        schedulers = self._make_schedulers(probe)
        known = inspect.signature(self.optimizer_class).parameters
        result = []
        for made, given in zip(probe.param_groups, groups, strict=True):
            values = {**self.optimizer_values, **{k: v for k, v in given.items() if k in known}}
            values.pop("params", None)
            for scheduler in schedulers:
                if any(made is group for group in scheduler.groups()):
                    scaled = isinstance(scheduler, optim.lr_scheduler.ScalePerParamLR)
                    factor = made.get("adjust_learning_rate", 1.0) if scaled else 1.0
                    schedule = scheduler.schedule
                    values[scheduler.key] = (
                        schedule if factor == 1.0 else schedules.scaled(schedule, factor)
                    )
            result.append(values)
        return result

    def schedule(self, key: str = "lr") -> Callable[[Any], Any]:
        """The pure schedule of ``"lr"`` or ``"weight_decay"``: the constant if none drives it."""
        for scheduler in self._make_schedulers(_probe(None)):
            if scheduler.key == key:
                return scheduler.schedule
        return schedules.constant(self.constant(key))

    def _repr_html_(self) -> str:
        """For Jupyter: the optimizer and its values, then the curves of the schedules."""
        values = {
            **self.optimizer_values,
            "max_gradient_norm": self.max_gradient_norm,
            "adjust_learning_rate": self.adjust_learning_rate,
        }
        rows = "".join(
            f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>"
            for k, v in values.items()
            if v is not None
        )
        curves = "".join(
            f"<p>{key}</p>{self.schedule(key)._repr_html_()}"  # pyright: ignore
            for key in dict.fromkeys(s.key for s in self._make_schedulers(_probe(None)))
            if hasattr(self.schedule(key), "_repr_html_")
        )
        name = self.optimizer_class.__name__
        return f"<table><caption><code>{name}</code></caption>{rows}</table>{curves}"

    def has(self, key: str) -> bool:
        """Whether the optimizer has a number of that name."""
        return key in inspect.signature(self.optimizer_class).parameters

    def constant(self, key: str) -> float:
        """The value of an unscheduled number of the optimizer, e.g. ``"weight_decay"``."""
        default = inspect.signature(self.optimizer_class).parameters[key].default
        value = self.optimizer_values.get(key, default)
        return 0.0 if value is None else value

    def param_groups(self, params: Any) -> ParamGroups:
        """The parameter groups: without decay for biases and norms, adjusted, tagged."""
        rules = {"adjust_learning_rate": self.adjust_learning_rate, "params": self.params}
        return optim.configure_param_groups(params, rules)

    def _make_schedulers(self, opt: Optimizer) -> list[Scheduler]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were given when the recipe was read
            return [
                _make_scheduler(opt, value, self.adjust_learning_rate) for value in self.schedulers
            ]


def _make_scheduler(opt: Optimizer, value: Any, adjust_learning_rate: Any) -> Scheduler:
    base = WeightDecayScheduler if _is_weight_decay(value) else LRScheduler
    if base is LRScheduler:
        return optim.configure_lr_scheduler(opt, value, adjust_learning_rate)
    return configure_scheduler(opt, value, base, "schedulers")


def _is_weight_decay(value: Any) -> bool:
    """Whether a scheduler's configuration names one of the weight-decay schedulers."""
    if isinstance(value, list | tuple):
        return bool(value) and _is_weight_decay(value[0])
    if not isinstance(value, Mapping):
        return False
    name = value.get("scheduler", next(iter(value), ""))
    return str(name).upper().endswith("WD")


def _probe(groups: ParamGroups | None) -> Optimizer:
    """An optimizer of empty parameters in these groups, to hang schedulers on."""
    nothing = jnp.zeros((0,))
    if groups is None:
        return optim.SGD(nothing, lr=0.0)
    tree = {name: jnp.zeros((0,)) for name in groups.names}
    return optim.SGD(ParamGroups(tree, groups), lr=0.0)


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    """Reads a whole Model Zoo configuration, or its optimizer section, in either style.

    Args:
      source: the path of a YAML file, or what it holds as a dict.

    Raises:
      ValueError: names the key, the rule and the value.
      OSError: if the file cannot be read.

    >>> recipe = load_recipe({"optimizer": {"optimizer_type": "AdamW", "learning_rate": 1e-4,
    ...                                     "max_gradient_norm": 1.0}})
    >>> recipe.optimizer_class.__name__, recipe.max_gradient_norm, recipe.schedule()(0)
    ('AdamW', 1.0, 0.0001)
    """
    config = read_config(source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe = _recipe(config)
    for w in caught:
        warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    return dataclasses.replace(recipe, warnings=tuple(str(w.message) for w in caught))


def _sections(config: Mapping[str, Any]) -> tuple[Any, dict[str, Any], list[Any]]:
    """(optimizer name, its section, scheduler values) of either style."""
    trainer = config.get("trainer")
    if isinstance(trainer, list) and len(trainer) == 1:
        trainer = trainer[0]
        trainer = trainer.get("trainer", trainer) if isinstance(trainer, Mapping) else trainer
    if trainer is not None:
        init = trainer.get("init") if isinstance(trainer, Mapping) else None
        if not isinstance(init, Mapping):
            raise ValueError(f"trainer must be a mapping with the key 'init', got {trainer!r}")
        return _trainer_sections(init)
    section = config.get("optimizer", config)
    if "optimizer" in config and _is_named(section):
        return _trainer_sections({**config, "optimizer": section})
    if not isinstance(section, Mapping) or "optimizer_type" not in section:
        keys = sorted(section) if isinstance(section, Mapping) else section
        raise ValueError(f"the optimizer section must have the key 'optimizer_type', got {keys}")
    learning_rate = section.get("learning_rate")
    values = [] if learning_rate is None else [learning_rate]
    return section["optimizer_type"], dict(section), values


def _is_named(section: Any) -> bool:
    """Whether a section is ``{name: arguments}``."""
    return (
        isinstance(section, Mapping)
        and "optimizer_type" not in section
        and len(section) == 1
        and isinstance(next(iter(section.values())), Mapping)
    )


def _trainer_sections(init: Mapping[str, Any]) -> tuple[Any, dict[str, Any], list[Any]]:
    optimizer = init.get("optimizer")
    if not isinstance(optimizer, Mapping) or len(optimizer) != 1:
        raise ValueError(f"trainer.init.optimizer must be {{name: arguments}}, got {optimizer!r}")
    name, arguments = next(iter(optimizer.items()))
    if not isinstance(arguments or {}, Mapping):
        raise ValueError(f"trainer.init.optimizer.{name} must be a mapping, got {arguments!r}")
    precision = init.get("precision") or {}
    section = {**{k: v for k, v in precision.items() if k in _LOOP_KEYS}, **(arguments or {})}
    values = init.get("schedulers", init.get("scheduler")) or []
    values = list(values) if isinstance(values, list | tuple) else [values]
    if "learning_rate" in section and not values:
        values = [section["learning_rate"]]
    return name, section, values


def _recipe(config: Mapping[str, Any]) -> Recipe:
    name, section, schedulers = _sections(config)
    cls = find_class(name, Optimizer)
    values = {k: v for k, v in section.items() if k not in _LOOP_KEYS}
    recipe = Recipe(
        cls,
        optimizer_arguments(cls, values),
        tuple(schedulers),
        _positive(section, "max_gradient_norm"),
        _positive(section, "max_gradient_value"),
        section.get("adjust_learning_rate"),
        section.get("params"),
    )
    nothing = jnp.zeros((0,))
    cls(nothing, **recipe.optimizer_values)  # checks ranges now
    for value in schedulers:
        if not _has_tags(value):  # tags need the parameters' groups
            _make_scheduler(_probe(None), value, recipe.adjust_learning_rate)
    return recipe


def _has_tags(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "param_group_tags" in value or any(_has_tags(v) for v in value.values())
    return isinstance(value, list | tuple) and any(_has_tags(v) for v in value)


def _positive(section: Mapping[str, Any], key: str) -> float | None:
    if section.get(key) is None:
        return None
    value = to_number(key, section[key])
    check(key, value, "> 0")
    return float(value)
