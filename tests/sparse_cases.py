"""The golden sparse runs, and how close is close (see golden/README.md)."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cerebras_jax import schedules, sparse

_FOLDER = Path(__file__).parent / "golden"
TABLE = json.loads((_FOLDER / "sparsity.json").read_text())
NUMBERS = dict(np.load(_FOLDER / "sparsity.npz"))
STEPS: int = TABLE["steps"]
TORCH = (1, 0)  # the input and the output axis of the arrays here


def value(x: Any) -> Any:
    """A value as the table spells it."""
    if not isinstance(x, dict):
        return x
    numbers = {k: v for k, v in x.items() if k != "type"}
    kinds = {
        "constant": lambda value: value,
        "cycling": lambda values: values,
        "linear": sparse.linear,
        "exp": sparse.exponential,
        "power": lambda init, beta: schedules.multiplicative(init, beta),
        "cosine": lambda init, half_period, minimum=0.0: schedules.cosine_annealing(
            init, half_period, minimum
        ),
    }
    return kinds[x["type"]](**numbers)


def update(x: dict[str, Any] | None) -> Any:
    """An update schedule as the table spells it."""
    if x is None:
        return None
    if "steps" in x:
        return sparse.At(x["steps"])
    return sparse.Every(x.get("freq", 1), x.get("start") or 0, x.get("stop"))


ALGORITHMS = {"static": sparse.Static, "gmp": sparse.GMP, "set": sparse.SET, "rigl": sparse.RigL}


def algorithm(name: str, options: dict[str, Any]) -> sparse.Algorithm:
    """An algorithm from the options of a case."""
    arguments = {k: value(v) if k != "update" else update(v) for k, v in options.items()}
    arguments = {k: v for k, v in arguments.items() if v is not None and k != "params"}
    if name == "rigl":
        arguments["axes"] = TORCH
    return ALGORITHMS[name](**arguments)


class Case(NamedTuple):
    """One run of the original."""

    id: str
    table: dict[str, Any]

    def __getattr__(self, key: str) -> Any:
        return self.table[key]

    def sparsity(self) -> sparse.Sparsity:
        groups = self.groups or [{"params": self.sparse, **self.options}]
        return sparse.Sparsity({tuple(g["params"]): algorithm(self.algorithm, g) for g in groups})

    @property
    def shapes(self) -> dict[str, Any]:
        return TABLE["models"][self.model]

    def start(self) -> dict[str, np.ndarray]:
        return {name: NUMBERS[f"{self.model}/params0/{name}"] for name in self.shapes}

    def grads(self, step: int) -> dict[str, np.ndarray]:
        """The dense gradients of step 1, 2, ..."""
        return {name: NUMBERS[f"{self.model}/grads/{name}"][step - 1] for name in self.shapes}

    def mask(self, name: str) -> np.ndarray:
        return NUMBERS[f"{self.id}/mask/{name}"]

    def number(self, what: str, name: str) -> np.ndarray:
        return NUMBERS[f"{self.id}/{what}/{name}"]

    def check_params(self, path: dict[str, np.ndarray]) -> None:
        """Asserts that parameters, of steps 0 to T, follow the golden ones."""
        for name in self.shapes:
            expected = self.number("params", name).astype(np.float64)
            moved = np.abs(np.diff(expected, axis=0, prepend=expected[:1])).cumsum(0)
            error = 3 * self.float32_error[name]
            allowed = error + 1e-5 * moved + 2e-6 * np.maximum(1, np.abs(expected))
            assert (np.abs(path[name] - expected) <= allowed).all(), f"{self.id} {name}"

    def check_state(self, step: int, name: str, states: dict[str, np.ndarray]) -> None:
        """Asserts that the states of a parameter after a step are the golden ones."""
        for key in self.state_names:
            expected = self.number(f"state/{name}", key)[step - 1]
            np.testing.assert_allclose(
                states[key],
                expected,
                rtol=1e-4,
                atol=1e-6 * max(1, np.abs(expected).max()),
                err_msg=f"{self.id} {name} {key} after step {step}",
            )


CASES = [Case(c["id"], c) for c in TABLE["cases"]]
