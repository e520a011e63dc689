"""Optimizers: pure functions in lower case, PyTorch-style classes in CamelCase."""

from cerebras_jax.optim import lr_scheduler, weight_decay_scheduler
from cerebras_jax.optim.algorithms.adadelta import Adadelta, adadelta
from cerebras_jax.optim.algorithms.adafactor import Adafactor, adafactor
from cerebras_jax.optim.algorithms.adagrad import Adagrad, adagrad
from cerebras_jax.optim.algorithms.adam import Adam, adam
from cerebras_jax.optim.algorithms.adam_base import AdamBase, adam_base
from cerebras_jax.optim.algorithms.adamax import Adamax, adamax
from cerebras_jax.optim.algorithms.adamw import AdamW, adamw
from cerebras_jax.optim.algorithms.adamw_schedule_free import (
    AdamWScheduleFree,
    adamw_schedule_free,
    eval_params,
)
from cerebras_jax.optim.algorithms.ademamix import AdEMAMix, ademamix
from cerebras_jax.optim.algorithms.adopt import ADOPT, adopt
from cerebras_jax.optim.algorithms.asgd import ASGD, asgd
from cerebras_jax.optim.algorithms.lamb import Lamb, lamb
from cerebras_jax.optim.algorithms.lion import Lion, lion
from cerebras_jax.optim.algorithms.nadam import NAdam, nadam
from cerebras_jax.optim.algorithms.radam import RAdam, radam
from cerebras_jax.optim.algorithms.rmsprop import RMSprop, rmsprop
from cerebras_jax.optim.algorithms.rprop import Rprop, rprop
from cerebras_jax.optim.algorithms.sgd import SGD, sgd
from cerebras_jax.optim.algorithms.soap import SOAP, soap
from cerebras_jax.optim.configure import (
    configure_lr_scheduler,
    configure_optimizer,
    configure_param_groups,
)
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.optim.param_groups import param_groups
from cerebras_jax.optim.shell import optimizer_of
from cerebras_jax.transforms.averages import Average, average
from cerebras_jax.transforms.clipping import clip
from cerebras_jax.transforms.grouped import grouped
