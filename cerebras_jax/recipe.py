"""A training recipe from a Model Zoo configuration: optimizer, schedules, clipping, groups."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import yaml

from cerebras_jax import optim
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
      schedules: configuration values by the key they drive: ``{"lr": [{"scheduler": ...}, ...]}``.
      max_gradient_norm: clip gradients to this global norm; None: do not.
      max_gradient_value: clip every gradient element to this; None: do not.
      adjust_learning_rate: factors by layer type or pattern.
      params: further groups: ``[{"params": patterns, "tag": name}, ...]``.
      warnings: what was ignored, one sentence each.
    """

    optimizer_class: type[Optimizer]
    optimizer_values: dict[str, Any]
    schedules: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_gradient_norm: float | None = None
    max_gradient_value: float | None = None
    adjust_learning_rate: dict[str, Any] | None = None
    params: list[dict[str, Any]] | None = None
    warnings: tuple[str, ...] = ()

    def optimizer(self, params: Any) -> tuple[Optimizer, list[Scheduler]]:
        """The class form: the optimizer, and the schedulers to step after it.

        Gradient clipping is up to the caller: see `clipping`.
        """
        opt = self.optimizer_class(self.param_groups(params), **self.optimizer_values)
        return opt, self._schedulers(opt)

    def transformation(self, params: Any) -> optax.GradientTransformationExtraArgs:
        """The pure form: an optax chain of clipping and the optimizer, with groups and schedules.

        Args:
          params: the parameters, as an example of their structure: a pytree or nnx.Module.
        """
        groups = self.param_groups(params)
        values = {**self.optimizer_values, **{key: self.schedule(key) for key in self.schedules}}
        parts: dict[Any, Any] = {
            str(i): self._pure(values, group) for i, group in enumerate(groups)
        }
        label = {name: str(i) for i, group in enumerate(groups) for name in group["params"]}
        labels = [label[name] for name in groups.source.names]

        def label_tree(tree: Any) -> Any:
            structure = jax.tree.structure(tree)
            return structure.unflatten(labels)

        update = parts["0"] if len(parts) == 1 else optax.partition(parts, label_tree)
        return optax.chain(*self.clipping(), update)

    def _pure(self, values: Mapping[str, Any], group: Mapping[str, Any]) -> Any:
        own = {k: v for k, v in group.items() if k in values or k == "weight_decay"}
        merged = {**values, **{k: v for k, v in own.items() if k not in self.schedules}}
        factor = group.get("adjust_learning_rate", 1.0)
        if "lr" in self.schedules and factor != 1.0:
            merged["lr"] = values["lr"] * factor
        return self.optimizer_class.pure(**merged)  # pyright: ignore

    def clipping(self) -> list[optax.GradientTransformation]:
        """The links of the chain that clip gradients."""
        links = []
        if self.max_gradient_norm is not None:
            links.append(optax.clip_by_global_norm(self.max_gradient_norm))
        if self.max_gradient_value is not None:
            links.append(optax.clip(self.max_gradient_value))
        return links

    def schedule(self, key: str = "lr") -> Callable[[Any], Any]:
        """The pure schedule of ``"lr"`` or another scheduled value."""
        if key not in self.schedules:
            raise KeyError(f"the recipe schedules {sorted(self.schedules)}, not {key!r}")
        probe = optim.SGD(jnp.zeros(()), lr=0.0)
        return self._schedulers(probe)[list(self.schedules).index(key)].schedule

    def param_groups(self, params: Any) -> ParamGroups:
        """The parameter groups: without decay for biases and norms, adjusted, tagged."""
        rules = {"adjust_learning_rate": self.adjust_learning_rate, "params": self.params}
        return optim.configure_param_groups(params, rules)

    def _schedulers(self, opt: Optimizer) -> list[Scheduler]:
        result = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were given when the recipe was read
            for key, value in self.schedules.items():
                if key == "lr":
                    scheduler = optim.configure_lr_scheduler(opt, value, self.adjust_learning_rate)
                    result.append(scheduler)
        return result


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
    section = _optimizer_section(read_config(source))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe = _recipe(section)
    for w in caught:
        warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    return dataclasses.replace(recipe, warnings=tuple(str(w.message) for w in caught))


def read_config(source: Any) -> Mapping[str, Any]:
    """A configuration as a mapping, from a YAML file or as it is."""
    if isinstance(source, Mapping):
        return source
    with open(source, encoding="utf-8") as file:
        try:
            config = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{source} is not YAML: {error}") from None
    if not isinstance(config, Mapping):
        raise ValueError(f"{source} must be a YAML mapping, got {type(config).__name__}")
    return config


def _optimizer_section(config: Mapping[str, Any]) -> dict[str, Any]:
    if "optimizer" in config:
        config = config["optimizer"]
    if not isinstance(config, Mapping) or "optimizer_type" not in config:
        keys = sorted(config) if isinstance(config, Mapping) else config
        raise ValueError(f"the optimizer section must have the key 'optimizer_type', got {keys}")
    return dict(config)


def _recipe(section: dict[str, Any]) -> Recipe:
    cls = find_class(section["optimizer_type"], Optimizer)
    values = {k: v for k, v in section.items() if k not in _LOOP_KEYS}
    schedules = {}
    if section.get("learning_rate") is not None:
        schedules["lr"] = section["learning_rate"]
    recipe = Recipe(
        cls,
        optimizer_arguments(cls, values),
        schedules,
        _positive(section, "max_gradient_norm"),
        _positive(section, "max_gradient_value"),
        section.get("adjust_learning_rate"),
        section.get("params"),
    )
    probe = jnp.zeros(())
    cls(probe, **recipe.optimizer_values)  # checks ranges now
    for value in schedules.values():
        configure_scheduler(optim.SGD(probe, lr=0.0), value, LRScheduler)
    return recipe


def _positive(section: Mapping[str, Any], key: str) -> float | None:
    if section.get(key) is None:
        return None
    value = to_number(key, section[key])
    check(key, value, "> 0")
    return float(value)
