"""The stateful shell: it holds parameters, state and groups, and computes nothing itself."""

import functools
import html
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Generic, ParamSpec, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cerebras_jax.checks import check, is_traced
from cerebras_jax.interrupts import deferred_interrupts
from cerebras_jax.optim.param_groups import ParamGroups, is_group_list
from cerebras_jax.optim.sources import FROM_OUTSIDE, ModuleSource, Source, TreeSource, make_source
from cerebras_jax.optim.state_dict import (
    check_group,
    check_keys,
    load_array,
    match_parameters,
    plain_value,
    to_torch,
)
from cerebras_jax.optim.step import Clipping, Plan, StepState, as_argument, take_step
from cerebras_jax.ownership import unshared
from cerebras_jax.rule import (
    Cohorts,
    GroupClock,
    PureOptimizer,
    StateDtype,
    bind,
    check_buffers,
    check_grads,
    combine,
    init_group,
    normalize,
    partition,
    saturating_increment,
)
from cerebras_jax.types import Array

P = ParamSpec("P")


class Optimizer(ABC):
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
        ``{"params": tree, **values}``, or what `optim.param_groups` returns.
      defaults: names and values of the hyper-parameters.
      enable_global_step: count the steps of every parameter in its state ``step``.
    """

    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_pytree_node(
            cls, lambda opt: _flatten(opt), lambda static, parts: _unflatten(cls, static, parts)
        )

    def __init__(
        self,
        params: Any,
        defaults: Mapping[str, Any] | None = None,
        *,
        enable_global_step: bool = False,
    ):
        self.defaults = normalize(dict(defaults or {}))
        self.enable_global_step = bool(enable_global_step)
        self.max_gradient_norm: float | None = None
        self.max_gradient_value: float | None = None
        self.param_groups = []
        self._sources: list[Source] = []
        self._names: list[str] = []
        self._structured_as_list = False
        if isinstance(params, ParamGroups):
            self._add_source(params.source, list(params))
        elif is_group_list(params):
            self._structured_as_list = True
            for group in params:
                self._add_group(group)
        else:
            source = make_source(params)
            self._add_source(source, [{"params": list(source.names)}])
        self._state: dict[str, dict[str, Any]] = {}
        self._preinitialize()

    # --- parameters and groups ---------------------------------------------------------------

    @property
    def params(self) -> Any:
        """The current values, in the structure that was given; a module is the module itself.

        A step reuses the buffers of the old values, except of those that somebody still holds:
        they are copied first. So ``grad(opt.params)`` costs nothing, and a tree that is kept
        stays valid.
        """
        trees = [source.tree() for source in self._sources]
        return trees[0] if self._is_one_tree() else trees

    def _is_one_tree(self) -> bool:
        return len(self._sources) == 1 and not self._structured_as_list

    def named_parameters(self) -> list[tuple[str, Array]]:
        """Dotted names and current values of all parameters."""
        return list(zip(self._names, self._values(), strict=True))

    def set_parameter(self, name: str, value: Array) -> None:
        """Replaces one parameter's value."""
        index = self._index(name)
        values = self._values()
        values[index] = value
        self._set_values(values)

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Adds ``{"params": tree, **values}``; `params` then is a list with its tree last.

        Raises:
          ValueError: if a value is out of range, or an array is in another group already.
        """
        known = len(self._names)
        self._add_group(group)
        self._structured_as_list = self._structured_as_list or len(self._sources) > 1
        self._extend_state(known)

    def _add_group(self, group: Mapping[str, Any]) -> None:
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(f'a parameter group is a dict with the key "params", got {group!r}')
        source = make_source(group["params"])
        self._add_source(source, [{**group, "params": list(source.names)}])

    def _add_source(self, source: Source, groups: Sequence[dict[str, Any]]) -> None:
        known = {id(v) for v in self._values()}
        names = list(source.names)
        for name, value in zip(names, source.values, strict=True):
            if id(value) in known:
                raise ValueError(f"parameter {name!r} appears in more than one parameter group")
        new_groups = [normalize({**self.defaults, **group}) for group in groups]
        for group in new_groups:
            check_keys(group, self.defaults)
            group["params"] = list(group["params"])
            self._check_group(group)
        prefix = f"{len(self._sources)}." if set(names) & set(self._names) else ""
        for group in new_groups:
            group["params"] = [prefix + name for name in group["params"]]
        self._sources.append(source)
        self._names += [prefix + name for name in names]
        self.param_groups += new_groups

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Hook: refuses values out of range."""

    def _values(self) -> list[Array]:
        return [value for source in self._sources for value in source.values]

    def _set_values(self, values: Sequence[Array]) -> None:
        start = 0
        for source in self._sources:
            stop = start + len(source.names)
            source.values = list(values[start:stop])
            start = stop

    def _grouped_names(self) -> list[str]:
        """Names in the order of the groups, which is the order of a state dict."""
        return [name for group in self.param_groups for name in group["params"]]

    def _index(self, name: str) -> int:
        try:
            return self._names.index(name)
        except ValueError:
            raise KeyError(f"no parameter is called {name!r}") from None

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
        """Gradients by parameter name, from a tree of them or from a closure.

        Args:
          grads_or_closure: a tree like `params`, in which None means no gradient, or a
            function of the parameters that returns the loss.
          has_aux: the closure returns ``(loss, aux)``, and so does this.

        Returns:
          The closure's value (None for a tree), and the gradients by name.
        """
        value, grads = self._gradients(grads_or_closure, has_aux)
        return value, dict(zip(self._names, grads, strict=True))

    def _gradients(self, given: Any, has_aux: bool) -> tuple[Any, list[Any]]:
        value = None
        if _is_closure(given):
            _check_closure(given)
            if self._is_one_tree():
                value, given = self._sources[0].value_and_grad(given, has_aux)
            elif self.modules():
                raise TypeError("a closure over several parameter trees takes no modules")
            else:
                trees = [source.tree() for source in self._sources]
                value, given = jax.value_and_grad(given, has_aux=has_aux)(trees)
        elif given is None:
            raise TypeError("step needs the gradients, or a closure that returns the loss")
        return value, self._align(given)

    def _align(self, grads: Any) -> list[Any]:
        if self._is_one_tree():
            return self._sources[0].align(grads)
        if not isinstance(grads, list | tuple) or len(grads) != len(self._sources):
            raise ValueError(
                f"the gradients must be a list of {len(self._sources)} trees, like the parameters"
            )
        pairs = zip(self._sources, grads, strict=True)
        return [g for source, tree in pairs for g in source.align(tree)]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Accepted for PyTorch's sake; gradients are arguments here, there is nothing to clear."""

    # --- state -------------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """Per parameter name, the states by name."""
        return self._state

    def _preinitialize(self) -> None:
        self._state = {}
        self.preinitialize()
        if self.enable_global_step:
            for name in self._names:
                self._state.setdefault(name, {})["step"] = jnp.zeros((), jnp.int32)

    def _extend_state(self, known: int) -> None:
        """Allocates the state of parameters added after the first ``known`` ones."""
        old = self._state
        self._preinitialize()
        self._state.update({name: old[name] for name in self._names[:known] if name in old})

    def visit_state(self, fn: Callable[[Array], Array | None]) -> None:
        """Applies ``fn`` to every state value; what it returns, unless None, replaces it."""
        entries = self._entries()
        for entry in entries:
            for key, value in entry.items():
                new = fn(value)
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
        return jnp.asarray(self._increment(self._index(name)), jnp.float32)

    def _increment(self, index: int) -> Array:
        entry = self._state[self._names[index]]
        entry["step"] = saturating_increment(jnp.asarray(entry["step"]))
        return entry["step"]

    def _entries(self) -> list[dict[str, Any]]:
        return [dict(self._state.get(name, {})) for name in self._names]

    def _full_entries(self) -> list[dict[str, Any]]:
        """Like `_entries`, with what a state dict may hold beyond them."""
        return self._entries()

    def _set_entries(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self._state = {n: dict(e) for n, e in zip(self._names, entries, strict=True)}

    def _state_arrays(self) -> Any:
        return self._state

    def _set_state_arrays(self, state: Any) -> None:
        self._state = state

    # --- state_dict --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State and groups in torch's layout.

        Returns:
          a dict like ``{"state": {0: {"exp_avg": ...}, ...}, "param_groups": [{"lr": ...,
          "params": [0, ...], "param_names": ["dense.bias", ...]}, ...]}``; parameters are
          numbered in the order of the groups.
        """
        order = self._grouped_names()
        entries = dict(zip(self._names, self._entries(), strict=True))
        number = {name: i for i, name in enumerate(order)}
        groups = [
            {
                **{k: plain_value(v) for k, v in group.items() if k != "params"},
                "params": [number[name] for name in group["params"]],
                "param_names": list(group["params"]),
            }
            for group in self.param_groups
        ]
        return {"state": {i: entries[name] for i, name in enumerate(order)}, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over state and group values; all or, on an error, nothing.

        Parameters are matched by name where the dict has ``param_names`` that are all ours,
        else by position. Arrays may be JAX, NumPy or torch tensors; they are copied, in the
        dtype of the state that they replace. A key that a group lacks takes the optimizer's
        default.

        Raises:
          ValueError: names what is missing, unexpected, of another shape, or out of range.
        """
        match = match_parameters(state_dict, self.param_groups)
        groups, entries = [], dict(zip(self._names, self._full_entries(), strict=True))
        for ours, loaded in zip(self.param_groups, match.groups, strict=True):
            group = normalize({**self.defaults, **self._import_group(loaded)})
            group["params"] = list(ours["params"])
            self._check_group(group)
            groups.append(group)
        new_entries = dict(entries)
        if match.has_state:
            for group in groups:
                for name in group["params"]:
                    loaded = self._import_state(match.entries.get(name), group, entries[name])
                    new_entries[name] = load_array(name, loaded, entries[name])
        for ours, group in zip(self.param_groups, groups, strict=True):
            ours.clear()
            ours.update(group)
        self._set_entries([new_entries[name] for name in self._names])

    def _import_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return check_group(group, self.defaults, {})

    def _import_state(self, entry: Any, group: Mapping[str, Any], ours: Mapping[str, Any]) -> Any:
        return entry

    # --- the parts that change, for jit and trace ------------------------------------------------

    def _dynamic(self) -> dict[str, Any]:
        """Everything that a step may change: arrays and numbers. Modules count separately."""
        return {
            "params": [s.values for s in self._sources if isinstance(s, TreeSource)],
            "state": self._state_arrays(),
            "numbers": [partition(_group_values(g))[0] for g in self.param_groups],
        }

    def _set_dynamic(self, dynamic: Mapping[str, Any]) -> None:
        trees = [s for s in self._sources if isinstance(s, TreeSource)]
        for source, values in zip(trees, dynamic["params"], strict=True):
            source.values = values
        self._set_state_arrays(dynamic["state"])
        for group, numbers in zip(self.param_groups, dynamic["numbers"], strict=True):
            group.update(combine(numbers, partition(_group_values(group))[1]))

    def _static(self) -> tuple:
        """The hashable rest, which decides which program a step is."""
        groups = tuple(
            (tuple(g["params"]), partition(_group_values(g))[1]) for g in self.param_groups
        )
        sources = tuple(
            s.treedef if isinstance(s, TreeSource) else tuple(s.names) for s in self._sources
        )
        flags = (self.enable_global_step, self._structured_as_list)
        clipping = (self.max_gradient_norm, self.max_gradient_value)
        return (type(self), groups, sources, flags, clipping)

    def _check_groups(self) -> None:
        """Hook: refuses group values edited since the last step, if they are out of range."""

    def modules(self) -> list[nnx.Module]:
        """The nnx modules whose parameters this optimizer updates in place."""
        return [s.module for s in self._sources if isinstance(s, ModuleSource)]

    # --- display -----------------------------------------------------------------------------

    def __repr__(self) -> str:
        sizes = {n: v.size for n, v in zip(self._names, self._values(), strict=True)}
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            total = sum(sizes[n] for n in group["params"])
            lines.append(f"Parameter Group {i}")
            lines += [f"    {k}: {plain_value(v)}" for k, v in sorted(_group_values(group).items())]
            lines.append(f"    params: {len(group['params'])} arrays, {total:,} elements")
        return "\n".join([*lines, ")"])

    def _repr_html_(self) -> str:
        """For Jupyter: what the groups hold, and how much."""
        values = dict(zip(self._names, self._values(), strict=True))
        keys = list(dict.fromkeys(k for g in self.param_groups for k in _group_values(g)))
        head = "".join(f"<th>{html.escape(k)}</th>" for k in ["arrays", "elements", *keys])
        rows = []
        for group in self.param_groups:
            size = sum(values[n].size for n in group["params"])
            cells = [len(group["params"]), f"{size:,}"]
            cells += [plain_value(group.get(k, "")) for k in keys]
            rows.append("".join(f"<td>{html.escape(str(c))}</td>" for c in cells))
        total = sum(x.nbytes for x in jax.tree.leaves(self._state_arrays()))
        body = "".join(f"<tr><td>{i}</td>{row}</tr>" for i, row in enumerate(rows))
        return (
            f"<table><caption><code>{type(self).__name__}</code>: {len(self._names)} arrays, "
            f"{total:,} bytes of state</caption><tr><th>group</th>{head}</tr>{body}</table>"
        )

    @classmethod
    def of(
        cls, pure: PureOptimizer[P], enable_global_step: bool = False
    ) -> "type[RuleOptimizer[P]]":
        """The base class of the optimizer that applies a pure one, with its signature.

        Args:
          pure: what `per_parameter` returned, e.g. ``optim.adamw``.
          enable_global_step: the class's default for that argument; True for an algorithm
            whose formula uses the number of the step.
        """
        base = cls if issubclass(cls, RuleOptimizer) else RuleOptimizer
        name = f"{cls.__name__}Of{pure.__name__}"
        return cast(
            "type[RuleOptimizer[P]]",
            type(name, (base,), {"pure": pure, "counts_steps": enable_global_step}),
        )


class RuleOptimizer(Optimizer, Generic[P]):
    """An optimizer that applies a one-parameter rule; made by `Optimizer.of`.

    Args:
      params: a pytree of arrays, an nnx.Module (updated in place), a list of dicts
        ``{"params": tree, **values}``, or what `optim.param_groups` returns.
      *args, **kwargs: the hyper-parameters of the pure function.
      enable_global_step: count the steps of every parameter in its state ``step``.
      state_dtype: a dtype for all states, or a dict from state names to dtypes.
    """

    pure: ClassVar[Any]
    counts_steps: ClassVar[bool] = False
    states_to_sparsify: ClassVar[tuple[str, ...]] = ()
    # What torch.optim's optimizer of the same name calls differently; see `import_state`.
    torch_flags: ClassVar[Mapping[str, Any]] = {}  # its flags, and what they are here
    torch_names: ClassVar[Mapping[str, str]] = {}  # its name of a group value -> ours
    torch_counts_steps: ClassVar[bool] = True  # whether its state has `step`

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "__init__" not in vars(cls) and "pure" in dir(cls):
            cls.__signature__ = _shell_signature(cls)  # pyright: ignore
            if cls.__doc__ is None or cls.__doc__ is RuleOptimizer.__doc__:
                cls.__doc__ = _shell_doc(cls)

    @overload
    def __init__(self, params: Any, *args: P.args, **kwargs: P.kwargs) -> None: ...
    @overload
    def __init__(
        self,
        params: Any,
        *args: Any,
        enable_global_step: bool,
        state_dtype: StateDtype = ...,
        **kwargs: Any,
    ) -> None: ...
    @overload
    def __init__(self, params: Any, *args: Any, state_dtype: StateDtype, **kwargs: Any) -> None: ...
    def __init__(
        self,
        params: Any,
        *args: Any,
        enable_global_step: bool | None = None,
        state_dtype: StateDtype = None,
        **kwargs: Any,
    ):
        arguments = bind(self.pure.rule, type(self).__name__, args, kwargs)
        self._state_dtype = state_dtype
        self._states: list[list[Any]] = []
        self._clocks: list[GroupClock] = []
        self._checked: list[dict[str, Any]] = []
        self._last_plan: Plan | None = None
        super().__init__(
            params,
            arguments,
            enable_global_step=(
                self.counts_steps if enable_global_step is None else enable_global_step
            ),
        )

    # --- one step ----------------------------------------------------------------------------

    def preinitialize(self) -> None:
        """Allocates every state; nothing is allocated in a step."""
        values = dict(zip(self._names, self._values(), strict=True))
        self._states, self._clocks, self._checked = [], [], []
        self._last_plan = None
        for group in self.param_groups:
            hyper = self._hyper(group)
            params = [values[name] for name in group["params"]]
            states, clock = init_group(self.pure.rule, hyper, self._state_dtype, params)
            self._states.append(states)
            self._clocks.append(clock)
            self._checked.append(hyper)

    def _preinitialize(self) -> None:
        self.preinitialize()

    def _extend_state(self, known: int) -> None:
        old = self._entries_of(len(self._states))
        self.preinitialize()
        new = self._entries()
        self._set_entries([old.get(name, e) for name, e in zip(self._names, new, strict=True)])

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
        value, grads = self._gradients(grads_or_closure, has_aux)
        self._apply_gradients(grads)
        return value

    def _clipping(self) -> Clipping:
        bounds = {"norm": self.max_gradient_norm, "value": self.max_gradient_value}
        for name, bound in bounds.items():
            if bound is not None:
                check(f"max_gradient_{name}", bound, "> 0")
        return Clipping(*(None if b is None else as_argument(b) for b in bounds.values()))

    def _apply_gradients(self, grads: list[Any]) -> None:
        params = self._values()
        self._check_not_leaking(grads, params)
        split = [partition(hyper) for hyper in self._checked_hyper()]
        plan = self._plan(tuple(static for _, static in split))
        numbers = [tuple(as_argument(x) for x in numbers) for numbers, _ in split]
        clipping = self._clipping()
        state = unshared(StepState(self._states, self._clocks))
        params = unshared(params, owners=2)  # this list, and where they live
        with deferred_interrupts():
            try:
                state, params = take_step(plan, state, params, grads, numbers, clipping)
            except TypeError:  # what JAX says of a gradient that is no array
                check_grads(grads, params, lambda: self._names)
                raise
            self._states, self._clocks = state
            self._set_values(params)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last_plan": None}  # PyTreeDefs in it cannot be pickled

    def _plan(self, statics: tuple) -> "Plan":
        """The plan of a step; the same object as long as nothing static changes."""
        if self._last_plan is None or self._last_plan.statics != statics:
            position = {name: i for i, name in enumerate(self._names)}
            members = [tuple(position[n] for n in g["params"]) for g in self.param_groups]
            self._last_plan = Plan(self.pure.rule, statics, tuple(members), tuple(self._names))
        return self._last_plan

    def _check_not_leaking(self, grads: Sequence[Any], params: Sequence[Any]) -> None:
        """A traced step of an optimizer from outside the trace would leave tracers in it."""
        if not any(is_traced(g) for g in grads[:1]):
            return
        if not any(is_traced(x) for x in [*params, *(c.count for c in self._clocks)]):
            raise RuntimeError(FROM_OUTSIDE)

    # --- hyper-parameters --------------------------------------------------------------------

    def _hyper(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return normalize({name: group[name] for name in self.defaults})

    def _checked_hyper(self) -> list[dict[str, Any]]:
        """The groups' values; those edited since the last step are checked again."""
        result = []
        for i, (group, old) in enumerate(zip(self.param_groups, self._checked, strict=True)):
            hyper = self._hyper(group)
            edited = not all(_is_same(hyper[k], old[k]) for k in hyper)
            if edited and not _is_traced(hyper):  # traced ones were checked before the trace
                try:
                    self.pure.rule(**hyper)
                    present = {k for k, _ in _items(self._clocks[i].clock)}
                    for state in self._states[i]:
                        present |= {k for k, v in _items(state) if v is not None}
                    check_buffers(self.pure.rule, old, hyper, present)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"param_groups[{i}]: {error}") from None
                self._checked[i] = hyper
            result.append(hyper)
        return result

    def _check_groups(self) -> None:
        self._checked_hyper()

    def _check_group(self, group: Mapping[str, Any]) -> None:
        self.pure.rule(**self._hyper(group))

    # --- state -------------------------------------------------------------------------------

    def state_names_to_sparsify(self) -> list[str]:
        """Names of the states that a sparsity mask of the parameter applies to."""
        return list(self.states_to_sparsify)

    @property
    def state(self) -> Mapping[str, Mapping[str, Any]]:
        """A read-only view: per parameter name, the states by name. See `visit_state`."""
        entries = zip(self._names, self._entries(), strict=True)
        return MappingProxyType({name: MappingProxyType(entry) for name, entry in entries})

    def _stores_step(self, group: Mapping[str, Any]) -> bool:
        """Whether the step count is needed to continue: by the formula, or by a schedule."""
        scheduled = any(callable(x) for x in partition(self._hyper(group))[1][1])
        return self.enable_global_step or self.counts_steps or scheduled

    def _entries_of(self, groups: int) -> dict[str, dict[str, Any]]:
        entries = {}
        for group, states, clock in zip(
            self.param_groups[:groups], self._states, self._clocks, strict=True
        ):
            scalars = {k: _readable(v) for k, v in _items(clock.clock)}
            if self._stores_step(group):
                scalars["step"] = _readable(clock.count).astype(np.float32)
            for i, (name, state) in enumerate(zip(group["params"], states, strict=True)):
                arrays = {k: v for k, v in _items(state) if v is not None}
                entries[name] = arrays | {k: v[i] for k, v in scalars.items()}
        return entries

    def _entries(self) -> list[dict[str, Any]]:
        entries = self._entries_of(len(self.param_groups))
        return [entries[name] for name in self._names]

    def _full_entries(self) -> list[dict[str, Any]]:
        entries = dict(zip(self._names, self._entries(), strict=True))
        for clock, group in zip(self._clocks, self.param_groups, strict=True):
            steps = _readable(clock.count).astype(np.float32)
            for name, step in zip(group["params"], steps, strict=True):
                entries[name]["step"] = step
        return list(entries.values())

    def _set_entries(self, entries: Sequence[Mapping[str, Any]]) -> None:
        by_name = dict(zip(self._names, entries, strict=True))
        for g, group in enumerate(self.param_groups):
            mine = [by_name[name] for name in group["params"]]
            self._states[g] = [
                type(s)(*(e.get(k) for k in s._fields))
                for s, e in zip(self._states[g], mine, strict=True)
            ]
            count, clock, _ = self._clocks[g]
            if not mine:
                continue
            if "step" in mine[0]:
                steps = jnp.stack([jnp.asarray(e["step"]) for e in mine])
                count = _saturating_int32(steps)
            columns = {
                k: jnp.stack([jnp.asarray(e[k], v.dtype) for e in mine]) for k, v in _items(clock)
            }
            if columns:
                clock = type(clock)(**columns)
            self._clocks[g] = GroupClock(count, clock, _cohorts_of(count, clock))

    def _increment(self, index: int) -> Array:
        name = self._names[index]
        for g, group in enumerate(self.param_groups):
            if name in group["params"]:
                i = group["params"].index(name)
                count, clock, cohorts = self._clocks[g]
                count = count.at[i].set(saturating_increment(count[i]))
                alone = cohorts.split([j != i for j in range(len(cohorts.of))])
                self._clocks[g] = GroupClock(count, clock, alone)
                return count[i]
        raise KeyError(f"no parameter is called {name!r}")

    def _state_arrays(self) -> StepState:
        return StepState(self._states, self._clocks)

    def _set_state_arrays(self, state: StepState) -> None:
        self._states, self._clocks = state

    # --- other people's state ------------------------------------------------------------------

    def import_state(self, entry: Mapping[str, Any], group: Mapping[str, Any]) -> Mapping[str, Any]:
        """Hook: turns another library's state of one parameter into ours."""
        return entry

    def export_state(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        """Hook: the inverse of `import_state`, for torch.optim, on NumPy arrays."""
        return entry

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
        order = self._grouped_names() if param_names is None else list(param_names)
        if sorted(order) != sorted(self._names):
            raise ValueError(f"param_names must be {sorted(self._names)}, got {sorted(order)}")
        place = {name: i for i, name in enumerate(order)}
        in_order = sorted(
            self.param_groups, key=lambda g: min(map(place.__getitem__, g["params"]), default=0)
        )
        entries = dict(zip(self._names, self._full_entries(), strict=True))
        back = {ours: theirs for theirs, ours in self.torch_names.items()}
        state, groups = {}, []
        for group in in_order:
            names = sorted(group["params"], key=place.__getitem__)
            if names != order[len(state) : len(state) + len(names)]:
                raise ValueError(f"param_names must list group after group, got {order}")
            numbers = range(len(state), len(state) + len(names))
            values = {back.get(k, k): plain_value(v) for k, v in group.items()}
            for key, value in values.items():
                if any(callable(x) for x in jax.tree.leaves(value)):
                    raise ValueError(f"{key} is a schedule, {value!r}; torch needs a number")
            groups.append(
                {**values, **self.torch_flags, "params": [*numbers], "param_names": names}
            )
            for number, name in zip(numbers, names, strict=True):
                state[number] = self._torch_entry(entries[name], group)
        return {"state": state, "param_groups": groups}

    def _torch_entry(self, entry: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
        step = entry["step"] or _steps_of_powers(entry, group)
        ours = {k: v for k, v in entry.items() if k != "step" and not k.endswith("_power")}
        theirs = dict(self.export_state(ours))
        if self.torch_counts_steps:
            theirs["step"] = np.float32(step)
        return {k: to_torch(v) for k, v in theirs.items()}

    def _import_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        renamed = {self.torch_names.get(k, k): v for k, v in group.items()}
        return check_group(renamed, self.defaults, self.torch_flags)

    def _import_state(self, entry: Any, group: Mapping[str, Any], ours: Mapping[str, Any]) -> Any:
        if entry is None:
            return None
        entry = dict(self.import_state(entry, group))
        if not self._stores_step(group):
            entry.setdefault("step", ours["step"])
        return entry


# --- helpers -------------------------------------------------------------------------------------


def _items(state: Any) -> list[tuple[str, Any]]:
    return list(zip(state._fields, state, strict=True)) if hasattr(state, "_fields") else []


def with_powers(
    entry: Mapping[str, Any], group: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Adds the running powers beta^(t + 1) to a state that counts t steps instead."""
    entry = dict(entry)
    if "step" in entry:
        for name, beta in zip(names, group["betas"], strict=False):
            entry.setdefault(name, float(beta) ** (float(entry["step"]) + 1))
    return entry


def _steps_of_powers(entry: Mapping[str, Any], group: Mapping[str, Any]) -> float:
    """The steps that running powers beta^(t + 1) tell of; 0 where there are none."""
    for name, beta in zip(("beta1_power", "beta2_power"), group.get("betas", ()), strict=False):
        power = float(entry.get(name, 0))
        if 0 < power < 1 and 0 < beta < 1:
            return round(np.log(power) / np.log(float(beta))) - 1
    return 0


def _group_values(group: Mapping[str, Any]) -> dict[str, Any]:
    return normalize({k: v for k, v in group.items() if k != "params"})


def _cohorts_of(count: Array, clock: Any) -> Cohorts:
    """Parameters whose clocks hold the same values; none, where the values are not known."""
    scalars = [count, *jax.tree.leaves(clock)]
    if any(is_traced(x) for x in scalars):
        return Cohorts(tuple(range(len(count))))
    return Cohorts.by(zip(*(np.asarray(x).tolist() for x in scalars), strict=True))


def _is_traced(tree: Any) -> bool:
    return any(is_traced(x) for x in jax.tree.leaves(tree))


def _is_same(value: Any, old: Any) -> bool:
    """Whether a value was left alone; a traced step puts unchanged numbers into new tuples."""
    if isinstance(value, tuple) and isinstance(old, tuple) and len(value) == len(old):
        return all(a is b for a, b in zip(value, old, strict=True))
    return value is old


def _is_closure(x: Any) -> bool:
    """A function, as opposed to a tree of gradients, which may be callable too."""
    return isinstance(x, functools.partial | jax.tree_util.Partial) or (
        callable(x) and jax.tree_util.all_leaves([x])
    )


def _check_closure(closure: Callable[..., Any]) -> None:
    try:
        inspect.signature(closure).bind(None)
    except ValueError:  # no signature to be had
        return
    except TypeError:
        raise TypeError(
            "the closure of step is a function of the parameters, e.g. lambda params: loss(params)"
        ) from None


def _readable(x: Any) -> Any:
    """A vector that will be read element by element: on the host, unless it is traced."""
    return x if is_traced(x) else np.asarray(x)


def _saturating_int32(steps: Array) -> Array:
    limit = np.iinfo(np.int32).max
    return jnp.where(steps >= limit, limit, steps.astype(jnp.int32))


def _shell_signature(cls: type[RuleOptimizer]) -> inspect.Signature:
    kinds = inspect.Parameter
    own = [
        kinds("params", kinds.POSITIONAL_OR_KEYWORD),
        *inspect.signature(cls.pure.rule).parameters.values(),
        kinds("enable_global_step", kinds.KEYWORD_ONLY, default=cls.counts_steps, annotation=bool),
        kinds("state_dtype", kinds.KEYWORD_ONLY, default=None),
    ]
    return inspect.Signature(own)


def _shell_doc(cls: type[RuleOptimizer]) -> str:
    name = cls.pure.__name__
    doc = (inspect.getdoc(cls.pure) or name).split("\n\n>>>")[0]
    return f"The optimizer `{name}` as a class that owns its parameters; see `Optimizer`.\n\n{doc}"


# --- pytrees -------------------------------------------------------------------------------------


class _Static:
    """What of an optimizer is not an array: compared by value, and holds no buffers."""

    def __init__(self, key: tuple, attributes: dict[str, Any]):
        self.key, self.attributes = key, attributes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def _flatten(opt: Optimizer) -> tuple[tuple, _Static]:
    graphdef, modules = nnx.split(tuple(opt.modules()))
    dynamic = opt._dynamic()
    attributes = {
        **opt.__dict__,
        "_sources": [source.without_arrays() for source in opt._sources],
        "_state": {},
        "_states": [],
        "_clocks": [],
        "_checked": [],
        "_last_plan": None,
        "param_groups": [
            {**g, **combine([0.0] * len(n), partition(_group_values(g))[1])}
            for g, n in zip(opt.param_groups, dynamic["numbers"], strict=True)
        ],
    }
    return (dynamic, modules), _Static((opt._static(), graphdef), attributes)


def _unflatten(cls: type[Optimizer], static: _Static, children: tuple) -> Any:
    dynamic, state = children
    opt: Any = object.__new__(cls)
    opt.__dict__.update(static.attributes)
    opt._sources = [source.without_arrays() for source in opt._sources]
    opt.param_groups = [dict(group) for group in opt.param_groups]
    modules = iter(nnx.merge(static.key[1], state))
    for source in opt._sources:
        if isinstance(source, ModuleSource):
            source.attach(next(modules))
    opt._set_dynamic(dynamic)
    if isinstance(opt, RuleOptimizer):
        opt._checked = [opt._hyper(g) for g in opt.param_groups]
    return opt
