"""What a configuration says about the step itself: bounds, skipping, loss scaling, accumulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cerebras_jax.checks import check, check_flag
from cerebras_jax.messages import shown
from cerebras_jax.optim.names import to_number
from cerebras_jax.transforms.loss_scale import LossScaling
from cerebras_jax.transforms.spikes import SkipSpikes

SCALING_KEYS = (
    "loss_scaling_factor",
    "initial_loss_scale",
    "max_loss_scale",
    "min_loss_scale",
    "steps_per_increase",
)
STEP_KEYS = (
    "max_gradient_norm",
    "max_gradient_value",
    "skip_nonfinite",
    "skip_spikes",
    "grad_accum_steps",
    *SCALING_KEYS,
)
_LARGE = 2.0**31  # the first and the largest scale for cbfloat16


class StepConfig(NamedTuple):
    """See `Recipe`, whose fields these are."""

    max_gradient_norm: float | None = None
    max_gradient_value: float | None = None
    loss_scaling: LossScaling | None = None
    skip_nonfinite: bool = False
    skip_spikes: SkipSpikes | None = None
    grad_accum_steps: int = 1


def step_config(section: Mapping[str, Any], fp16_type: Any = None) -> StepConfig:
    """Reads the keys `STEP_KEYS` of a section.

    Args:
      section: the section ``optimizer``, with that of ``precision`` beneath it.
      fp16_type: the name of the model's half precision: bfloat16 needs no dynamic scaling, and
        with cbfloat16 the scale begins at 2**31.

    Raises:
      TypeError, ValueError: names the key, the rule and the value.
    """
    scaling = _loss_scaling(section, fp16_type)
    skip = section.get("skip_nonfinite")
    if skip is None:
        skip = scaling is not None and scaling.is_dynamic
    check_flag("skip_nonfinite", skip)
    return StepConfig(
        _positive(section, "max_gradient_norm"),
        _positive(section, "max_gradient_value"),
        scaling,
        bool(skip),
        _skip_spikes(section.get("skip_spikes")),
        _steps(section.get("grad_accum_steps")),
    )


def _loss_scaling(section: Mapping[str, Any], fp16_type: Any) -> LossScaling | None:
    factor = section.get("loss_scaling_factor")
    numbers = {key: _positive(section, key) for key in SCALING_KEYS[1:]}
    if factor is None:
        return None
    if factor != "dynamic":
        factor = to_number("loss_scaling_factor", factor)
        check("loss_scaling_factor", factor, "> 0")
        return None if factor == 1 else LossScaling(float(factor))
    if fp16_type == "bfloat16":
        return None
    if fp16_type == "cbfloat16":
        for key in ("initial_loss_scale", "max_loss_scale"):
            numbers[key] = numbers[key] or _LARGE
    steps = numbers.pop("steps_per_increase")
    if steps is not None and steps % 1:
        raise ValueError(f"steps_per_increase must be a whole number, got {steps}")
    given = {
        "init_scale": numbers["initial_loss_scale"],
        "max_loss_scale": numbers["max_loss_scale"],
        "min_loss_scale": numbers["min_loss_scale"],
        "steps_per_increase": None if steps is None else int(steps),
    }
    return LossScaling("dynamic", **{k: v for k, v in given.items() if v is not None})


def _skip_spikes(value: Any) -> SkipSpikes | None:
    if value is None or value is False:
        return None
    if value is True:
        return SkipSpikes()
    known = SkipSpikes.__dataclass_fields__
    if not isinstance(value, Mapping) or not value.keys() <= known.keys():
        raise TypeError(
            f"skip_spikes must be true, false or a mapping with keys of {[*known]}, "
            f"got {shown(value)}"
        )
    return SkipSpikes(**{k: to_number(f"skip_spikes.{k}", v) for k, v in value.items()})


def _steps(value: Any) -> int:
    if value is None:
        return 1
    number = to_number("grad_accum_steps", value)
    if isinstance(number, bool) or number != int(number) or number < 1:
        raise ValueError(f"grad_accum_steps must be a whole number >= 1, got {shown(value)}")
    return int(number)


def _positive(section: Mapping[str, Any], key: str) -> float | None:
    if section.get(key) is None:
        return None
    value = to_number(key, section[key])
    check(key, value, "> 0")
    return float(value)
