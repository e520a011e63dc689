"""Optimizers and learning-rate schedules for JAX: the numbers of PyTorch and Cerebras."""

from importlib.metadata import version as _version

from cerebras_jax import optim, schedules, sharding, sparse
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
from cerebras_jax.trace import trace
from cerebras_jax.transforms.accumulate import (
    accumulate,
    accumulated_value_and_grad,
)

__version__ = _version("cerebras_jax")
