"""Optimizers and learning-rate schedules for JAX: the numbers of PyTorch and Cerebras.

What is here is loaded when it is first asked for.
"""

import importlib as _importlib
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from cerebras_jax import optim, rule, schedules, sharding, sparse
    from cerebras_jax.checkpoint import (
        CheckpointError,
        Checkpoints,
        DamagedError,
        fingerprint,
        inspect,
        restore,
        save,
    )
    from cerebras_jax.engine.xla_cpu import enable_multi_output_fusion
    from cerebras_jax.recipe import Recipe, load_recipe
    from cerebras_jax.stateful import Stateful
    from cerebras_jax.transforms.accumulate import accumulate, accumulated_value_and_grad
    from cerebras_jax.whole_graph import trace

_HOMES = {
    "checkpoint": (
        "CheckpointError", "Checkpoints", "DamagedError", "fingerprint", "inspect", "restore",
        "save",
    ),
    "engine.xla_cpu": ("enable_multi_output_fusion",),
    "recipe": ("Recipe", "load_recipe"),
    "stateful": ("Stateful",),
    "transforms.accumulate": ("accumulate", "accumulated_value_and_grad"),
    "whole_graph": ("trace",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__version__ = _version("cerebras_jax")
__all__ = ["optim", "rule", "schedules", "sharding", "sparse"]
__all__ += ["CheckpointError", "Checkpoints", "DamagedError", "Recipe", "Stateful"]
__all__ += ["accumulate", "accumulated_value_and_grad", "enable_multi_output_fusion"]
__all__ += ["fingerprint", "inspect", "load_recipe", "restore", "save", "trace"]


def __getattr__(name: str) -> _Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = f"{__name__}.{_HOME_OF.get(name, name)}"
    module = _importlib.import_module(home)
    return globals().setdefault(name, getattr(module, name) if name in _HOME_OF else module)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
