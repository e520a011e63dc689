"""What an algorithm of one's own is made of."""

from cerebras_jax.engine.lift import PureOptimizer, RuleState, per_parameter
from cerebras_jax.engine.rule import (
    Rule,
    add_weight_decay,
    bias_correction,
    has_term,
    zeros_without_axis,
)

__all__ = [
    "PureOptimizer",
    "Rule",
    "RuleState",
    "add_weight_decay",
    "bias_correction",
    "has_term",
    "per_parameter",
    "zeros_without_axis",
]
