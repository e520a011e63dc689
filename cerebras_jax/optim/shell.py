"""The class form of a pure optimizer: parameters, groups and state; it computes nothing."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Generic, ParamSpec, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cerebras_jax.checks import any_traced, is_number, is_traced
from cerebras_jax.donation import Donate
from cerebras_jax.engine.hyper import bind, needs_other_buffers, normalize, saturating_increment
from cerebras_jax.engine.leaf import StateDtype
from cerebras_jax.engine.lift import PureOptimizer, check_buffers
from cerebras_jax.engine.trees import check_grads
from cerebras_jax.formats import torch as torch_format
from cerebras_jax.formats.state_dict import check_keys, load_shared
from cerebras_jax.optim import entries, numbers
from cerebras_jax.optim.entries import Catalogue
from cerebras_jax.optim.makers import ForeignMaker, Maker, RuleMaker
from cerebras_jax.optim.numbers import as_argument
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.optim.program import Plan, Program, Wrapper, program_of, transformation
from cerebras_jax.signals import deferred_signals
from cerebras_jax.stateful import OUTSIDE, Slot
from cerebras_jax.types import Array

P = ParamSpec("P")


class StateView(Mapping[str, Mapping[str, Any]]):
    """Per parameter name, the states by name: as they are now, also after further steps."""

    def __init__(self, leaves: Sequence[Array], catalogue: Catalogue, shown: Mapping[str, Any]):
        self._leaves, self._catalogue, self._shown = tuple(leaves), catalogue, shown
        self._host: dict[int, Any] = {}

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        places = self._catalogue.of[name]
        hidden = self._shown.get(name, ())
        mine = {key: place for key, place in places.items() if key not in hidden}
        return MappingProxyType(entries.read(self._leaves, mine, self._host))

    def __iter__(self) -> Iterator[str]:
        return iter(self._catalogue.of)

    def __len__(self) -> int:
        return len(self._catalogue.of)

    def __repr__(self) -> str:
        return repr({name: dict(entry) for name, entry in self.items()})


class ShellOptimizer(Optimizer, Generic[P]):
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

    maker: ClassVar[Maker]
    counts_steps: ClassVar[bool] = False
    states_to_sparsify: ClassVar[tuple[str, ...]] = ()
    transient = (*Optimizer.transient, "_cache")
    special = Optimizer.special | {
        "_state",
        "_structure",
        "_groups",
        "_same",
        "_checked",
        "_keys",
    }
    special |= {"defaults"}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "__init__" not in vars(cls) and "maker" in dir(cls):
            cls.__signature__ = _shell_signature(cls)  # pyright: ignore
            if cls.__doc__ is None or cls.__doc__ is ShellOptimizer.__doc__:
                cls.__doc__ = _shell_doc(cls)

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
        self._structure: Any = None  # of the state
        self._same: tuple[tuple[int, ...], ...] | None = None  # per group; None: not known
        self._groups: tuple[tuple[str, ...], ...] = ()  # the members that the state was made for
        self._checked: list[dict[str, Any]] = []
        self._keys: list[tuple[str, ...]] = []
        counts = self.counts_steps if enable_global_step is None else enable_global_step
        super().__init__(params, arguments, enable_global_step=counts, donate=donate)

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
            self._part(set(absent))

    def _arguments(self) -> tuple[list[list[Any]], tuple]:
        """Per group, the numbers of a step and what is static; edited values are checked."""
        values, statics = [], []
        for i, hyper in enumerate(self._checked_hyper()):
            live = {key for j, key in self._live if j == i}
            mine, marks = numbers.split(
                hyper, lambda key, v, live=live: self._is_live(key, v, live)
            )
            self._remember_live(i, marks)
            values.append([as_argument(x) for x in mine])
            statics.append(marks)
        return values, tuple(statics)

    def _is_live(self, key: str, value: Any, live: set[str]) -> bool:
        return key in self._live_keys and numbers.is_live(key, value, live)

    def _program(self, statics: tuple, absent: tuple[int, ...], clips: tuple[str, ...]) -> Program:
        """The compiled step; the same object as long as nothing static changes."""
        if self._same is None:
            self._same = self._known_clocks()
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

    def _treedef(self) -> Any:
        """The structure in which wrappers see the parameters."""
        defs = [source.treedef for source in self._sources]
        if self._is_one_tree():
            return defs[0]
        return jax.tree_util.treedef_tuple(defs)

    def _paths(self) -> dict[str, str]:
        """From the name of each parameter to its dotted path in the tree that wrappers see."""
        if self._is_one_tree():
            return {name: name for name in self._names}
        names, result = iter(self._names), {}
        for i, source in enumerate(self._sources):
            result |= {next(names): f"{i}.{path}" if path else f"{i}" for path in source.names}
        return result

    # --- clocks ------------------------------------------------------------------------------

    def _part(self, absent: set[int]) -> None:
        """Parameters that missed a step have clocks of their own."""
        missed = {self._names[i] for i in absent}
        self._same = tuple(
            _first_of(zip(same, [n in missed for n in members], strict=True))
            for members, same in zip(self._members(), self._same or (), strict=True)
        )

    def _members(self) -> tuple[tuple[str, ...], ...]:
        """Per group, the parameters in the order of the leaves, which is that of clocks."""
        order = {name: i for i, name in enumerate(self._names)}
        return tuple(tuple(sorted(group, key=order.__getitem__)) for group in self._groups)

    def _known_clocks(self) -> tuple[tuple[int, ...], ...]:
        """Which parameters have clocks of equal values; none, where the values are not known."""
        result, host = [], {}
        for members in self._members():
            keys = []
            for name in members:
                places = self._catalogue().of[name]
                scalars = {k: p for k, p in places.items() if p.row is not None}
                if any(is_traced(self._state[p.leaf]) for p in scalars.values()):
                    keys.append(name)
                else:
                    found = entries.read(self._state, scalars, host)
                    keys.append(tuple(np.asarray(x).item() for x in found.values()))
            result.append(_first_of(keys))
        return tuple(result)

    # --- hyper-parameters --------------------------------------------------------------------

    def _hyper(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return normalize({name: group[name] for name in self.defaults})

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

    # --- state -------------------------------------------------------------------------------

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

    def _kept_state(self) -> Any:
        return self._full_entries(), self._shared(), self._checked

    def _allocate(self, kept: Any = None) -> None:
        self._state = []
        self.preinitialize()
        if kept is not None:
            entries, shared, checked = kept
            self._checked[: len(checked)] = checked
            self._set_entries(entries)
            self._set_shared({k: v for k, v in shared.items() if k in self._catalogue().shared})

    def _regroup(self) -> None:
        """Moves the states when names were moved between groups, or within one."""
        if all(
            tuple(group["params"]) == members
            for group, members in zip(self.param_groups, self._groups, strict=False)
        ) and len(self.param_groups) == len(self._groups):
            return
        names = self._grouped_names()
        if sorted(names) != sorted(self._names):
            missing, extra = set(self._names) - set(names), set(names) - set(self._names)
            twice = {n for n in names if names.count(n) > 1}
            raise ValueError(
                "param_groups must hold every parameter once; "
                f"missing: {sorted(missing)[:5]}, unknown: {sorted(extra)[:5]}, "
                f"twice: {sorted(twice)[:5]}"
            )
        self._allocate(self._kept_state())

    def _catalogue(self) -> Catalogue:
        cache = vars(self).setdefault("_cache", {})
        if "catalogue" not in cache:
            hyper = [self._hyper(group) for group in self.param_groups]
            shapes = self._structure.unflatten([_shape_of(x) for x in self._state])
            cache["catalogue"] = entries.catalogue(
                shapes,
                self._treedef(),
                {path: name for name, path in self._paths().items()},
                lambda g, own, names: self.maker.owners(hyper[g], own, names),
            )
        return cache["catalogue"]

    def state_names_to_sparsify(self) -> list[str]:
        """Names of the states that a sparsity mask of the parameter applies to."""
        return list(self.states_to_sparsify)

    @property
    def state(self) -> Mapping[str, Mapping[str, Any]]:
        """A read-only view: per parameter name, the states by name. See `visit_state`."""
        with self.lock:
            self._regroup()
            return StateView(self._state, self._catalogue(), self._hidden())

    def _hidden(self) -> dict[str, tuple[str, ...]]:
        """States that are not needed to continue: a step count that no formula reads."""
        if not isinstance(self.maker, RuleMaker):
            return {}
        return {
            name: ("step",)
            for group in self.param_groups
            if not self._stores_step(group)
            for name in group["params"]
        }

    def _stores_step(self, group: Mapping[str, Any]) -> bool:
        """Whether the step count is needed to continue: by the formula, or by a schedule."""
        if self.enable_global_step or self.counts_steps:
            return True
        return any(callable(x) for x in jax.tree.leaves(self._hyper(group), is_leaf=callable))

    def _entries(self) -> dict[str, dict[str, Any]]:
        return {name: dict(entry) for name, entry in self.state.items()}

    def _full_entries(self) -> dict[str, dict[str, Any]]:
        host: dict[int, Any] = {}
        of = self._catalogue().of
        return {name: entries.read(self._state, places, host) for name, places in of.items()}

    def _set_entries(self, given: Mapping[str, Mapping[str, Any]]) -> None:
        self._state = entries.write(self._state, self._catalogue(), given)
        self._same = None

    def _shared(self) -> dict[str, Any]:
        """What belongs to no parameter: the states of wrappers, by path."""
        return entries.read(self._state, self._catalogue().shared, {})

    def _set_shared(self, values: Mapping[str, Any]) -> None:
        for path, value in values.items():
            self._state[self._catalogue().shared[path].leaf] = value

    def _increment(self, name: str) -> Array:
        place = self._catalogue().of[name].get("step")
        if place is None or place.row is None:
            raise RuntimeError(f"{type(self).__name__} does not count steps of its own")
        count = self._state[place.leaf]
        new = saturating_increment(count[place.row])
        self._state[place.leaf] = count.at[place.row].set(new)
        self._same = None
        return new

    # --- state dicts -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See `Optimizer.state_dict`; the states of wrappers are under ``"around"``, by path."""
        with self.lock:
            result = super().state_dict()
            shared = self._shared()
            return {**result, "around": shared} if shared else result

    def _load_shared(self, state_dict: Mapping[str, Any]) -> None:
        self._set_shared(load_shared(state_dict.get("around"), self._shared()))

    def _import_group(self, group: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
        return torch_format.import_group(self._dialect(), group, self.defaults, ours)

    def _import_state(self, entry: Any, group: Mapping[str, Any], ours: Mapping[str, Any]) -> Any:
        if entry is None:
            return None
        entry = torch_format.import_state(self._dialect(), entry, group)
        if not self._stores_step(group) and "step" in ours:
            entry.setdefault("step", ours["step"])
        return entry

    def _dialect(self) -> torch_format.Dialect:
        return torch_format.dialect_of(self.maker.factory)

    def torch_state_dict(self, param_names: Sequence[str] | None = None) -> dict[str, Any]:
        """The state dict for torch.optim's optimizer of the same name, with torch tensors.

        ``torch_optimizer.load_state_dict(opt.torch_state_dict(names))`` continues the run there,
        if its parameters hold the same values.

        Args:
          param_names: our names in the order in which torch has its parameters, group after
            group; torch assigns states by position. By default our own order, which for dicts
            is sorted.

        Raises:
          ImportError: if torch is not installed.
          ValueError: if ``param_names`` are not the names of all parameters, group after group,
            or a group's value is a schedule, which torch has not.
        """
        with self.lock:
            names = self._grouped_names() if param_names is None else list(param_names)
            return torch_format.to_torch_state_dict(
                self._dialect(), self.param_groups, self._full_entries(), names
            )

    # --- the parts that change, for jit and trace ------------------------------------------------

    def hints(self) -> Any:
        """See `Stateful`: which parameters are known to have equal clocks."""
        return self._same

    def take_hints(self, hints: Any) -> None:
        """See `Stateful`."""
        self._same, self._was_stepped = hints, True

    def restore(self, arrays: list[Any], numbers: list[Any], refs: list[Any] | None = None) -> None:
        """See `Stateful`."""
        super().restore(arrays, numbers, refs)
        self._checked = [self._hyper(group) for group in self.param_groups]

    def skeleton(self) -> Any:
        """See `Stateful`."""
        twin = super().skeleton()
        twin._same = None
        return twin

    def _array_lists(self) -> list[list[Any]]:
        return [*self._trees, self._state]

    def _state_names(self) -> list[str]:
        names = [""] * len(self._state)
        catalogue = self._catalogue()
        for name, places in catalogue.of.items():
            for key, place in places.items():
                names[place.leaf] = f"{name}.{key}" if place.row is None else key
        for path, place in catalogue.shared.items():
            names[place.leaf] = path
        return names

    def _hashables(self) -> tuple[Any, ...]:
        _, defaults = numbers.split(self.defaults, _is_any_number)
        return (self._names, self._structure, self._groups, defaults)

    def constants(self) -> list[Any]:
        """See `Stateful`: the defaults, which only new groups take."""
        return numbers.split(self.defaults, _is_any_number)[0]

    def set_constants(self, constants: list[Any]) -> None:
        """See `Stateful`."""
        self.defaults = numbers.join(constants, numbers.split(self.defaults, _is_any_number)[1])

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_state"] = self._structure.unflatten(self._state)
        del state["_structure"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        leaves, structure = jax.tree.flatten(state["_state"])
        super().__setstate__({**state, "_state": leaves, "_structure": structure})


def optimizer_of(
    factory: Callable[..., optax.GradientTransformation],
) -> "type[ShellOptimizer[...]]":
    """The class form of any optax factory: parameter groups, live numbers, state dicts, `trace`.

    The hyper-parameters keep the factory's names. Its numbers are values of the parameter groups
    that take effect at the next step without recompiling, unless the factory needs them as
    Python numbers; schedulers write to ``lr`` or ``learning_rate``, whichever there is.

    Args:
      factory: hyper-parameters -> optax pair, such as ``optax.nadamw`` or one of your own.

    Returns:
      A subclass of `Optimizer`, which takes the parameters and then the factory's arguments.

    Raises:
      TypeError: when an optimizer is made, if its update needs more than gradients, state and
        parameters, such as ``value`` or ``value_fn``.

    >>> opt = optimizer_of(optax.nadamw)({"w": jnp.array([1.0])}, learning_rate=0.1)
    >>> opt.step({"w": jnp.array([1.0])})
    >>> opt.param_groups[0]["learning_rate"] = 0.01
    >>> opt.step({"w": jnp.array([1.0])})
    """
    if not callable(factory):
        raise TypeError(
            f"optimizer_of takes a function that returns an optax pair, got {factory!r}"
        )
    if hasattr(factory, "rule"):
        return shell_of(ShellOptimizer, cast(Any, factory))
    name = getattr(factory, "__name__", "optimizer")
    attributes = {
        "maker": ForeignMaker(factory),
        "pure": staticmethod(factory),
        "__doc__": f"`{name}` as a class that owns its parameters; see `optimizer_of`.\n\n"
        f"{inspect.getdoc(factory) or ''}",
    }
    return cast(Any, type(name, (ShellOptimizer,), attributes))


def shell_of(
    base: type[Optimizer], pure: PureOptimizer[P], enable_global_step: bool = False
) -> "type[ShellOptimizer[P]]":
    """The base class of the optimizer that applies a pure one; see `Optimizer.of`."""
    base = base if issubclass(base, ShellOptimizer) else ShellOptimizer
    attributes = {
        "pure": staticmethod(pure),
        "maker": RuleMaker(pure.rule),
        "counts_steps": enable_global_step,
    }
    return cast(Any, type(f"{base.__name__}Of{pure.__name__}", (base,), attributes))


Optimizer.class_of = staticmethod(shell_of)


# --- helpers -------------------------------------------------------------------------------------


def _first_of(keys: Any) -> tuple[int, ...]:
    """For each key, the position of the first that is equal to it."""
    first: dict[Any, int] = {}
    return tuple(first.setdefault(key, i) for i, key in enumerate(keys))


def _is_any_number(key: str, value: Any) -> bool:
    return is_number(value) or isinstance(value, Slot)


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """The shape of a leaf; a map over an optimizer may have put anything in its place."""
    return jax.ShapeDtypeStruct(getattr(x, "shape", ()), getattr(x, "dtype", jnp.float32))


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


_KEYWORDS = {
    "enable_global_step": False,
    "state_dtype": None,
    "around": (),
    "donate": "auto",
}


def _shell_signature(cls: type[ShellOptimizer]) -> inspect.Signature:
    kinds = inspect.Parameter
    defaults = {**_KEYWORDS, "enable_global_step": cls.counts_steps}
    if isinstance(cls.maker, ForeignMaker):
        del defaults["enable_global_step"], defaults["state_dtype"]
    factory = [
        p for p in cls.maker.signature().parameters.values() if p.kind is not kinds.VAR_KEYWORD
    ]
    own = [
        kinds("params", kinds.POSITIONAL_OR_KEYWORD),
        *factory,
        *(kinds(k, kinds.KEYWORD_ONLY, default=v) for k, v in defaults.items()),
    ]
    return inspect.Signature(own)


def _shell_doc(cls: type[ShellOptimizer]) -> str:
    pure = cast(Any, cls).pure
    name = pure.__name__
    doc = (inspect.getdoc(pure) or name).split("\n\n>>>")[0]
    return f"The optimizer `{name}` as a class that owns its parameters; see `Optimizer`.\n\n{doc}"
