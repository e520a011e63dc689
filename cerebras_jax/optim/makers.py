"""How a class makes its optax pair from the values of a parameter group."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from cerebras_jax.engine import foreign
from cerebras_jax.engine.leaf import StateDtype
from cerebras_jax.engine.lift import lift
from cerebras_jax.engine.rule import Rule


@dataclasses.dataclass(frozen=True)
class RuleMaker:
    """Makes pairs of a one-parameter rule, with a clock for every parameter."""

    factory: Callable[..., Rule]

    def signature(self) -> inspect.Signature:
        return inspect.signature(self.factory)

    def check(self, hyper: Mapping[str, Any]) -> None:
        """Refuses values out of range."""
        self.factory(**hyper)

    def live(self, hyper: Mapping[str, Any]) -> frozenset[str]:
        """Names of the arguments whose numbers may be traced."""
        return frozenset(hyper)

    def pair(
        self, hyper: Mapping[str, Any], state_dtype: StateDtype, same: Sequence[int] | None
    ) -> optax.GradientTransformationExtraArgs:
        """The pair; see `lift`."""
        return lift(self.factory, hyper, state_dtype=state_dtype, per_leaf_clocks=True, same=same)

    def owners(self, hyper: Mapping[str, Any], state: Any, names: Any) -> list[str | None]:
        """Whose the leaves of a state are."""
        raise TypeError(f"the state of a rule is a RuleState, found {type(state).__name__}")


@dataclasses.dataclass(frozen=True)
class ForeignMaker:
    """Makes pairs of an optax factory."""

    factory: foreign.Factory

    def signature(self) -> inspect.Signature:
        return inspect.signature(self.factory)

    def check(self, hyper: Mapping[str, Any]) -> None:
        """Refuses what the factory refuses."""
        self.factory(**hyper)

    def live(self, hyper: Mapping[str, Any]) -> frozenset[str]:
        """Names of the arguments whose numbers may be traced."""
        return foreign.live_numbers(self.factory, hyper)

    def pair(
        self, hyper: Mapping[str, Any], state_dtype: StateDtype, same: Sequence[int] | None
    ) -> optax.GradientTransformationExtraArgs:
        """The pair, in which a None gradient holds its parameter back."""
        return foreign.adopt(self.factory, hyper)

    def owners(self, hyper: Mapping[str, Any], state: Any, names: Any) -> list[str | None]:
        """Whose the leaves of a state are."""
        return foreign.owners(self.factory, hyper, state, names)


Maker = RuleMaker | ForeignMaker
