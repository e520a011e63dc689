"""The class form of a pure optimizer: parameters, groups and state; it computes nothing."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, ParamSpec, cast, overload

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from cerebras_jax import sharding
from cerebras_jax.checks import any_traced, is_traced
from cerebras_jax.donation import Donate
from cerebras_jax.engine.hyper import bind, needs_other_buffers, normalize
from cerebras_jax.engine.leaf import Rounding, StateDtype
from cerebras_jax.engine.lift import check_buffers
from cerebras_jax.engine.placement import Placement, beside, check_parameters, check_together
from cerebras_jax.engine.state_memory import StateMemory
from cerebras_jax.engine.trees import check_grads
from cerebras_jax.formats import pytorch as torch_format
from cerebras_jax.formats.state_dict import check_keys
from cerebras_jax.optim import clocks
from cerebras_jax.optim.guarding import Guard, check_setting
from cerebras_jax.optim.makers import How, RuleMaker
from cerebras_jax.optim.numbers import as_argument
from cerebras_jax.optim.program import Inputs, Plan, Program, Wrapper, program_of, transformation
from cerebras_jax.optim.signatures import doc_of, signature_of
from cerebras_jax.optim.sources import ModuleSource, hold_back, is_closure
from cerebras_jax.optim.sparse_optimizer import SparseOptimizer
from cerebras_jax.optim.watched import SCALED
from cerebras_jax.signals import deferred_signals
from cerebras_jax.stateful import DROPPED, OUTSIDE, locked
from cerebras_jax.transforms.accumulate import Accumulation
from cerebras_jax.transforms.finite import check_loss
from cerebras_jax.transforms.loss_scale import GradScaler
from cerebras_jax.transforms.packed import below_which
from cerebras_jax.transforms.parts import is_spread

P = ParamSpec("P")


class ShellOptimizer(SparseOptimizer, Generic[P]):
    """An optimizer that applies an optax pair; made by `Optimizer.of` or `optimizer_of`.

    Args:
      params: a pytree of arrays, an nnx.Module (updated in place), a list of dicts
        ``{"params": tree, **values}``, or what `optim.param_groups` returns.
      *args, **kwargs: the hyper-parameters of the pure function.
      enable_global_step: count the steps of every parameter in its state ``step``.
      state_dtype: a dtype for all states, or a dict from state names to dtypes.
      rounding: how new bfloat16 parameters are rounded: "nearest", "stochastic", or "exact", which
        trains them as float32 ones; see `rule.per_parameter`.
      pack: keep the states of parameters with fewer than this many elements in one vector for each
        group and dtype, and update them in one kernel; True: fewer than 4096, False: none. For
        many small parameters; see `transforms.packed.packed`. States keep their names.
      around: functions from optax pair to optax pair, outermost first, that wrap the update of all
        groups, such as ``lambda tx: optax.MultiSteps(tx, 4)``. They see no step that is not
        taken, the parameters as they were given, and zeros where a gradient is None; such a
        parameter stays as it is in that step, whatever they have collected for it.
      donate: whether a step gives the old buffers away: "auto", those that nobody else holds;
        True, all of them; False, none.
      zero_axis: a mesh axis over which the parameters are replicated, such as ``"data"``: every
        state is split over it (ZeRO-1); see `sharding.state`. Parameters and states stay where
        they are in every step.
      state_memory: ``"pinned_host"`` keeps the states in the memory of the host, from where a step
        brings them to the device, and back; a dict, such as ``{"exp_avg": "pinned_host"}``, those
        that it names. See `sharding.state`.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "__init__" not in vars(cls) and "maker" in dir(cls):
            cls.__signature__ = signature_of(cls.maker, cls.counts_steps)  # pyright: ignore
            if cls.__doc__ is None or cls.__doc__ is ShellOptimizer.__doc__:
                cls.__doc__ = doc_of(cast(Any, cls).pure)

    @overload
    def __init__(self, params: Any, *args: P.args, **kwargs: P.kwargs) -> None: ...
    @overload
    def __init__(
        self,
        params: Any,
        *args: Any,
        enable_global_step: bool | None = ...,
        state_dtype: StateDtype = ...,
        rounding: Rounding = ...,
        pack: bool | int = ...,
        around: Sequence[Wrapper] = ...,
        donate: Donate = ...,
        zero_axis: str | None = ...,
        state_memory: StateMemory = ...,
        **kwargs: Any,
    ) -> None: ...
    def __init__(
        self,
        params: Any,
        *args: Any,
        enable_global_step: bool | None = None,
        state_dtype: StateDtype = None,
        rounding: Rounding = "nearest",
        pack: bool | int = False,
        around: Sequence[Wrapper] = (),
        donate: Donate = "auto",
        zero_axis: str | None = None,
        state_memory: StateMemory = None,
        **kwargs: Any,
    ):
        arguments = normalize(bind(self.maker.factory, type(self).__name__, args, kwargs))
        self.maker.check(arguments)
        if callable(around) or not all(callable(wrap) for wrap in around):
            raise TypeError(f"around must be a list of functions from pair to pair, got {around!r}")
        self.pack = below_which(pack)
        self.maker.check_how(How(state_dtype, rounding, self.pack), arguments)
        self.around = tuple(around)
        self.state_dtype = state_dtype
        self.rounding: Rounding = rounding
        self.zero_axis = zero_axis
        is_dict = isinstance(state_memory, Mapping)
        self.state_memory = dict(state_memory) if is_dict else state_memory
        self._live_keys = self.maker.live(arguments)
        self.skip_nonfinite, self.skip_spikes = False, None
        self.measure_gradients = self.measure_norms = False
        self._structure, self._same, self._groups = None, None, ()
        self._checked, self._keys = [], []
        counts = self.counts_steps if enable_global_step is None else enable_global_step
        super().__init__(params, arguments, enable_global_step=counts, donate=donate)

    def preinitialize(self) -> None:
        """Allocates every state; nothing is allocated in a step."""
        self._groups = tuple(tuple(group["params"]) for group in self.param_groups)
        self._checked = [self._hyper(group) for group in self.param_groups]
        self._same = tuple((0,) * len(group) for group in self._groups)
        check_parameters(lambda: self._names, self._values())
        home = self._home()
        values, statics = self._arguments(home)
        self._fitted = self._guard()
        plan = self._plan(statics, (), self._fitted, None)
        pairs = zip(plan.names, self._values(), strict=True)
        apart = tuple(name for name, p in pairs if self.pack and is_spread(p))
        plan = dataclasses.replace(plan, how=plan.how._replace(apart=apart))
        bounds = [getattr(self, name) for name in self._fitted.clips]
        params = plan.params.unflatten(beside(self._values(), home))
        if self.zero_axis is None and self.state_memory is None:
            state = transformation(plan, values, bounds).init(params)
        else:  # numbers of the host: the shardings are found out on another mesh
            tx = transformation(plan, *jax.device_get((values, bounds)))
            where: Any = {"zero_axis": self.zero_axis, "state_memory": self.state_memory}
            state = sharding.init(tx, params, **where)
        self._take_state(state)
        vars(self).pop("_cache", None)
        self._same = tuple((0,) * len(rows) for rows in self._members())

    # --- one step ----------------------------------------------------------------------------

    @overload
    def step(
        self,
        grads_or_closure: Callable[[Any], Any],
        *,
        has_aux: bool = False,
        scaler: GradScaler | None = None,
    ) -> Any: ...
    @overload
    def step(
        self, grads_or_closure: Any, *, loss: Any = None, scaler: GradScaler | None = None
    ) -> Any: ...
    def step(
        self,
        grads_or_closure: Any = None,
        *,
        has_aux: bool = False,
        loss: Any = None,
        scaler: GradScaler | None = None,
    ) -> Any:
        """One optimization step.

        Args:
          grads_or_closure: gradients like `params` (a None leaf leaves that parameter, its
            states and its step count alone), or a function of the parameters that returns the
            loss, which is differentiated here; also what `cerebras_jax.accumulate` returns.
          has_aux: the closure returns ``(loss, aux)``.
          loss: the loss that the gradients are of; with ``skip_nonfinite`` or ``skip_spikes`` it
            is judged too. That of a closure is known.
          scaler: scales the loss that is differentiated, unscales the gradients, and is updated;
            gradients that are given must be those of the scaled loss. A step whose gradients are
            not finite is not taken.

        A step that is not taken also brings back what the closure has written into a module
        besides the parameters: statistics, counts of random streams. With given gradients that
        was written before, and is the caller's.

        Returns:
          What the closure returned, or None.

        Raises:
          ValueError: if the gradients do not fit the parameters, or a group's value is out of
            range; parameters and state are then untouched.
        """
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise TypeError(f"scaler must be a GradScaler or None, got {scaler!r}")
        with locked([self, scaler]):
            scale = None if scaler is None else scaler.state.loss_scale
            before = self._before_closure(grads_or_closure, scaler)
            value, grads = self._gradients(grads_or_closure, has_aux, scale)
            if is_closure(grads_or_closure):
                if loss is not None:
                    raise TypeError("loss is for given gradients; a closure returns its own")
                if isinstance(grads_or_closure, Accumulation):
                    has_aux = grads_or_closure.has_aux
                loss = value[0] if has_aux else value
            self._apply_gradients(grads, loss, scaler)
            if before:
                hold_back(before, self._seen()["took_step"])
        return value

    def _before_closure(self, given: Any, scaler: GradScaler | None) -> list[Any]:
        """What a closure may write into a module and a step not taken must bring back."""
        judges = scaler is not None or self._fitted.judges
        sources = self._sources if judges and is_closure(given) else []
        return [pair for s in sources if isinstance(s, ModuleSource) for pair in s.others()]

    def _apply_gradients(self, grads: list[Any], loss: Any, scaler: GradScaler | None) -> None:
        if loss is not None:
            check_loss(loss)
        self._note_step()
        self._regroup()
        if scaler is not None:
            self._take_scaler(scaler)
        home, placement = self._settle()
        guard, bounds = self._fitted, self._bounds(home)
        if scaler is not None:
            guard, bounds = self._guard_with(scaler, bounds, home)
        values, statics = self._arguments(home)
        absent = tuple(i for i, g in enumerate(grads) if g is None)
        params = self._values()
        program = self._program(statics, absent, guard, placement)
        inputs = Inputs(
            grads,
            values,
            list(bounds.values()),
            loss if guard.judges else None,
            None if scaler is None else scaler.state.loss_scale,
        )
        was_traced = self.is_traced()
        if not was_traced:
            if any_traced(grads):
                raise RuntimeError(OUTSIDE.format(name="the optimizer"))
            if jax.default_backend() == "cpu":
                # What failed must not take the parameters with it. Elsewhere the host runs ahead.
                jax.block_until_ready(grads)
        state, params = self._the_donor().ready(self._state, params, owners=(0, 1))
        with deferred_signals():
            try:
                state, params = program.run(state, params, inputs)
            except (TypeError, ValueError):  # what JAX says of a gradient that does not fit
                check_grads(grads, params, lambda: self._names)
                check_together(lambda: self._input_names(values), state, params, grads, *values)
                raise
            if not was_traced and is_traced(next(iter(params), None)):
                raise RuntimeError(OUTSIDE.format(name="the optimizer"))
            self._state = state
            self._set_values(params)
            if scaler is not None:
                norm = self._seen()["norm"]
                scaler.update(finite=norm < jnp.inf)
        if absent:
            missed = {self._names[i] for i in absent}
            self._same = clocks.parted(self._same or (), self._members(), missed)
        if was_traced:
            self.note_change(DROPPED.format(name=type(self).__name__))

    def _input_names(self, numbers: list[list[Any]]) -> list[str]:
        """Names of states, parameters, gradients and numbers, for messages."""
        grads = [f"the gradient of {name}" for name in self._names]
        values = [f"a value of param_groups[{i}]" for i, mine in enumerate(numbers) for _ in mine]
        return [*self._state_names(), *self._names, *grads, *values]

    def _take_scaler(self, scaler: GradScaler) -> None:
        """Allocates what the first step with a scaler needs."""
        if self.is_traced() and not is_traced(scaler.state.loss_scale):
            raise RuntimeError(OUTSIDE.format(name="a scaler"))
        if SCALED not in self._live:
            self._live.add(SCALED)
            self._fit_guard()

    def _guard_with(
        self, scaler: GradScaler, bounds: dict[str, Any], home: Sharding | None
    ) -> tuple[Guard, dict[str, Any]]:
        """The watch over a step with a scaler, and the bounds in force."""
        if scaler.max_gradient_norm is not None:
            check_setting("max_gradient_norm", scaler.max_gradient_norm)
            if "max_gradient_norm" in bounds:
                raise ValueError("max_gradient_norm is set on the optimizer and on the scaler")
            bound = as_argument(scaler.max_gradient_norm, home)
            bounds = {"max_gradient_norm": bound, **bounds}
        return dataclasses.replace(self._fitted, clips=tuple(bounds), skip_nonfinite=True), bounds

    def _arguments(self, home: Sharding | None) -> tuple[list[list[Any]], tuple]:
        """Per group, the numbers of a step and what is static; edited values are checked."""
        values, statics = [], []
        for i, hyper in enumerate(self._checked_hyper()):
            mine, marks = self._split(i, hyper)
            values.append([as_argument(x, home) for x in mine])
            statics.append(marks)
        return values, tuple(statics)

    def _is_live(self, i: int, key: str, value: Any) -> bool:
        is_static = key in self.defaults and key not in self._live_keys
        return not is_static and super()._is_live(i, key, value)

    def _program(
        self, statics: tuple, absent: tuple[int, ...], guard: Guard, placement: Placement
    ) -> Program:
        """The compiled step; the same object as long as nothing static changes."""
        if self._same is None:
            self._same = clocks.known(self._members(), self._catalogue().of, self._state)
        key = (statics, absent, guard, self._same, self.around, placement)
        cache = vars(self).setdefault("_cache", {})
        found = cache.get("program")
        if found is None or found[0] != key or found[1].plan.state is not self._structure:
            plan = self._plan(statics, absent, guard, self._structure, placement)
            found = cache["program"] = key, program_of(plan, self)
        return found[1]

    def _plan(
        self,
        statics: tuple,
        absent: tuple[int, ...],
        guard: Guard,
        state: Any,
        placement: Placement = None,
    ) -> Plan:
        path_of = self._paths()
        return Plan(
            maker=self.maker,
            statics=statics,
            groups=tuple(tuple(path_of[name] for name in members) for members in self._groups),
            same=self._same or (),
            names=tuple(path_of.values()),
            params=self._treedef(),
            state=state,
            absent=absent,
            masking=self._masking(),
            guard=guard,
            around=self.around,
            how=How(self.state_dtype, self.rounding, self.pack),
            placement=placement,
        )

    # --- hyper-parameters --------------------------------------------------------------------

    def _checked_hyper(self) -> list[dict[str, Any]]:
        """The groups' values; those edited since the last step are checked again."""
        result = []
        for i, group in enumerate(self.param_groups):
            if self._keys[i : i + 1] != [tuple(group)]:
                check_keys(group, self.defaults)
                torch_format.check_flags(self._dialect(), group, self.defaults)
                self._keys[i : i + 1] = [tuple(group)]
            try:
                hyper, old = self._hyper(group), self._checked[i]
            except KeyError as error:
                raise ValueError(f"param_groups[{i}] lacks the value {error}") from None
            if not all(_is_same(hyper[k], old[k]) for k in hyper):
                self._check_edited(i, old, hyper)
                self._checked[i] = hyper
            result.append(hyper)
        return result

    def _check_edited(self, i: int, old: Mapping[str, Any], hyper: Mapping[str, Any]) -> None:
        known = {k: old[k] if _is_pending(v) else v for k, v in hyper.items()}
        try:
            self.maker.check(known)
            self._check_states(self.param_groups[i]["params"], old, hyper)
        except (TypeError, ValueError) as error:
            raise type(error)(f"param_groups[{i}]: {error}") from None

    def _check_states(
        self, members: Sequence[str], old: Mapping[str, Any], hyper: Mapping[str, Any]
    ) -> None:
        """Refuses values that need states which a group's members do not have."""
        if not isinstance(self.maker, RuleMaker) or not needs_other_buffers(old, hyper):
            return
        of = self._catalogue().of
        mine = set(members)
        present = (
            (p, set(of[name])) for name, p in self.named_parameters() if name in mine and of[name]
        )
        check_buffers(self.maker.factory, old, hyper, present)

    def check(self) -> None:
        """Refuses values edited since the last step, if they are out of range."""
        super().check()
        self._regroup()
        self._checked_hyper()

    def _check_group(self, group: Mapping[str, Any]) -> None:
        self.maker.check(self._hyper(group))
        torch_format.check_flags(self._dialect(), group, self.defaults)

    def _check_loaded_group(self, ours: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
        self._check_group(loaded)
        self._check_states(ours["params"], self._hyper(ours), self._hyper(loaded))


# --- helpers -------------------------------------------------------------------------------------


def _is_pending(value: Any) -> bool:
    """Whether a value could only be read by waiting for the device."""
    values = value if isinstance(value, tuple) else (value,)
    return any(
        is_traced(x) or (isinstance(x, jax.Array) and not cast(Any, x).is_ready()) for x in values
    )


def _is_same(value: Any, old: Any) -> bool:
    """Whether a value was left alone; a traced step puts unchanged numbers into new tuples."""
    if isinstance(value, tuple) and isinstance(old, tuple) and len(value) == len(old):
        return all(a is b for a, b in zip(value, old, strict=True))
    return value is old
