"""The table of optimizers: the tests' laws run over all of it."""

from typing import Any, NamedTuple

from cerebras_jax import optim


class Entry(NamedTuple):
    name: str  # of the pure function
    kwargs: dict[str, Any]

    @property
    def pure(self) -> Any:
        return getattr(optim, self.name)

    @property
    def cls(self) -> Any:
        by_name = {n.lower(): c for n, c in vars(optim).items() if isinstance(c, type)}
        return by_name[self.name.replace("_", "")]

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.kwargs.items())})"


OPTIMIZERS = [
    Entry("sgd", {"lr": 0.1}),
    Entry("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    Entry("adam", {"lr": 0.1, "weight_decay": 0.01}),
    Entry("adam", {"lr": 0.1, "amsgrad": True}),
    Entry("adamw", {"lr": 0.1, "weight_decay": 0.1}),
    Entry("adamw", {"lr": 0.1, "correct_bias": False}),
    Entry("adam_base", {"lr": 0.1, "weight_decay": 0.1, "l2_regularization_rate": 0.01}),
]
