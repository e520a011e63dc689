"""The same optimizer state in torch's words and in Cerebras'.

Both have the layout of torch, and most states under the same names. They differ in how Adam and
Adamax count (torch: ``step``; Cerebras: running powers of the betas), in the names of Adafactor,
and in how a group says whether decay is decoupled. Our optimizers take either.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cerebras_jax.formats.pytorch import DIALECTS, EXECUTION_FLAGS, POWERS, steps_of_powers
from cerebras_jax.formats.run import Run
from cerebras_jax.formats.state_dict import is_repr
from cerebras_jax.messages import shown
from cerebras_jax.schedules import torch_eps

_FLAGS = ("amsgrad", "centered", "correct_bias", "maximize", "nesterov", "scale_parameter",
          "relative_step", "warmup_init", *EXECUTION_FLAGS)  # fmt: skip

_ADAFACTOR = DIALECTS["adafactor"]
_ADAFACTOR_VALUES = {ours: theirs for theirs, ours in _ADAFACTOR.names.items()}

_NEVER_NONE = ("betas", "eps", "momentum", "weight_decay")

# States of optimizers that count steps in torch, but need not elsewhere.
_COUNTED = {"square_avg", "exp_inf", "sum", "prev", "ax"}


def to_torch(run: Run) -> Run:
    """States and groups as torch.optim's optimizer of the same name keeps them.

    The schedule `torch_eps` becomes torch's eps again.

    Raises:
      ValueError: if the optimizer does something that torch's does not, or its steps cannot be
        told any more.
    """
    groups = [{**g, "eps": _plain_eps(g["eps"])} if "eps" in g else g for g in run.groups]
    return _translated(dataclasses.replace(run, groups=groups), _torch_entry, _torch_group)


def _plain_eps(value: Any) -> Any:
    """torch's eps of the schedule `torch_eps`, or of what stands for it in a state dict."""
    if isinstance(value, torch_eps):
        return value.eps
    found = re.fullmatch(r"torch_eps\(eps=([^,()]+), beta2=[^,()]+\)", str(value))
    return float(found[1]) if found else value


def to_cerebras(run: Run) -> Run:
    """States and groups as Cerebras' optimizer of the same name keeps them.

    Raises:
      ValueError: if a group maximizes, which Cerebras' groups do not say.
    """
    return _translated(run, _cerebras_entry, _cerebras_group)


def _translated(run: Run, entry: Any, group: Any) -> Run:
    states = dict(run.states)
    for values in run.groups:
        _check_numbers(values)
        for name in values["params"]:
            if name in states:
                states[name] = entry(name, states[name], values, run.step)
    groups = [{**group(values), "params": list(values["params"])} for values in run.groups]
    return dataclasses.replace(run, states=states, groups=groups, rule=None)  # neither says


def _check_numbers(group: Mapping[str, Any]) -> None:
    """Refuses functions; in a state dict of ours they are schedules, their reprs, or None."""
    for key, value in group.items():
        values = value if isinstance(value, list | tuple) else [value]
        is_function = any(callable(x) or is_repr(x) for x in values)
        if is_function or (value is None and key in _NEVER_NONE):
            raise ValueError(
                f"{key} must be a number, got {shown(value)}; a file holds no function: give the "
                "group a number first"
            )


# --- torch ---------------------------------------------------------------------------------------


def _torch_entry(
    name: str, entry: Mapping[str, Any], group: Mapping[str, Any], step: int | None
) -> dict[str, Any]:
    entry = dict(entry)
    powers = {k: float(v) for k in POWERS if (v := entry.pop(k, None)) is not None}
    if powers and "step" not in entry:
        entry["step"] = np.array(_step(name, powers, group, step), np.float32)
    if "exp_avg_sq_row" in entry or ("decay_rate" in group and "exp_avg_sq" in entry):
        entry = dict(_ADAFACTOR.export_entry(entry, group))
    if "step" not in entry and step is not None and _COUNTED & set(entry):
        entry["step"] = np.array(step, np.float32)
    return entry


def _betas(name: str, group: Mapping[str, Any]) -> tuple[float, float]:
    try:
        first, second = map(float, group["betas"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"the group of {name!r} must have two betas, got {shown(group.get('betas'))}"
        ) from None
    return first, second


def _step(
    name: str, powers: Mapping[str, float], group: Mapping[str, Any], step: int | None
) -> int:
    """The step that the powers tell; where the file's step count may be the same, that one."""
    told = steps_of_powers(powers, _betas(name, group))
    if told is not None:
        found, error = told
        return step if step is not None and abs(found - step) <= error else round(found)
    if step is None:
        raise ValueError(f"{name!r}: its powers {powers} do not tell the step, nor does the file")
    return step


def _torch_group(group: Mapping[str, Any]) -> dict[str, Any]:
    values = {k: _number(k, v) for k, v in group.items() if k != "params"}
    if "correct_bias" in values:  # of AdamW and AdamBase only
        values.setdefault("decoupled_weight_decay", True)
        if not values.pop("correct_bias"):
            raise ValueError("correct_bias is False; torch has no Adam without bias correction")
    penalty = values.pop("l2_regularization_rate", None)
    if penalty is not None:
        if penalty and values.get("weight_decay"):
            raise ValueError(
                f"l2_regularization_rate is {penalty} and weight_decay {values['weight_decay']}; "
                "torch has one or the other"
            )
        if penalty:
            values["weight_decay"] = penalty
        values["decoupled_weight_decay"] = not penalty
    return {_ADAFACTOR_VALUES.get(k, k): v for k, v in values.items()}


# --- Cerebras ------------------------------------------------------------------------------------


def _cerebras_entry(
    name: str, entry: Mapping[str, Any], group: Mapping[str, Any], step: int | None
) -> dict[str, Any]:
    entry = dict(entry)
    is_adam = "exp_avg_sq" in entry and "amsgrad" in group
    steps = entry.get("step")
    if (is_adam or "exp_inf" in entry) and "beta1_power" not in entry and steps is not None:
        t = float(entry.pop("step"))
        for key, beta in zip(POWERS[: 2 if is_adam else 1], _betas(name, group), strict=False):
            entry[key] = np.array(beta ** (t + 1), np.float32)
    return dict(_ADAFACTOR.import_entry(entry, group))


def _cerebras_group(group: Mapping[str, Any]) -> dict[str, Any]:
    values = {k: v for k, v in group.items() if k != "params" and k not in EXECUTION_FLAGS}
    decoupled = values.pop("decoupled_weight_decay", None)
    if "amsgrad" in values:
        if values.pop("maximize", False):
            raise ValueError("maximize is True; Cerebras' Adam does not maximize")
        if decoupled is not None:  # without it, their Adam and AdamW each say for themselves
            decay = values.get("weight_decay", 0.0)
            values["weight_decay"] = decay if decoupled else 0.0
            values["l2_regularization_rate"] = 0.0 if decoupled else decay
            values["correct_bias"] = True
    elif decoupled:
        raise ValueError("decoupled_weight_decay is True; Cerebras' NAdam and RAdam have only L2")
    if "beta2_decay" in values:
        values = {_ADAFACTOR.names.get(k, k): v for k, v in values.items()}
    if isinstance(values.get("lr"), float):
        values["lr"] = np.array(values["lr"], np.float32)  # theirs is a tensor
    return values


def with_flags(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group with True and False where the original's hardware has made them integers."""
    return {k: _number(k, v) if k in _FLAGS else v for k, v in group.items()}


def _number(key: str, value: Any) -> Any:
    """A Python number of a scalar array; a flag may be stored as an integer."""
    if isinstance(value, list | tuple):
        return tuple(_number(key, v) for v in value)
    if hasattr(value, "shape") and np.shape(value) == ():
        value = np.asarray(value).item()
    return bool(value) if key in _FLAGS and isinstance(value, int) else value
