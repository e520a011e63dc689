"""Schedule-free AdamW: an average of the steps in the place of a decaying learning rate."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cerebras_jax.checks import check, check_pair
from cerebras_jax.engine.memory import on_device
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.rule import Rule, RuleState, add_weight_decay, bias_correction, per_parameter
from cerebras_jax.transforms.averages import parameter_tree
from cerebras_jax.transforms.packed import unpacked
from cerebras_jax.types import Array, Number, Params


class ScheduleFreeState(NamedTuple):
    z: Array  # where plain AdamW without momentum is, like the parameter; at least float32
    exp_avg_sq: Array  # second moment, like the parameter; at least float32


class ScheduleFreeClock(NamedTuple):
    weight_sum: Array  # of the weights of all steps in the average
    lr_max: Array  # the largest learning rate so far
    beta1: Array  # of the last step: tells the average from the parameter


class _Now(NamedTuple):
    lr: Array
    c: Array
    correction: Array


@per_parameter
def adamw_schedule_free(
    lr: Number = 0.0025,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    warmup_steps: Number = 0,
    r: Number = 0.0,
    weight_lr_power: Number = 2.0,
) -> Rule:
    r"""Schedule-free AdamW: needs no decay of the learning rate, and no end known beforehand.

    .. math::

        \gamma_t &= \gamma \min(1, t / T_w), \quad
            w_t = t^r \max_{i \le t} \gamma_i^\rho, \quad
            c_t = w_t / \textstyle\sum_{i \le t} w_i \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        u &= \frac{g}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda y \\
        y &\leftarrow y + c_t (z - y) - \gamma_t (1 - \beta_1 (1 - c_t)) \, u \\
        z &\leftarrow z - \gamma_t u

    The parameters are y, where gradients are taken. What to evaluate and to keep is the average x
    of all z, which needs no memory of its own: :math:`y = \beta_1 x + (1 - \beta_1) z`. See
    `eval_params`.

    As the package schedulefree, 1.4.1. optax.contrib.schedule_free wraps an optimizer instead,
    and its warm-up starts with a rate of 0. A rate that falls makes the later steps shorter, not
    lighter in the average: warm-up is all the schedule that it wants.

    Args:
      lr: learning rate :math:`\gamma` >= 0, one to ten times that of AdamW with a schedule.
      betas: share of the average in y, in (0, 1), and decay rate of the second moment, in [0, 1).
      eps: :math:`\epsilon` >= 0, added after the bias correction.
      weight_decay: decoupled decay :math:`\lambda` >= 0, at y.
      warmup_steps: :math:`T_w` >= 0, steps in which the rate rises linearly.
      r: power of the step in its weight, >= 0.
      weight_lr_power: :math:`\rho` >= 0, power of the largest rate so far in the weight.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Defazio et al., The Road Less Scheduled, https://arxiv.org/abs/2405.15682

    >>> tx = adamw_schedule_free(lr=0.5, eps=0.0)
    >>> params = jnp.array([1.0])
    >>> updates, state = tx.update(jnp.array([4.0]), tx.init(params), params)
    >>> params + updates, state.states.z  # the first average is the first z
    (Array([0.5], dtype=float32), Array([0.5], dtype=float32))
    """
    check("lr", lr, ">= 0")
    check_pair("betas", betas, "in (0, 1)", "in [0, 1)")
    check("eps", eps, ">= 0")
    check("weight_decay", weight_decay, ">= 0")
    check("warmup_steps", warmup_steps, ">= 0")
    check("r", r, ">= 0")
    check("weight_lr_power", weight_lr_power, ">= 0")
    b1, b2 = betas

    def init(p: Array) -> ScheduleFreeState:
        wide = jnp.promote_types(p.dtype, jnp.float32)
        is_abstract = isinstance(p, jax.ShapeDtypeStruct)
        z = jnp.zeros_like(p, wide) if is_abstract else jnp.array(p, wide, copy=True)
        return ScheduleFreeState(z, jnp.zeros_like(p, wide))

    def tick(clock: ScheduleFreeClock, t: Array) -> tuple[_Now, ScheduleFreeClock]:
        rate = lr * jnp.minimum(1, t / jnp.maximum(1, warmup_steps))
        lr_max = jnp.maximum(rate, clock.lr_max)
        weight = t**r * lr_max**weight_lr_power
        weight_sum = clock.weight_sum + weight
        c = jnp.where(weight_sum > 0, weight / weight_sum, 0)
        return _Now(rate, c, bias_correction(b2, t)), ScheduleFreeClock(weight_sum, lr_max, b1)

    def update(
        g: Array, s: ScheduleFreeState, now: _Now, p: Array
    ) -> tuple[Array, ScheduleFreeState]:
        v = b2 * s.exp_avg_sq + (1 - b2) * g * g
        u = g / (jnp.sqrt(v / now.correction) + eps)
        u = now.lr * add_weight_decay(u, weight_decay, p)
        step = now.c * (s.z - p) - (1 - b1 * (1 - now.c)) * u
        return step, ScheduleFreeState(s.z - u, v)

    return Rule(
        init,
        update,
        ScheduleFreeClock(0.0, 0.0, b1),
        tick,
        written_last=("z", "exp_avg_sq"),
        wide=("z", "exp_avg_sq"),
        elementwise=True,
    )


def eval_params(state: Any, params: Params) -> Params:
    """The parameters to evaluate: the average that `adamw_schedule_free` trains towards.

    Args:
      state: of the optimizer, or of a chain that it is in.
      params: the parameters, which are in training.

    Returns:
      A tree like the parameters, in their dtypes.

    Raises:
      ValueError: if the state has none, or more than one, of `adamw_schedule_free`.

    >>> tx = adamw_schedule_free(lr=0.5, betas=(0.5, 0.999))
    >>> params, state = jnp.array([1.0]), tx.init(jnp.array([1.0]))
    >>> for _ in range(2):
    ...     updates, state = tx.update(jnp.array([4.0]), state, params)
    ...     params = params + updates
    >>> params, eval_params(state, params)  # z was at 0.5 and is at 0
    (Array([0.125], dtype=float32), Array([0.25], dtype=float32))
    """
    parts = jax.tree.leaves(unpacked(state, params), is_leaf=_is_schedule_free)
    found = [x for x in parts if _is_schedule_free(x)]
    if len(found) != 1:
        raise ValueError(f"eval_params needs one state of adamw_schedule_free, found {len(found)}")
    leaves, treedef = jax.tree.flatten(params)
    beta1 = jnp.broadcast_to(found[0].clock.beta1, len(leaves))
    z = treedef.flatten_up_to(found[0].states.z)
    averages = [_average(b, z, y) for b, z, y in zip(beta1, z, leaves, strict=True)]
    return treedef.unflatten(averages)


def _is_schedule_free(x: Any) -> bool:
    return isinstance(x, RuleState) and isinstance(x.states, ScheduleFreeState)


def _average(beta1: Array, z: Array, y: Array) -> Array:
    return (y + (1 - 1 / beta1) * (on_device(z) - y)).astype(y.dtype)


class AdamWScheduleFree(Optimizer.of(adamw_schedule_free, enable_global_step=True)):
    states_to_sparsify = ("z", "exp_avg_sq")

    _training: dict[str, Array] | None = None  # the parameters in training, in eval mode

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate, a tree like `params`; an nnx.State for a module."""
        leaves, treedef = jax.tree.flatten(parameter_tree(self.params))
        if self._training is not None:
            return treedef.unflatten(leaves)
        return treedef.unflatten(list(self._averages().values()))

    def eval(self) -> None:
        """Makes `params`, or the module, hold what is to be evaluated, until `train`."""
        if self._training is None:
            averages, training = self._averages(), dict(self.named_parameters())
            for name, value in averages.items():
                self.set_parameter(name, value)
            self._training = training

    def train(self) -> None:
        """Goes back to the parameters in training, which `eval` has put aside."""
        if self._training is not None:
            for name, value in self._training.items():
                self.set_parameter(name, value)
            self._training = None

    def step(self, grads_or_closure: Any = None, *, has_aux: bool = False) -> Any:
        """One optimization step; see `Optimizer.step`.

        Raises:
          RuntimeError: in eval mode.
        """
        self._check_training("step")
        return super().step(grads_or_closure, has_aux=has_aux)

    def state_dict(self) -> dict[str, Any]:
        """State and groups in torch's layout; a RuntimeError in eval mode."""
        self._check_training("state_dict")
        return super().state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Takes over state and group values; a RuntimeError in eval mode."""
        self._check_training("load_state_dict")
        super().load_state_dict(state_dict)

    def named_state(self) -> Any:
        """See `Optimizer.named_state`; a RuntimeError in eval mode."""
        self._check_training("named_state, for a checkpoint,")
        return super().named_state()

    def _check_training(self, what: str) -> None:
        if self._training is not None:
            raise RuntimeError(f"{what} was called in eval mode; call train() first")

    def _averages(self) -> dict[str, Array]:
        return {
            name: _average(jnp.asarray(self.state[name]["beta1"]), self.state[name]["z"], y)
            for name, y in self.named_parameters()
        }
