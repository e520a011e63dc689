"""The base class of the stateful optimizers: a step, the state, and their dictionaries."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, ParamSpec

import jax.numpy as jnp
from jax.sharding import Sharding

from cerebras_jax.engine.hyper import normalize, saturating_increment
from cerebras_jax.engine.lift import PureOptimizer
from cerebras_jax.engine.memory import on_device
from cerebras_jax.formats.state_dict import (
    check_keys,
    check_rule,
    load_array,
    match_parameters,
    plain_value,
    to_state_dict,
    warn_of_order,
    with_functions,
    with_names,
)
from cerebras_jax.messages import shown
from cerebras_jax.optim import display
from cerebras_jax.optim.entries import NamedState
from cerebras_jax.optim.guarding import BOUNDS
from cerebras_jax.optim.numbers import as_argument
from cerebras_jax.optim.owner import Owner
from cerebras_jax.optim.sources import is_closure, value_and_grad
from cerebras_jax.processes import check_equal_numbers
from cerebras_jax.stateful import Fill, Memento, freeze
from cerebras_jax.transforms import clipping
from cerebras_jax.types import Array

P = ParamSpec("P")


class Optimizer(Owner, ABC):
    """Base class of all optimizers: parameters, groups and state.

    A ready-made optimizer is used like this:

    >>> from cerebras_jax import optim
    >>> opt = optim.SGD({"w": jnp.array([1.0, 2.0])}, lr=0.5)
    >>> opt.step({"w": jnp.array([1.0, 1.0])})
    >>> opt.params
    {'w': Array([0.5, 1.5], dtype=float32)}

    An algorithm of one's own is best written as a one-parameter rule (`cerebras_jax.rule`) and
    turned into a class with ``class Mine(Optimizer.of(mine))``. A subclass of this class
    instead writes `preinitialize`, `step` and `state_names_to_sparsify` itself, with
    `named_parameters`, `set_parameter`, `gradients` and ``self.state``:

    >>> class SignDescent(optim.Optimizer):
    ...     def __init__(self, params, lr=0.1):
    ...         super().__init__(params, {"lr": lr})
    ...     def preinitialize(self):
    ...         for name, p in self.named_parameters():
    ...             self.state[name] = {"last": jnp.zeros_like(p)}
    ...     def state_names_to_sparsify(self):
    ...         return ["last"]
    ...     def step(self, grads_or_closure):
    ...         loss, grads = self.gradients(grads_or_closure)
    ...         params = dict(self.named_parameters())
    ...         for group in self.param_groups:
    ...             for name in group["params"]:
    ...                 self.set_parameter(name, params[name] - group["lr"] * jnp.sign(grads[name]))
    ...                 self.state[name]["last"] = grads[name]
    ...         return loss
    >>> opt = SignDescent({"w": jnp.array([1.0, -2.0])})
    >>> opt.step({"w": jnp.array([3.0, -4.0])})
    >>> opt.params["w"]
    Array([ 0.9, -1.9], dtype=float32)

    Attributes:
      param_groups: a list of dicts; ``"params"`` holds the dotted names of the group's
        parameters, every other key a value that takes effect at the next step.
      defaults: the values of groups that do not set their own.
      state: per parameter name, the states by name.
      max_gradient_norm: clip the gradients to this global norm before a step; None: do not.
      max_gradient_value: clip every gradient element to this before a step; None: do not.

    Args:
      params: a pytree of arrays, an nnx.Module (updated in place), a list of dicts
        ``{"params": tree, **values}``, or what `optim.param_groups` or `optim.select` returns.
      defaults: names and values of the hyper-parameters.
      enable_global_step: count the steps of every parameter in its state ``step``.
    """

    class_of: ClassVar[Callable[..., type[Any]]]  # set by the module of the class form

    def __init__(
        self,
        params: Any,
        defaults: Mapping[str, Any] | None = None,
        *,
        enable_global_step: bool = False,
        donate: Any = "auto",
    ):
        super().__init__(params, defaults, donate)
        self.enable_global_step = bool(enable_global_step)
        self._state: Any = {}
        self._allocate()
        check_equal_numbers(self.param_groups, "param_groups")

    # --- one step ----------------------------------------------------------------------------

    @abstractmethod
    def preinitialize(self) -> None:
        """Allocates every state, before the first step."""

    @abstractmethod
    def step(self, grads_or_closure: Any) -> Any:
        """One optimization step; it creates no state."""

    @abstractmethod
    def state_names_to_sparsify(self) -> Iterable[str]:
        """Names of the states that a sparsity mask of the parameter applies to."""

    def gradients(
        self, grads_or_closure: Any, has_aux: bool = False
    ) -> tuple[Any, dict[str, Array | None]]:
        """Gradients by parameter name, from a tree of them or from a closure, clipped.

        Args:
          grads_or_closure: a tree like `params`, in which None means no gradient, or a
            function of the parameters that returns the loss.
          has_aux: the closure returns ``(loss, aux)``, and so does this.

        Returns:
          The closure's value (None for a tree), and the gradients by name, after
          ``max_gradient_norm`` and ``max_gradient_value``.
        """
        value, grads = self._gradients(grads_or_closure, has_aux)
        bounds = self._bounds(self._home())
        if bounds:
            limits = (bounds.get(f"max_gradient_{k}") for k in ("norm", "value"))
            grads = clipping.clipped(grads, *limits)
        return value, dict(zip(self._names, grads, strict=True))

    def check(self) -> None:
        """Refuses bounds of the gradients that are out of range."""
        clipping.check_bounds(self.max_gradient_norm, self.max_gradient_value)

    def _bounds(self, home: Sharding | None) -> dict[str, Any]:
        """The bounds of the gradients that are set, as arguments of a step."""
        Optimizer.check(self)
        given = {name: getattr(self, name) for name in BOUNDS}
        return {name: as_argument(x, home) for name, x in given.items() if x is not None}

    def _gradients(
        self, given: Any, has_aux: bool, loss_scale: Any = None
    ) -> tuple[Any, list[Any]]:
        if is_closure(given):
            return value_and_grad(
                given,
                self._sources,
                self._leaves(),
                has_aux,
                loss_scale,
                is_list=not self._is_one_tree(),
            )
        if given is None:
            raise TypeError("step needs the gradients, or a closure that returns the loss")
        return None, self._align(given)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Accepted for PyTorch's sake; gradients are arguments here, there is nothing to clear."""

    def note_schedule(self) -> None:
        """Says that a scheduler was stepped."""
        self._was_scheduled = True

    def _note_step(self) -> None:
        if self._was_scheduled and not self._was_stepped:
            warnings.warn(
                "a scheduler was stepped before the first step of its optimizer, so that the first "
                "value of the schedule is skipped; call optimizer.step(), then scheduler.step()",
                stacklevel=4,
            )
        self._was_stepped = True

    # --- state -------------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """Per parameter name, the states by name."""
        return self._state

    def _kept_state(self) -> Any:
        """The state in a form that stays when parameters are added."""
        return self._state

    def _allocate(self, kept: Any = None) -> None:
        """Makes the state anew; that of parameters which is in ``kept`` stays."""
        self._state = {}
        self.preinitialize()
        if self.enable_global_step:
            for name in self._names:
                self._state.setdefault(name, {})["step"] = jnp.zeros((), jnp.int32)
        self._state.update(kept or {})

    def visit_state(self, fn: Callable[[Array], Array | None]) -> None:
        """Applies ``fn`` to every state value; what it returns, unless None, replaces it.

        What is kept in the memory of the host is given on the device, and replaced there.
        """
        with self.lock:
            entries = self._entries()
            for entry in entries.values():
                for key, value in entry.items():
                    new = fn(on_device(value))
                    if new is not None:
                        entry[key] = new
            self._set_entries(entries)

    def increment_global_step(self, name: str) -> Array:
        """Adds 1 to a parameter's step count, and returns the count as float32.

        Raises:
          RuntimeError: if the optimizer was made without ``enable_global_step``.
        """
        if not self.enable_global_step:
            raise RuntimeError(
                f"{type(self).__name__} does not count steps; make it with enable_global_step=True"
            )
        self._place(name)
        with self.lock:
            return jnp.asarray(self._increment(name), jnp.float32)

    def _increment(self, name: str) -> Array:
        entry = self._state[name]
        entry["step"] = saturating_increment(jnp.asarray(entry["step"]))
        return entry["step"]

    def _entries(self) -> dict[str, dict[str, Any]]:
        """Per parameter name, the states by name: all that continuing needs."""
        return {name: dict(self._state.get(name, {})) for name in self._names}

    def _full_entries(self) -> dict[str, dict[str, Any]]:
        """Like `_entries`, with what a state dict may hold beyond them."""
        return self._entries()

    def _set_entries(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        self._state = {n: dict(e) for n, e in entries.items()}

    def named_state(self) -> NamedState:
        """All that continuing needs beside parameters and groups, by name; for `take_over`."""
        with self.lock:
            found: list[Any] = []
            freeze(self._rest(), found, [])
            shared = {f"attributes.{i}": x for i, x in enumerate(found)}
            return NamedState(self._entries(), {}, shared)

    def take_over(
        self,
        params: Mapping[str, Array],
        state: NamedState,
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        """Replaces parameters, state and the groups' values; all or, on an error, nothing.

        Args:
          params: values by parameter name.
          state: as `named_state` returned it.
          groups: values of every group, without its parameters.

        Raises:
          ValueError: if a value is out of range, or needs a state that there is not.
        """
        with self.lock:
            loaded = [
                {**values, "params": list(mine["params"])}
                for mine, values in zip(self.param_groups, groups, strict=True)
            ]
            for mine, group in zip(self.param_groups, loaded, strict=True):
                check_keys(group, self.defaults)
                self._check_loaded_group(mine, group)
            self._check_named_state(state)
            for name, value in params.items():
                self.set_parameter(name, value)
            for mine, group in zip(self.param_groups, loaded, strict=True):
                mine.clear()
                mine.update(group)
            self._set_named_state(state)
            self._was_stepped = True

    def _check_named_state(self, state: NamedState) -> None:
        """Hook: refuses a state that does not fit."""

    def _set_named_state(self, state: NamedState) -> None:
        self._set_entries(state.states)
        self._refill(Fill(iter(state.shared.values()), None))

    @property
    def rule_name(self) -> str:
        """The name of the algorithm, which its states belong to: subclasses of a class share it."""
        return getattr(getattr(self, "pure", None), "__name__", type(self).__name__)

    # --- state_dict --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State and groups in torch's layout.

        Returns:
          a dict like ``{"state": {0: {"exp_avg": ...}, ...}, "param_groups": [{"lr": ...,
          "params": [0, ...], "param_names": ["dense.bias", ...]}, ...]}``; parameters are
          numbered in the order of the groups. A function among the group values, such as a
          schedule, is stored by its repr; on loading, one's own is kept. The bounds of the
          gradients that are set stand beside the groups, and so does the name of the algorithm,
          as ``"optimizer"``.
        """
        with self.lock:
            given = {name: getattr(self, name) for name in BOUNDS}
            bounds = {name: plain_value(x) for name, x in given.items() if x is not None}
            layout = to_state_dict(self.param_groups, self._entries())
            return {**layout, "optimizer": self.rule_name, **bounds}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], param_names: Iterable[str] | None = None
    ) -> None:
        """Takes over state and group values; all or, on an error, nothing.

        Parameters are matched by name where the dict has ``param_names`` that are all ours,
        else by position, with a warning where that leaves a choice. Arrays may be JAX, NumPy or
        torch tensors; they are copied, in the dtype of the state that they replace. A key that a
        group lacks takes the optimizer's default; bounds of the gradients that the dict lacks stay.

        A dict that says which algorithm wrote it, as ours do under ``"optimizer"``, is refused by
        others, also by those whose states have the same names: to AdamW, the decay of Adam means
        something else. One without that entry, such as torch's, is taken if its states fit.

        Args:
          state_dict: what `state_dict` returned, here or in torch.
          param_names: our names in the order in which the dict has its parameters, group after
            group, such as ``[name for name, _ in model.named_parameters()]`` in torch.

        Raises:
          ValueError: says who wrote it, or names what is missing, unexpected, of another shape,
            or out of range.
        """
        if param_names is not None:
            param_names = list(param_names)
            if sorted(param_names) != sorted(self._names):
                given = shown(param_names)
                raise ValueError(f"param_names must be {shown(list(self._names))}, got {given}")
        with self.lock:
            match = match_parameters(with_names(state_dict, param_names), self.param_groups)
            check_rule(state_dict, self.rule_name)
            ours, groups = self._full_entries(), []
            for mine, loaded in zip(self.param_groups, match.groups, strict=True):
                group = normalize({**self.defaults, **self._import_group(loaded, mine)})
                group["params"] = list(mine["params"])
                check_keys(group, self.defaults)
                self._check_loaded_group(mine, group)
                groups.append(group)
            check_equal_numbers(groups, "the param_groups of the state dict")
            entries = dict(ours)
            if match.has_state:
                loaded = {
                    name: self._import_state(match.entries.get(name), group, ours[name])
                    for group in groups
                    for name in group["params"]
                }
                for name, entry in self._complete(loaded, ours).items():
                    entries[name] = load_array(name, entry, ours[name])
                warn_of_order(match.by_order, ours)
            bounds = [state_dict.get(name, getattr(self, name)) for name in BOUNDS]
            clipping.check_bounds(*bounds)
            before = Memento(self)
            try:
                # First the bounds: what was measured for them has a place then.
                self.max_gradient_norm, self.max_gradient_value = bounds
                self._load_shared(state_dict)
            except BaseException:
                before.undo()
                raise
            for mine, group in zip(self.param_groups, groups, strict=True):
                mine.clear()
                mine.update(group)
            self._set_entries(entries)
            self._was_stepped = True

    def _check_loaded_group(self, ours: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
        self._check_group(loaded)

    def _import_group(self, group: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
        values = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        return {k: with_functions(v, ours.get(k)) for k, v in values.items()}

    def _import_state(self, entry: Any, group: Mapping[str, Any], ours: Mapping[str, Any]) -> Any:
        return entry

    def _complete(
        self, loaded: dict[str, Any], ours: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Hook: the loaded states by parameter name, with those that others leave out."""
        return loaded

    def _load_shared(self, state_dict: Mapping[str, Any]) -> None:
        """Hook: takes over what belongs to no parameter."""

    @classmethod
    def of(cls, pure: PureOptimizer[P], enable_global_step: bool = False) -> "type[Any]":
        """The base class of the optimizer that applies a pure one, with its signature.

        Args:
          pure: what `per_parameter` returned, e.g. ``optim.adamw``; for other optax factories see
            `optimizer_of`.
          enable_global_step: the class's default for that argument; True for an algorithm
            whose formula uses the number of the step.
        """
        return cls.class_of(cls, pure, enable_global_step)

    # --- display -----------------------------------------------------------------------------

    def __repr__(self) -> str:
        return display.as_text(self)

    def _repr_html_(self) -> str:
        return display.as_html(self, self._state)
