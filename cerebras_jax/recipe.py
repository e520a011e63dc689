"""A training recipe from a Model Zoo configuration: optimizer, schedules, clipping, groups."""

from __future__ import annotations

import dataclasses
import html
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from cerebras_jax import schedules
from cerebras_jax.driven import check_schedulers, drivers
from cerebras_jax.engine.state_memory import StateMemory
from cerebras_jax.messages import shortened, shown
from cerebras_jax.optim.algorithms.muon import Muon
from cerebras_jax.optim.configure import (
    lr_factors,
    make_param_groups,
    optimizer_arguments,
    param_filters,
)
from cerebras_jax.optim.guarding import SETTINGS
from cerebras_jax.optim.layer_types import mup_factors
from cerebras_jax.optim.muon_groups import muon_values
from cerebras_jax.optim.names import check_plain, find_class, rate_key
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.optim.param_groups import ParamGroups
from cerebras_jax.optim.schedule_config import ScheduleConfig, kind_of, schedule_config
from cerebras_jax.optim.scheduler import Scheduler
from cerebras_jax.optim.sparse_optimizer import SparseOptimizer
from cerebras_jax.sections import Sections, read_sections
from cerebras_jax.sparse.configure import configure_sparsity
from cerebras_jax.sparse.masking import mask_gradients
from cerebras_jax.sparse.selection import Sparsity
from cerebras_jax.sparse.transform import sparsify
from cerebras_jax.step_config import step_config
from cerebras_jax.transforms.clipping import clip
from cerebras_jax.transforms.finite import guard
from cerebras_jax.transforms.grouped import grouped
from cerebras_jax.transforms.loss_scale import GradScaler, LossScaling
from cerebras_jax.transforms.packed import below_which, packed
from cerebras_jax.transforms.spikes import SkipSpikes
from cerebras_jax.yaml_config import read_config

_SIZES = ("hidden_size", "filter_size", "mup_base_hidden_size", "mup_base_filter_size")
_OF_BERT = "encoder_nonlinearity"
_COUNTS = "enable_global_step"  # an argument of the classes alone


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a configuration says about optimization, ready to be used in either form.

    Attributes:
      optimizer_class: e.g. `optim.AdamW`.
      optimizer_values: its constructor arguments.
      schedulers: what drives the learning rate and the weight decay, and in which groups.
      max_gradient_norm: clip gradients to this global norm; None: do not.
      max_gradient_value: clip every gradient element to this; None: do not.
      loss_scaling: how the loss is scaled; None: not at all. See `scaler`.
      skip_nonfinite: take no step that is not finite; by default with a dynamic loss scale.
      skip_spikes: what a spike is, if those are not taken either.
      grad_accum_steps: in how many parts a batch is computed; for `cerebras_jax.accumulate`.
      adjust_learning_rate: factors by layer type or pattern, those of muP included.
      params: further groups: ``[{"params": patterns, "tag": name}, ...]``.
      sparsity: which parameters are sparse, and how; None: none are.
      warnings: what was ignored, one sentence each.
    """

    optimizer_class: type[Optimizer]
    optimizer_values: dict[str, Any]
    schedulers: tuple[ScheduleConfig, ...] = ()
    max_gradient_norm: float | None = None
    max_gradient_value: float | None = None
    loss_scaling: LossScaling | None = None
    skip_nonfinite: bool = False
    skip_spikes: SkipSpikes | None = None
    grad_accum_steps: int = 1
    adjust_learning_rate: dict[Any, float] | None = None
    params: list[dict[str, Any]] | None = None
    sparsity: Sparsity | None = None
    warnings: tuple[str, ...] = ()

    def optimizer(
        self,
        params: Any,
        *,
        zero_axis: str | None = None,
        state_memory: StateMemory = None,
        pack: bool | int = False,
    ) -> tuple[Optimizer, list[Scheduler]]:
        """The class form: the optimizer, which clips and skips, and the schedulers to step.

        Loss scaling is apart: ``opt.step(loss_fn, scaler=recipe.scaler())``. With a sparsity the
        parameters are pruned: those of a module in place, others are ``opt.params``.

        Args:
          params: as a class of `optim` takes them.
          zero_axis: a mesh axis to split the states over; see `sharding.state`.
          state_memory: the memory to keep the states in; see `sharding.state`.
          pack: the size below which parameters are packed; see `optim.packed`.

        Raises:
          TypeError: if the recipe has a sparsity, and the optimizer a step of its own.
          ValueError: if a pattern or a tag of the recipe has no parameters here, or two
            schedulers drive the same number of one parameter.
        """
        groups = self.param_groups(params)
        drivers(self.schedulers, groups)
        given = {"zero_axis": zero_axis, "state_memory": state_memory}
        how: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        if pack is not False:
            how["pack"] = pack
        opt = self.optimizer_class(groups, **self.optimizer_values, **how)
        for name in SETTINGS:
            value = getattr(self, name, None)
            if value not in (None, False):
                setattr(opt, name, value)
        if self.sparsity is not None:
            if not isinstance(opt, SparseOptimizer):
                raise TypeError(f"{type(opt).__name__} has no masks: it has a step of its own")
            opt.apply(self.sparsity)
        return opt, [config.attach(opt) for config in self.schedulers]

    def transformation(
        self, params: Any, *, pack: bool | int = False
    ) -> optax.GradientTransformationExtraArgs:
        """The pure form: an optax chain of the optimizer, which clips and skips, with groups.

        Its ``update`` takes ``loss`` and ``loss_scale``; see `optim.guard`. With a sparsity, prune
        the parameters once: ``sparse.prune(params, state)``.

        Args:
          params: the parameters, as an example of their names: a pytree or nnx.Module.
          pack: the size below which the parameters of a group are packed; see `optim.packed`.

        Raises:
          TypeError: if the optimizer, or a scheduler of a user's own, has no pure form; or if it
            cannot be packed.
          ValueError: as `optimizer`; from ``init`` and ``update``, for a tree with other names.
        """
        groups = self.param_groups(params)
        pure = _pure_form(self.optimizer_class)
        parts = [self._made(pure, values) for values in self._values_of(groups)]
        if below := below_which(pack):
            parts = [packed(part, below) for part in parts]
        update = grouped(parts, [group["params"] for group in groups])
        if self.sparsity is not None:
            states = getattr(self.optimizer_class, "states_to_sparsify", ()) or None
            update = sparsify(update, self.sparsity, states=states)
        bounds = self.max_gradient_norm, self.max_gradient_value
        if self.skip_nonfinite or self.skip_spikes is not None or self.loss_scaling is not None:
            skips = self.skip_nonfinite or self.loss_scaling is not None
            result = optax.chain(guard(update, *bounds, skips, self.skip_spikes))
        elif bounds == (None, None):
            return optax.chain(update)
        else:
            result = optax.chain(clip(*bounds), update)
        return result if self.sparsity is None else mask_gradients(result)

    def scaler(self) -> GradScaler | None:
        """A new scaler for ``opt.step(..., scaler=)``; None if the loss is not scaled."""
        return None if self.loss_scaling is None else GradScaler.of(self.loss_scaling)

    def _made(self, pure: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """The pair of a group; a schedule that is refused is named by its place."""
        try:
            return pure(**values)
        except (TypeError, ValueError) as error:
            places = ", ".join(config.where for config in self.schedulers)
            raise type(error)(f"{places}: {error}" if places else str(error)) from None

    def _values_of(self, groups: ParamGroups) -> list[dict[str, Any]]:
        """The hyper-parameters of each group, schedules in place of what they drive."""
        known = inspect.signature(self.optimizer_class).parameters.keys() - {"params"}
        result = []
        for group, driven in zip(groups, drivers(self.schedulers, groups), strict=True):
            values = {**self.optimizer_values, **{k: v for k, v in group.items() if k in known}}
            values.pop(_COUNTS, None)
            for key, config in driven.items():
                factor = group.get("adjust_learning_rate", 1.0) if config.is_scaled else 1.0
                schedule = config.schedule
                values[self._name(key)] = (
                    schedule if factor == 1.0 else schedules.scaled(schedule, factor)
                )
            result.append(values)
        return result

    def schedule(self, key: str = "lr") -> Callable[[Any], Any]:
        """The pure schedule of ``"lr"`` or ``"weight_decay"``: the constant if none drives it.

        Where schedulers drive the groups of different tags, it is the first one's.

        Raises:
          ValueError: if the optimizer has no number of that name.
        """
        for config in self.schedulers:
            if config.key == key:
                return config.schedule
        constant = self.constant(key)
        return constant if callable(constant) else schedules.constant(constant)

    def _repr_html_(self) -> str:
        """For Jupyter: the optimizer and its values, then the curves of the schedules."""
        values = {
            **self.optimizer_values,
            "max_gradient_norm": self.max_gradient_norm,
            "max_gradient_value": self.max_gradient_value,
            "loss_scaling": self.loss_scaling,
            "skip_nonfinite": self.skip_nonfinite or None,
            "skip_spikes": self.skip_spikes,
            "adjust_learning_rate": self.adjust_learning_rate,
            "sparsity": self.sparsity,
        }
        rows = "".join(
            f"<tr><td>{html.escape(k)}</td><td>{html.escape(shown(v))}</td></tr>"
            for k, v in values.items()
            if v is not None
        )
        curves = "".join(
            f"<p>{key}</p>{self.schedule(key)._repr_html_()}"  # pyright: ignore
            for key in dict.fromkeys(config.key for config in self.schedulers)
            if hasattr(self.schedule(key), "_repr_html_")
        )
        name = html.escape(self.optimizer_class.__name__)
        return f"<table><caption><code>{name}</code></caption>{rows}</table>{curves}"

    def has(self, key: str) -> bool:
        """Whether the optimizer has a number of that name."""
        return self._name(key) in inspect.signature(self.optimizer_class).parameters

    def _name(self, key: str) -> str:
        """What the optimizer calls a number: optax says ``learning_rate`` for ``lr``."""
        return rate_key(self.optimizer_class) if key == "lr" else key

    def constant(self, key: str) -> Any:
        """The value of an unscheduled number of the optimizer, e.g. ``"weight_decay"``.

        Raises:
          ValueError: if the optimizer has no number of that name.
        """
        parameters = inspect.signature(self.optimizer_class).parameters
        if not self.has(key):
            name = self.optimizer_class.__name__
            raise ValueError(f"{name} has no number {shown(key)}, it has {[*parameters][1:]}")
        value = self.optimizer_values.get(self._name(key), parameters[self._name(key)].default)
        return 0.0 if value is None else value

    def param_groups(self, params: Any) -> ParamGroups:
        """The parameter groups: without decay for biases and norms, adjusted, tagged.

        Raises:
          ValueError: if a pattern or a layer type of the recipe matches no parameter.
        """
        rules = {"adjust_learning_rate": self.adjust_learning_rate, "params": self.params}
        rate = self.constant("lr") if self.has("lr") else None
        own = muon_values(params) if issubclass(self.optimizer_class, Muon) else {}
        return make_param_groups(params, rules, self._name("lr"), rate, own)


def _pure_form(cls: type[Optimizer]) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """The function that a class was made of.

    Raises:
      TypeError: if there is none that takes the same arguments.
    """
    if not _is_plain(cls):
        reason = "constructor of its own" if hasattr(cls, "pure") else "step of its own"
        raise TypeError(f"{cls.__name__} has no pure form, because it has a {reason}")
    return cls.pure  # pyright: ignore


def _is_plain(cls: type[Optimizer]) -> bool:
    """Whether an optimizer is a pure function and nothing else."""
    is_ours = cls.__init__.__module__.partition(".")[0] == __name__.partition(".")[0]
    return hasattr(cls, "pure") and is_ours


# --- reading --------------------------------------------------------------------------------------


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    """Reads a whole Model Zoo configuration, or its optimizer section, in either style.

    Where the section ``model`` asks for muP (``mup_base_hidden_size``, ``mup_base_filter_size``),
    its factors of the learning rate are part of the recipe; of two factors for one parameter that
    in ``adjust_learning_rate`` counts. What changes the numbers of a run and is not acted on, such
    as ``fp16_type``, is named in ``recipe.warnings``.

    Args:
      source: the path of a YAML file, or what it holds as a dict.

    Raises:
      TypeError, ValueError: names the key, the rule and the value.
      OSError: if the file cannot be read.

    >>> recipe = load_recipe({"optimizer": {"optimizer_type": "AdamW", "learning_rate": 1e-4,
    ...                                     "max_gradient_norm": 1.0}})
    >>> recipe.optimizer_class.__name__, recipe.max_gradient_norm, recipe.schedule()(0)
    ('AdamW', 1.0, 0.0001)
    """
    config = read_config(source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe = _recipe(read_sections(config))
    for w in caught:
        warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    return dataclasses.replace(recipe, warnings=tuple(str(w.message) for w in caught))


def _recipe(sections: Sections) -> Recipe:
    cls = find_class(sections.optimizer_type, Optimizer, "optimizer_type")
    values = optimizer_arguments(cls, sections.optimizer)
    if cls is Muon:
        values = {"adjust_lr_fn": "match_rms_adamw", **values}  # as the original
        warnings.warn(
            "Muon keeps its momentum, and does not scale its weight decay, both unlike the "
            "original; embeddings, the output layer and vectors are its Adam's",
            stacklevel=3,
        )
    if _is_plain(cls):
        _check_ranges(cls, values)
    params = sections.others.get("params")
    filters = param_filters(params)
    configs = [schedule_config(v, kind_of(v), at) for at, v in sections.schedulers]
    schedulers = [config for config in configs if config is not None]
    tags = {tag for f in filters for tag in f.tags}
    check_schedulers(cls, schedulers, tags, _is_plain(cls))
    factors = _factors(sections)
    is_scaled = bool(factors) or any("adjust_learning_rate" in f.values for f in filters)
    if is_scaled:
        _check_scaling(cls, values, schedulers)
        schedulers = [config.scaled() for config in schedulers]
    if sections.ignored:
        warnings.warn(f"not acted on: {', '.join(sections.ignored)}", stacklevel=3)
    return Recipe(
        cls,
        values,
        tuple(schedulers),
        *step_config(sections.others, _fp16_type(sections)),
        adjust_learning_rate=factors or None,
        params=[dict(given) for given in _listed(params)] or None,
        sparsity=_sparsity(sections.sparsity),
    )


def _sparsity(section: Any) -> Sparsity | None:
    try:
        return configure_sparsity(section)
    except (TypeError, ValueError) as error:
        raise type(error)(shortened(str(error))) from None


def _check_ranges(cls: type[Optimizer], values: Mapping[str, Any]) -> None:
    try:
        cls.pure(**{k: v for k, v in values.items() if k != _COUNTS})  # pyright: ignore
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(shortened(f"{cls.__name__}: {error}")) from None


def _factors(sections: Sections) -> dict[Any, float]:
    """The factors of the learning rate: those of muP, and those that are given over them."""
    model, given = sections.model, sections.others.get("adjust_learning_rate")
    sizes = {k: v for k, v in model.items() if k in _SIZES}
    check_plain("model", sizes)
    derived = mup_factors({**sizes, **{k: model.get(k) for k in ("name", _OF_BERT) if k in model}})
    unknown = [k for k, v in model.items() if str(k).startswith("mup_") and v is not None]
    unknown = [k for k in unknown if k not in _SIZES]
    if unknown:
        warnings.warn(f"not acted on: {', '.join(f'model.{k}' for k in unknown)}", stacklevel=3)
    factors = lr_factors(given)
    left_out = (given or {}).keys() - factors.keys()
    if factors and derived.keys() - left_out:
        warnings.warn(
            f"adjust_learning_rate={shown(dict(given or {}))} counts where it and the factors of "
            f"model.mup_base_hidden_size and mup_base_filter_size differ: {derived}",
            stacklevel=3,
        )
    return {**{k: v for k, v in derived.items() if k not in (given or {})}, **factors}


def _check_scaling(
    cls: type[Optimizer], values: Mapping[str, Any], schedulers: Sequence[ScheduleConfig]
) -> None:
    """Sees to it that somebody reads the factors of the learning rate."""
    if any(config.key == "lr" for config in schedulers):
        return
    rate = rate_key(cls)
    if rate not in inspect.signature(cls).parameters:
        warnings.warn(f"adjust_learning_rate is not used: {cls.__name__} has no lr", stacklevel=4)
    elif values.get(rate, 0.0) is None:
        raise ValueError(f"adjust_learning_rate needs a number lr of {cls.__name__}, got lr=None")


def _listed(params: Any) -> Sequence[Any]:
    return [params] if isinstance(params, Mapping) else params or ()


def _fp16_type(sections: Sections) -> Any:
    return sections.others.get("fp16_type", sections.model.get("fp16_type"))
