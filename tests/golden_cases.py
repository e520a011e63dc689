"""The golden trajectories, and how close is close (see golden/README.md)."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_FOLDER = Path(__file__).parent / "golden"
_TABLE = json.loads((_FOLDER / "optimizers.json").read_text())
_NUMBERS = dict(np.load(_FOLDER / "optimizers.npz"))

STEPS: int = _TABLE["steps"]
NAMES = list(_TABLE["params"])
SCHEDULES = json.loads((_FOLDER / "schedulers.json").read_text())["cases"]


class Case(NamedTuple):
    id: str
    optimizer: str
    kwargs: dict[str, Any]
    groups: list[dict[str, Any]] | None
    lr_at_step: dict[int, float]
    state_names: dict[str, list[str]]

    def state(self, when: str, name: str) -> dict[str, np.ndarray]:
        """The states of one parameter: ``when`` is "state0" or "state"."""
        prefix = f"{self.id}/{when}/{name}/"
        return {k.removeprefix(prefix): v for k, v in _NUMBERS.items() if k.startswith(prefix)}

    def check(self, trajectory: dict[str, np.ndarray], x64: bool) -> None:
        """Asserts that parameters (steps first) follow the golden ones."""
        for name in NAMES:
            start = params0()[name].astype(np.float64)
            f32 = _NUMBERS[f"{self.id}/params/{name}"].astype(np.float64)
            f64 = _NUMBERS[f"{self.id}/params64/{name}"]
            path = np.abs(np.diff(np.concatenate([start[None], f64]), axis=0)).cumsum(0)
            if x64:
                # Of the parameter's distance: the original's scalars (ASGD's 1 - lambd * eta,
                # RAdam's rho) are float32 even here, which single elements may show.
                distance = path.max(axis=tuple(range(1, path.ndim)), keepdims=True)
                allowed, expected = 3e-5 * distance + 1e-12, f64
            else:
                allowed = 3 * np.abs(f32 - f64) + 1e-5 * path + 2e-6 * np.maximum(1, np.abs(f32))
                expected = f32
            error = np.abs(trajectory[name] - expected)
            worst = (error - allowed).max()
            assert (error <= allowed).all(), f"{self.id} {name}: {worst:g} beyond what is allowed"


def params0() -> dict[str, np.ndarray]:
    return {name: _NUMBERS[f"params0/{name}"] for name in NAMES}


def grads(step: int) -> dict[str, np.ndarray]:
    return {name: _NUMBERS[f"grads/{name}"][step] for name in NAMES}


def cases() -> list[Case]:
    return [
        Case(
            c["id"],
            c["optimizer"],
            c["kwargs"],
            c["groups"],
            {int(k): v for k, v in (c["lr_at_step"] or {}).items()},
            c["state_names"],
        )
        for c in _TABLE["cases"]
    ]
