"""The parts of a configuration file that say how to optimize, in either style."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from cerebras_jax.checks import is_number
from cerebras_jax.messages import shown
from cerebras_jax.optim.names import check_plain
from cerebras_jax.step_config import SCALING_KEYS, STEP_KEYS

# What changes the numbers of a run and is not acted on yet, with the values that ask for nothing.
_NEUTRAL = {
    "fp16_type": (None, "float32"),
}
# Read by the recipe itself, so that the optimizer need not warn of them.
_RECIPE_KEYS = {"optimizer_type", "adjust_learning_rate", "params", "fp16_type", "sparsity"}
_RECIPE_KEYS |= set(STEP_KEYS)
# In sections of the runner, which is not read, these say nothing if they are so.
_UNREAD = {**_NEUTRAL, **dict.fromkeys(SCALING_KEYS, (None,)), "loss_scaling_factor": (None, 1)}
_UNREAD |= {"grad_accum_steps": (None, 1), "sparsity": (None,)}
# How a batch is computed in parts: here it is grad_accum_steps that says so.
_MICRO_BATCH = {"micro_batch_size": (None, "auto")}
_FLAGS = {"csx.performance.micro_batch_size": (None, "auto")}
_WITH_FLAGS = ("GlobalFlags", "ScopedTrainFlags")


@dataclasses.dataclass(frozen=True)
class Sections:
    """What of a configuration a recipe is made of, unread.

    Attributes:
      optimizer_type: the name of the optimizer.
      optimizer: its constructor's values.
      others: the keys of the section that the recipe reads itself.
      schedulers: places and values of the schedulers.
      model: the section ``model``.
      ignored: what is not acted on, as ``place=value``.
      sparsity: the section ``sparsity``.
    """

    optimizer_type: Any
    optimizer: Mapping[str, Any]
    others: Mapping[str, Any]
    schedulers: tuple[tuple[str, Any], ...]
    model: Mapping[str, Any]
    ignored: tuple[str, ...]
    sparsity: Any = None


def read_sections(config: Mapping[str, Any]) -> Sections:
    """Finds the sections of a configuration in the style of 2.0 to 2.2, or of 2.3 and later.

    Raises:
      TypeError, ValueError: names the section, the rule and the value.
    """
    trainer = config.get("trainer")
    if isinstance(trainer, list) and len(trainer) == 1:
        trainer = trainer[0]
        trainer = trainer.get("trainer", trainer) if isinstance(trainer, Mapping) else trainer
    if trainer is not None:
        init = trainer.get("init") if isinstance(trainer, Mapping) else None
        if not isinstance(init, Mapping):
            raise ValueError(f"trainer must be a mapping with the key 'init', got {shown(trainer)}")
        return _trainer(init, "trainer.init.")
    section = config.get("optimizer", config)
    if "optimizer" in config and _is_named(section):
        return _trainer(config, "")
    if not isinstance(section, Mapping) or "optimizer_type" not in section:
        keys = [*section] if isinstance(section, Mapping) else section
        raise ValueError(
            f"the optimizer section must have the key 'optimizer_type', got {shown(keys)}"
        )
    check_plain("optimizer", {k: v for k, v in section.items() if k != "adjust_learning_rate"})
    learning_rate = section.get("learning_rate")
    return Sections(
        section["optimizer_type"],
        {k: v for k, v in section.items() if k not in _RECIPE_KEYS},
        section,
        () if learning_rate is None else (("learning_rate", learning_rate),),
        _other(config, "model"),
        (
            *_ignored("optimizer.", section),
            *_ignored("runconfig.", _other(config, "runconfig"), _UNREAD | _MICRO_BATCH),
            *_ignored("train_input.", _other(config, "train_input"), _MICRO_BATCH),
        ),
        _sparsity({"sparsity": _beside(config), "optimizer.sparsity": section.get("sparsity")}),
    )


def _is_named(section: Any) -> bool:
    """Whether a section is ``{name: arguments}``."""
    return (
        isinstance(section, Mapping)
        and "optimizer_type" not in section
        and len(section) == 1
        and isinstance(next(iter(section.values())), Mapping)
    )


def _trainer(init: Mapping[str, Any], place: str) -> Sections:
    optimizer = init.get("optimizer")
    if not isinstance(optimizer, Mapping) or len(optimizer) != 1:
        raise ValueError(f"{place}optimizer must be {{name: arguments}}, got {shown(optimizer)}")
    name = next(iter(optimizer))
    where = f"{place}optimizer."
    arguments = _mapping(optimizer, name, where)
    where = f"{where}{shown(name).strip(chr(39))}."
    check_plain(where[:-1], {k: v for k, v in arguments.items() if k != "adjust_learning_rate"})
    precision = _mapping(init, "precision", place)
    check_plain(f"{place}precision", precision)
    key = "schedulers" if "schedulers" in init else "scheduler"
    values = init.get(key)
    check_plain(f"{place}{key}", values)
    if isinstance(values, list | tuple):
        schedulers = [(f"{key}[{i}]", v) for i, v in enumerate(values)]
    else:
        schedulers = [] if values is None else [(key, values)]
    for at, value in schedulers:
        if value is None:
            raise ValueError(f"{place}{at} must be {{name: arguments}}, got None")
    ignored = [
        *_ignored(where, arguments),
        *_ignored(f"{place}precision.", precision),
        *_ignored(f"{place}loop.", _other(init, "loop"), _UNREAD),
        *_ignored_flags(f"{place}callbacks", init.get("callbacks")),
    ]
    learning_rate = arguments.get("learning_rate")
    if learning_rate is not None and not schedulers:
        schedulers = [("learning_rate", learning_rate)]
    elif learning_rate is not None and not is_number(learning_rate):
        ignored.append(f"{where}learning_rate={shown(learning_rate)}")
    read = {k: v for k, v in precision.items() if k in _RECIPE_KEYS}
    return Sections(
        name,
        {k: v for k, v in arguments.items() if k not in _RECIPE_KEYS},
        {**read, **arguments},
        tuple(schedulers),
        _other(init, "model"),
        tuple(ignored),
        _sparsity(
            {
                f"{place}sparsity": init.get("sparsity"),
                f"{where}sparsity": arguments.get("sparsity"),
            }
        ),
    )


def _beside(config: Mapping[str, Any]) -> Any:
    """The section ``sparsity`` beside that of the optimizer."""
    return config.get("sparsity") if "optimizer" in config else None


def _sparsity(places: Mapping[str, Any]) -> Any:
    """The one section about sparsity.

    Raises:
      ValueError: if there are two.
    """
    given = {place: value for place, value in places.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"sparsity must be given once, got {' and '.join(given)}")
    for place, value in given.items():
        check_plain(place, value)
        return value
    return None


def _mapping(section: Mapping[str, Any], key: Any, place: str) -> Mapping[str, Any]:
    """A subsection, empty if it is not there.

    Raises:
      TypeError: if it is no mapping.
    """
    value = section.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{place}{key} must be a mapping, got {shown(value)}")
    return value or {}


def _other(section: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A subsection of which some keys are looked at; empty if it is something else."""
    value = section.get(key)
    return value if isinstance(value, Mapping) else {}


def _ignored_flags(place: str, callbacks: Any) -> Iterator[str]:
    """The flags of a trainer's callbacks that ask for what is not acted on."""
    for i, entry in enumerate(callbacks if isinstance(callbacks, list | tuple) else ()):
        for name in _WITH_FLAGS if isinstance(entry, Mapping) else ():
            yield from _ignored(f"{place}[{i}].{name}.", _other(entry, name), _FLAGS)


def _ignored(
    place: str, section: Mapping[str, Any], keys: Mapping[str, tuple] = _NEUTRAL
) -> Iterator[str]:
    """The keys of a section that ask for what is not acted on."""
    for key, neutral in keys.items():
        value = section.get(key)
        is_plain = value is None or isinstance(value, str | int | float)
        if not (is_plain and value in neutral):
            yield f"{place}{key}={shown(value, 60)}"
