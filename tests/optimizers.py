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
    Entry("adamw_schedule_free", {"lr": 0.1, "weight_decay": 0.1}),
    Entry("adamw_schedule_free", {"lr": 0.1, "weight_decay": 0.01, "warmup_steps": 3, "r": 0.5}),
    Entry("ademamix", {"lr": 0.1, "weight_decay": 0.1, "alpha_warmup": 3, "beta3_warmup": 3}),
    Entry("adopt", {"lr": 0.1, "weight_decay": 0.01, "decouple": True}),
    Entry("adopt", {"lr": 0.1, "weight_decay": 0.1, "decouple": True, "clip_exp": None}),
    Entry("asgd", {"lr": 0.1, "lambd": 0.01, "t0": 1}),
    Entry("adadelta", {"lr": 0.5, "weight_decay": 0.01}),
    Entry("adafactor", {"lr": 0.1, "weight_decay": 0.01}),
    Entry("adafactor", {"lr": 0.1, "beta1": 0.9, "scale_parameter": False}),
    Entry("adagrad", {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1}),
    Entry("adamax", {"lr": 0.1, "weight_decay": 0.01}),
    Entry("lamb", {"lr": 0.1, "weight_decay": 0.01}),
    Entry("lion", {"lr": 0.1, "weight_decay": 0.01}),
    # Two steps: more would amplify the rounding of matrices that are not of full rank.
    Entry("muon", {"lr": 0.1, "axes": "io", "ns_steps": 2}),
    Entry("muon", {"lr": 0.1, "axes": "bio", "ns_steps": 2, "adjust_lr_fn": "spectral"}),
    Entry("muon", {"lr": 0.1, "use_muon": False}),
    Entry("nadam", {"lr": 0.1, "weight_decay": 0.01}),
    Entry("radam", {"lr": 0.1, "betas": (0.8, 0.9)}),
    Entry("rmsprop", {"lr": 0.1, "weight_decay": 0.01}),
    Entry("rmsprop", {"lr": 0.1, "momentum": 0.9, "centered": True, "eps": 1e-3}),
    Entry("rprop", {"lr": 0.1}),
    # A large eps: in directions without gradients there is only rounding noise to divide.
    Entry("soap", {"lr": 0.3, "eps": 1.0, "precondition_frequency": 2}),
    Entry("adam_base", {"lr": 0.1, "weight_decay": 0.1, "l2_regularization_rate": 0.01}),
]


def one_each(turn: int) -> list[Entry]:
    """One setting of each optimizer: laws about what is around it take turns with the settings."""
    settings: dict[str, list[Entry]] = {}
    for entry in OPTIMIZERS:
        settings.setdefault(entry.name, []).append(entry)
    return [entries[turn % len(entries)] for entries in settings.values()]
