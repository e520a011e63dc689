"""Learning rates that fall when a metric stops improving."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cerebras_jax.checks import check, check_whole, is_traced
from cerebras_jax.formats.state_dict import plain_value
from cerebras_jax.optim.optimizer import Optimizer

_STATE = ("best", "cooldown_counter", "num_bad_epochs", "last_epoch")
_SETTINGS = ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown")


class ReduceLROnPlateau:
    """Multiplies the learning rates by ``factor`` after ``patience`` steps without a new best.

    As torch.optim.lr_scheduler.ReduceLROnPlateau. It starts from the groups' own learning rates,
    and reads the metric: call it between traced steps, for instance once an epoch.

    Args:
      optimizer: whose groups to write to; their ``lr`` are numbers.
      mode: "min" or "max": whether the metric should fall or rise.
      factor: in (0, 1).
      patience: so many steps without a new best are allowed, >= 0.
      threshold: how much better a new best must be, >= 0.
      threshold_mode: "rel": by that fraction of the best; "abs": by that much.
      cooldown: so many steps after a reduction are not counted, >= 0.
      min_lr: lower bound of the rates, or one for each group.
      eps: a smaller reduction is not made.

    Raises:
      TypeError: if ``optimizer`` is not an `Optimizer`, or a rate is a schedule.
      ValueError: if a value is outside its range.

    >>> import jax.numpy as jnp
    >>> from cerebras_jax import optim
    >>> opt = optim.SGD(jnp.ones(2), lr=0.1)
    >>> sched = ReduceLROnPlateau(opt, factor=0.5, patience=1)
    >>> for loss in [1.0, 0.9, 0.9, 0.9]:
    ...     sched.step(loss)
    >>> opt.param_groups[0]["lr"], sched.best
    (0.05, 0.9)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float | Sequence[float] = 0.0,
        eps: float = 1e-8,
    ):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be an Optimizer, got {type(optimizer).__name__}")
        _check_settings(mode, factor, patience, threshold, threshold_mode, cooldown)
        check("eps", eps, ">= 0")
        groups = len(optimizer.param_groups)
        bounds: list[Any] = list(min_lr) if isinstance(min_lr, list | tuple) else [min_lr] * groups
        if len(bounds) != groups:
            raise ValueError(f"min_lr must be one number or {groups}, got {min_lr!r}")
        for i, bound in enumerate(bounds):
            check(f"min_lr[{i}]", bound, ">= 0")
        for i, group in enumerate(optimizer.param_groups):
            if callable(group["lr"]):
                raise TypeError(f"param_groups[{i}]: lr must be a number, got {group['lr']!r}")
        self.optimizer = optimizer
        self.mode, self.factor, self.patience = mode, factor, patience
        self.threshold, self.threshold_mode, self.cooldown = threshold, threshold_mode, cooldown
        self.min_lrs, self.eps = bounds, eps
        self.best = math.inf if mode == "min" else -math.inf
        self.cooldown_counter = self.num_bad_epochs = self.last_epoch = 0

    def step(self, metrics: Any) -> None:
        """Notes a metric, a number or a scalar array, and reduces the rates if it is time.

        Raises:
          RuntimeError: in a traced step, which does not know the metric yet.
        """
        if is_traced(metrics):
            raise RuntimeError("the metric is not known within a traced step; call step outside it")
        current = float(metrics)
        self.last_epoch += 1
        if self._is_better(current):
            self.best, self.num_bad_epochs = current, 0
        else:
            self.num_bad_epochs += 1
        if self.cooldown_counter > 0:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            self._reduce()
            self.cooldown_counter, self.num_bad_epochs = self.cooldown, 0

    def _is_better(self, current: float) -> bool:
        sign = 1 if self.mode == "min" else -1
        if self.threshold_mode == "rel":
            return sign * current < sign * self.best * (1 - sign * self.threshold)
        return sign * current < sign * self.best - self.threshold

    def _reduce(self) -> None:
        for group, bound in zip(self.optimizer.param_groups, self.min_lrs, strict=True):
            old = float(plain_value(group["lr"]))
            new = max(old * self.factor, bound)
            if old - new > self.eps:
                group["lr"] = new

    def get_last_lr(self) -> list[float]:
        """The rates in force, one for each group."""
        return [float(plain_value(group["lr"])) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Settings and counters, by torch's names."""
        names = (*_SETTINGS, "min_lrs", "eps", *_STATE)
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what `state_dict`, or torch's, returned; the rates are the optimizer's.

        Raises:
          ValueError: if a value is missing or out of range; nothing is loaded then.
        """
        missing = sorted({*_SETTINGS, *_STATE} - set(state_dict))
        if missing:
            raise ValueError(f"the state dict lacks {missing}")
        _check_settings(*(state_dict[name] for name in _SETTINGS))
        loaded = {**self.state_dict(), **state_dict}
        bounds = loaded["min_lrs"]
        if len(bounds) != len(self.optimizer.param_groups):
            raise ValueError(f"min_lrs must be {len(self.min_lrs)} numbers, got {bounds!r}")
        for name in self.state_dict():
            setattr(self, name, loaded[name])


def _check_settings(
    mode: Any, factor: Any, patience: Any, threshold: Any, threshold_mode: Any, cooldown: Any
) -> None:
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
    if threshold_mode not in ("rel", "abs"):
        raise ValueError(f"threshold_mode must be 'rel' or 'abs', got {threshold_mode!r}")
    check("factor", factor, "in (0, 1)")
    check_whole("patience", patience, 0)
    check("threshold", threshold, ">= 0")
    check_whole("cooldown", cooldown, 0)
