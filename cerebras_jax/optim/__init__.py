"""Optimizers: pure functions in lower case, PyTorch-style classes in CamelCase."""

from cerebras_jax.engine.full_precision import full_precision
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
from cerebras_jax.optim.algorithms.muon import Muon, muon
from cerebras_jax.optim.algorithms.nadam import NAdam, nadam
from cerebras_jax.optim.algorithms.radam import RAdam, radam
from cerebras_jax.optim.algorithms.rmsprop import RMSprop, rmsprop
from cerebras_jax.optim.algorithms.rprop import Rprop, rprop
from cerebras_jax.optim.algorithms.sgd import SGD, sgd
from cerebras_jax.optim.algorithms.soap import SOAP, soap
from cerebras_jax.optim.classes import optimizer_of
from cerebras_jax.optim.configure import (
    configure_lr_scheduler,
    configure_optimizer,
    configure_param_groups,
)
from cerebras_jax.optim.coordinate_check import CoordinateCheck, coordinate_check
from cerebras_jax.optim.guarding import StepReport
from cerebras_jax.optim.layer_types import mup_factors
from cerebras_jax.optim.muon_groups import MuonGroups, muon_groups
from cerebras_jax.optim.mup import MupGroups, mup
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.optim.param_groups import ParamGroups, param_groups
from cerebras_jax.optim.qk_clip import qk_clip
from cerebras_jax.optim.selection import Selection, select
from cerebras_jax.transforms.agc import agc
from cerebras_jax.transforms.averages import Average, average
from cerebras_jax.transforms.cautious import cautious, cautious_decay
from cerebras_jax.transforms.clipping import clip
from cerebras_jax.transforms.every import every
from cerebras_jax.transforms.finite import GuardState, guard, skip_nonfinite, skip_spikes
from cerebras_jax.transforms.grouped import grouped
from cerebras_jax.transforms.loss_scale import GradScaler, LossScaling
from cerebras_jax.transforms.norms import NamedNorms, Norms, NormsState, measure_norms
from cerebras_jax.transforms.packed import PackedState, packed, unpacked
from cerebras_jax.transforms.spikes import SkipSpikes
