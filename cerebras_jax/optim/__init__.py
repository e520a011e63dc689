"""Optimizers: pure functions in lower case, PyTorch-style classes in CamelCase."""

from cerebras_jax.optim import lr_scheduler
from cerebras_jax.optim.algorithms.adam import Adam, adam
from cerebras_jax.optim.algorithms.adam_base import AdamBase, adam_base
from cerebras_jax.optim.algorithms.adamw import AdamW, adamw
from cerebras_jax.optim.algorithms.sgd import SGD, sgd
from cerebras_jax.optim.configure import (
    configure_lr_scheduler,
    configure_optimizer,
    configure_param_groups,
)
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.optim.param_groups import param_groups
