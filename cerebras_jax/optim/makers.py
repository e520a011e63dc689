"""How a class makes its optax pair from the values of a parameter group."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from cerebras_jax.engine import foreign
from cerebras_jax.engine.hyper import whole_arguments
from cerebras_jax.engine.leaf import Rounding, StateDtype
from cerebras_jax.engine.lift import lift
from cerebras_jax.engine.rule import Rule
from cerebras_jax.transforms.packed import joined, packed


class How(NamedTuple):
    """How arrays are kept; for pairs of rules only.

    Attributes:
      state_dtype, rounding: see `per_parameter`.
      pack: below how many elements parameters are packed; 0: none are. See `packed`.
      apart: dotted names of parameters that are not.
    """

    state_dtype: StateDtype = None
    rounding: Rounding = "nearest"
    pack: int = 0
    apart: tuple[str, ...] = ()

    def __hash__(self) -> int:
        dtype = self.state_dtype
        dtype = tuple(sorted(dtype.items())) if isinstance(dtype, dict) else dtype
        return hash((str(dtype), self.rounding, self.pack, self.apart))


@dataclasses.dataclass(frozen=True)
class RuleMaker:
    """Makes pairs of a one-parameter rule, with a clock for every parameter."""

    factory: Callable[..., Rule]

    def signature(self) -> inspect.Signature:
        return inspect.signature(self.factory)

    def check(self, hyper: Mapping[str, Any]) -> None:
        """Refuses values out of range."""
        self.factory(**hyper)

    def check_how(self, how: How, hyper: Mapping[str, Any]) -> None:
        """Refuses ways to keep arrays that there are not."""
        pair = self.pair(hyper, how._replace(pack=0), None, returns_params=False)
        if how.pack:
            packed(pair, how.pack)

    def live(self, hyper: Mapping[str, Any]) -> frozenset[str]:
        """Names of the arguments whose numbers may be traced."""
        return frozenset(hyper) - whole_arguments(self.factory)

    def pair(
        self, hyper: Mapping[str, Any], how: How, same: Sequence[int] | None, returns_params: bool
    ) -> optax.GradientTransformationExtraArgs:
        """The pair; see `lift`."""
        pair = lift(
            self.factory,
            hyper,
            state_dtype=how.state_dtype,
            per_leaf_clocks=True,
            same=same,
            rounding=how.rounding,
            returns_params=returns_params,
        )
        return joined(pair, how.pack, how.apart) if how.pack else pair

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

    def check_how(self, how: How, hyper: Mapping[str, Any]) -> None:
        """Refuses ways to keep arrays: the factory alone knows its states."""
        for name, value, default in zip(how._fields, how, How(), strict=True):
            if value is not None and value != default:
                raise TypeError(
                    f"{name} is for classes of our own rules; {foreign.name_of(self.factory)} "
                    f"keeps arrays in its own way, got {name}={value!r}"
                )

    def live(self, hyper: Mapping[str, Any]) -> frozenset[str]:
        """Names of the arguments whose numbers may be traced."""
        return foreign.live_numbers(self.factory, hyper)

    def pair(
        self, hyper: Mapping[str, Any], how: How, same: Sequence[int] | None, returns_params: bool
    ) -> optax.GradientTransformationExtraArgs:
        """The pair, in which a None gradient holds its parameter back."""
        pair = foreign.adopt(self.factory, hyper)
        return _applied(pair) if returns_params else pair

    def owners(self, hyper: Mapping[str, Any], state: Any, names: Any) -> list[str | None]:
        """Whose the leaves of a state are."""
        return foreign.owners(self.factory, hyper, state, names)


Maker = RuleMaker | ForeignMaker


def _applied(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns new parameters in place of updates; those without a gradient stay."""

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        treedef = jax.tree.structure(params)
        leaves = zip(
            treedef.flatten_up_to(grads),
            jax.tree.leaves(params),
            treedef.flatten_up_to(updates),
            strict=True,
        )
        new = [p if g is None else (p + u).astype(p.dtype) for g, p, u in leaves]
        return treedef.unflatten(new), state

    return optax.GradientTransformationExtraArgs(tx.init, update)  # pyright: ignore
