"""The class form of a pure optimizer: parameters, groups and state; it computes nothing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, ParamSpec, cast, overload

import jax

from cerebras_jax.checks import any_traced, is_traced
from cerebras_jax.donation import Donate
from cerebras_jax.engine.hyper import bind, needs_other_buffers, normalize
from cerebras_jax.engine.leaf import StateDtype
from cerebras_jax.engine.lift import check_buffers
from cerebras_jax.engine.trees import check_grads
from cerebras_jax.formats import pytorch as torch_format
from cerebras_jax.formats.state_dict import check_keys
from cerebras_jax.optim import clocks
from cerebras_jax.optim.makers import RuleMaker
from cerebras_jax.optim.numbers import as_argument
from cerebras_jax.optim.pair_state import PairOptimizer
from cerebras_jax.optim.program import Plan, Program, Wrapper, program_of, transformation
from cerebras_jax.optim.signatures import doc_of, signature_of
from cerebras_jax.signals import deferred_signals
from cerebras_jax.stateful import OUTSIDE

P = ParamSpec("P")


class ShellOptimizer(PairOptimizer, Generic[P]):
    """An optimizer that applies an optax pair; made by `Optimizer.of` or `optimizer_of`.

    Args:
      params: a pytree of arrays, an nnx.Module (updated in place), a list of dicts
        ``{"params": tree, **values}``, or what `optim.param_groups` returns.
      *args, **kwargs: the hyper-parameters of the pure function.
      enable_global_step: count the steps of every parameter in its state ``step``.
      state_dtype: a dtype for all states, or a dict from state names to dtypes.
      around: functions from optax pair to optax pair, outermost first, that wrap the update of all
        groups, such as ``lambda tx: optax.MultiSteps(tx, 4)``. They see the parameters as they
        were given, and zeros where a gradient is None; such a parameter stays as it is in that
        step, whatever they have collected for it.
      donate: whether a step gives the old buffers away: "auto", those that nobody else holds;
        True, all of them; False, none.
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
        around: Sequence[Wrapper] = ...,
        donate: Donate = ...,
        **kwargs: Any,
    ) -> None: ...
    def __init__(
        self,
        params: Any,
        *args: Any,
        enable_global_step: bool | None = None,
        state_dtype: StateDtype = None,
        around: Sequence[Wrapper] = (),
        donate: Donate = "auto",
        **kwargs: Any,
    ):
        arguments = normalize(bind(self.maker.factory, type(self).__name__, args, kwargs))
        self.maker.check(arguments)
        if callable(around) or not all(callable(wrap) for wrap in around):
            raise TypeError(f"around must be a list of functions from pair to pair, got {around!r}")
        self.around = tuple(around)
        self.state_dtype = state_dtype
        self._live_keys = self.maker.live(arguments)
        self._structure, self._same, self._groups = None, None, ()
        self._checked, self._keys = [], []
        counts = self.counts_steps if enable_global_step is None else enable_global_step
        super().__init__(params, arguments, enable_global_step=counts, donate=donate)

    def preinitialize(self) -> None:
        """Allocates every state; nothing is allocated in a step."""
        self._groups = tuple(tuple(group["params"]) for group in self.param_groups)
        self._checked = [self._hyper(group) for group in self.param_groups]
        self._same = tuple((0,) * len(group) for group in self._groups)
        values, statics = self._arguments()
        plan = self._plan(statics, (), (), None)
        tx = transformation(plan, values, [])
        state = tx.init(plan.params.unflatten(self._values()))
        self._state, self._structure = jax.tree.flatten(state)
        vars(self).pop("_cache", None)
        self._catalogue()

    # --- one step ----------------------------------------------------------------------------

    @overload
    def step(self, grads_or_closure: Callable[[Any], Any], *, has_aux: bool = False) -> Any: ...
    @overload
    def step(self, grads_or_closure: Any) -> Any: ...
    def step(self, grads_or_closure: Any = None, *, has_aux: bool = False) -> Any:
        """One optimization step.

        Args:
          grads_or_closure: gradients like `params` (a None leaf leaves that parameter, its
            states and its step count alone), or a function of the parameters that returns the
            loss, which is differentiated here.
          has_aux: the closure returns ``(loss, aux)``.

        Returns:
          What the closure returned, or None.

        Raises:
          ValueError: if the gradients do not fit the parameters, or a group's value is out of
            range; parameters and state are then untouched.
        """
        with self.lock:
            value, grads = self._gradients(grads_or_closure, has_aux)
            self._apply_gradients(grads)
        return value

    def _apply_gradients(self, grads: list[Any]) -> None:
        self._note_step()
        self._regroup()
        values, statics = self._arguments()
        absent = tuple(i for i, g in enumerate(grads) if g is None)
        bounds = self._bounds()
        program = self._program(statics, absent, tuple(bounds))
        params, was_traced = self._values(), self.is_traced()
        if not was_traced:
            if any_traced(grads):
                raise RuntimeError(OUTSIDE.format(name="the optimizer"))
            if jax.default_backend() == "cpu":
                # What failed must not take the parameters with it. Elsewhere the host runs ahead.
                jax.block_until_ready(grads)
        state, params = self._the_donor().ready(self._state, params, owners=(0, 1))
        with deferred_signals():
            try:
                state, params = program.run(state, params, grads, values, [*bounds.values()])
            except TypeError:  # what JAX says of a gradient that is no array
                check_grads(grads, params, lambda: self._names)
                raise
            if not was_traced and is_traced(next(iter(params), None)):
                raise RuntimeError(OUTSIDE.format(name="the optimizer"))
            self._state = state
            self._set_values(params)
        if absent:
            missed = {self._names[i] for i in absent}
            self._same = clocks.parted(self._same or (), self._members(), missed)

    def _arguments(self) -> tuple[list[list[Any]], tuple]:
        """Per group, the numbers of a step and what is static; edited values are checked."""
        values, statics = [], []
        for i, hyper in enumerate(self._checked_hyper()):
            mine, marks = self._split(i, hyper)
            values.append([as_argument(x) for x in mine])
            statics.append(marks)
        return values, tuple(statics)

    def _is_live(self, key: str, value: Any, live: set[str]) -> bool:
        is_static = key in self.defaults and key not in self._live_keys
        return not is_static and super()._is_live(key, value, live)

    def _program(self, statics: tuple, absent: tuple[int, ...], clips: tuple[str, ...]) -> Program:
        """The compiled step; the same object as long as nothing static changes."""
        if self._same is None:
            self._same = clocks.known(self._members(), self._catalogue().of, self._state)
        key = (statics, absent, clips, self._same, self.around)
        cache = vars(self).setdefault("_cache", {})
        found = cache.get("program")
        if found is None or found[0] != key or found[1].plan.state is not self._structure:
            plan = self._plan(statics, absent, clips, self._structure)
            found = cache["program"] = key, program_of(plan, self)
        return found[1]

    def _plan(
        self, statics: tuple, absent: tuple[int, ...], clips: tuple[str, ...], state: Any
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
            clips=clips,
            around=self.around,
            state_dtype=self.state_dtype,
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
            self._check_states(old, hyper)
        except (TypeError, ValueError) as error:
            raise type(error)(f"param_groups[{i}]: {error}") from None

    def _check_states(self, old: Mapping[str, Any], hyper: Mapping[str, Any]) -> None:
        """Refuses values that need states which do not exist."""
        if not isinstance(self.maker, RuleMaker) or not needs_other_buffers(old, hyper):
            return
        of = self._catalogue().of
        present = ((p, set(of[name])) for name, p in self.named_parameters() if of[name])
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
        self._check_states(self._hyper(ours), self._hyper(loaded))


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
