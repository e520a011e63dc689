"""Optimizers and learning-rate schedules for JAX: the numbers of PyTorch and Cerebras."""

from cerebras_jax import optim, schedules, sparse
from cerebras_jax.engine.xla_cpu import enable_multi_output_fusion
from cerebras_jax.recipe import Recipe, load_recipe
from cerebras_jax.stateful import Stateful
from cerebras_jax.trace import trace
