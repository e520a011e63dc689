"""The base class of the stateful optimizers: parameters, groups, state, and their copies."""

import functools
import html
import inspect
import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, ParamSpec

import jax
import jax.numpy as jnp
from flax import nnx

from cerebras_jax.checks import is_traced
from cerebras_jax.donation import Donor
from cerebras_jax.engine.hyper import NUMBER, normalize, saturating_increment
from cerebras_jax.engine.lift import PureOptimizer
from cerebras_jax.formats.state_dict import (
    check_keys,
    load_array,
    match_parameters,
    plain_value,
    to_state_dict,
)
from cerebras_jax.optim import numbers as group_numbers
from cerebras_jax.optim.numbers import as_argument
from cerebras_jax.optim.param_groups import ParamGroups, is_group_list
from cerebras_jax.optim.sources import ModuleSource, Source, TreeSource, make_source
from cerebras_jax.stateful import OUTSIDE, Fill, Memento, Parts, Stateful, freeze
from cerebras_jax.transforms import clipping
from cerebras_jax.types import Array

P = ParamSpec("P")


class Optimizer(Stateful, ABC):
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

    transient: ClassVar[tuple[str, ...]] = ("_lock", "_index", "_donor")
    special: ClassVar[frozenset[str]] = frozenset(
        {"param_groups", "_sources", "_trees", "_names", "max_gradient_norm", "max_gradient_value"}
        | {"_live", "_was_stepped", "_was_scheduled"}
    )  # attributes that `parts` takes apart by itself

    class_of: ClassVar[Callable[..., type[Any]]]  # set by the module of the class form

    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]

    def __init__(
        self,
        params: Any,
        defaults: Mapping[str, Any] | None = None,
        *,
        enable_global_step: bool = False,
        donate: Any = "auto",
    ):
        self.defaults = normalize(dict(defaults or {}))
        self.enable_global_step = bool(enable_global_step)
        self.max_gradient_norm: float | None = None
        self.max_gradient_value: float | None = None
        self.param_groups = []
        self.donate = donate
        self._donor = Donor(donate)
        self._sources: list[Source] = []
        self._trees: list[list[Array]] = []  # the values of each source that is no module
        self._names: tuple[str, ...] = ()
        self._live: set[tuple[int, str]] = set()  # numbers that are arguments for good
        self._was_stepped = self._was_scheduled = False  # which came first
        self._structured_as_list = False
        if isinstance(params, ParamGroups):
            self._add_source(params.tree, list(params))
        elif is_group_list(params):
            self._structured_as_list = True
            for group in params:
                self._add_group(group)
        else:
            self._add_source(params, None)
        self._state: Any = {}
        self._allocate()

    # --- parameters and groups ---------------------------------------------------------------

    @property
    def params(self) -> Any:
        """The current values, in the structure that was given; a module is the module itself.

        A step reuses the buffers of the old values, except of those that somebody still holds:
        they are copied first. So ``grad(opt.params)`` costs nothing, and a tree that is kept
        stays valid.
        """
        with self.lock:
            trees = [s.tree(v) for s, v in zip(self._sources, self._trees, strict=True)]
        return trees[0] if self._is_one_tree() else trees

    @property
    def copied(self) -> int:
        """How many arrays steps had to copy so far, because something else still held them."""
        return self._the_donor().copied

    def _the_donor(self) -> Donor:
        donor = vars(self).get("_donor")
        if donor is None or donor.donate is not self.donate:
            donor = self._donor = Donor(self.donate)
        return donor

    def _is_one_tree(self) -> bool:
        return len(self._sources) == 1 and not self._structured_as_list

    def named_parameters(self) -> list[tuple[str, Array]]:
        """Dotted names and current values of all parameters."""
        with self.lock:
            return list(zip(self._names, self._values(), strict=True))

    def set_parameter(self, name: str, value: Array) -> None:
        """Replaces one parameter's value by another of its shape, in its dtype.

        Raises:
          KeyError: if no parameter has this name.
          ValueError: if the shape is another.
        """
        with self.lock:
            source, i = self._place(name)
            values = self._source_values(source)
            old = values[i]
            if jnp.shape(value) != old.shape:
                raise ValueError(
                    f"parameter {name!r} has shape {old.shape}, got a value of {jnp.shape(value)}"
                )
            if is_traced(value) and not is_traced(old):
                raise RuntimeError(OUTSIDE.format(name="the optimizer"))
            value = jnp.asarray(value, old.dtype)
            if isinstance(self._sources[source], ModuleSource):
                self._sources[source].variables[i].set_value(value)  # pyright: ignore
            else:
                values[i] = value

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Adds ``{"params": tree, **values}``; `params` then is a list with its tree last.

        Raises:
          ValueError: if a value is out of range, or an array is in another group already. The
            optimizer is then as it was.
        """
        with self.lock:
            before, kept = Memento(self), self._kept_state()
            try:
                self._add_group(group)
                self._structured_as_list = True
                self._allocate(kept)
            except BaseException:
                before.undo()
                raise

    def _add_group(self, group: Mapping[str, Any]) -> None:
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(f'a parameter group is a dict with the key "params", got {group!r}')
        self._add_source(group["params"], [dict(group)])

    def _add_source(self, tree: Any, groups: Sequence[Mapping[str, Any]] | None) -> None:
        """Adds a tree; without groups of names, or with one that holds the tree, as one group."""
        source, values = make_source(tree)
        known = {id(v) for v in self._values()}
        names = list(source.names)
        for name, value in zip(names, values, strict=True):
            if id(value) in known:
                raise ValueError(f"parameter {name!r} appears in more than one parameter group")
        if groups is None:
            groups = [{"params": names}]
        elif groups[0]["params"] is tree:
            groups = [{**groups[0], "params": names}]
        new_groups = [normalize({**self.defaults, **group}) for group in groups]
        prefix = f"{len(self._sources)}." if set(names) & set(self._names) else ""
        for group in new_groups:
            check_keys(group, self.defaults)
            self._check_group(group)
            group["params"] = [prefix + name for name in group["params"]]
        self._sources = [*self._sources, source]
        self._trees = [*self._trees, [] if isinstance(source, ModuleSource) else values]
        self._names = (*self._names, *(prefix + name for name in names))
        self.param_groups += new_groups
        vars(self).pop("_index", None)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Hook: refuses values out of range."""

    def _source_values(self, i: int) -> list[Array]:
        source = self._sources[i]
        return source.values if isinstance(source, ModuleSource) else self._trees[i]

    def _values(self) -> list[Array]:
        return [x for i in range(len(self._sources)) for x in self._source_values(i)]

    def _set_values(self, values: Sequence[Array]) -> None:
        start = 0
        for i, source in enumerate(self._sources):
            stop = start + len(source.names)
            if isinstance(source, ModuleSource):
                source.values = values[start:stop]
            else:
                self._trees[i] = list(values[start:stop])
            start = stop

    def _grouped_names(self) -> list[str]:
        """Names in the order of the groups, which is the order of a state dict."""
        return [name for group in self.param_groups for name in group["params"]]

    def _place(self, name: str) -> tuple[int, int]:
        """Which source a parameter is in, and where."""
        index = vars(self).get("_index")
        if index is None:
            places = [(s, i) for s, x in enumerate(self._sources) for i in range(len(x.names))]
            index = self._index = dict(zip(self._names, places, strict=True))
        if name not in index:
            raise KeyError(f"no parameter is called {name!r}")
        return index[name]

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
        bounds = self._bounds()
        if bounds:
            limits = (bounds.get(f"max_gradient_{k}") for k in ("norm", "value"))
            grads = clipping.clipped(grads, *limits)
        return value, dict(zip(self._names, grads, strict=True))

    def check(self) -> None:
        """Refuses bounds of the gradients that are out of range."""
        clipping.check_bounds(self.max_gradient_norm, self.max_gradient_value)

    def _bounds(self) -> dict[str, Any]:
        """The bounds of the gradients that are set, as arguments of a step."""
        Optimizer.check(self)
        names = ("max_gradient_norm", "max_gradient_value")
        given = {name: getattr(self, name) for name in names}
        return {name: as_argument(x) for name, x in given.items() if x is not None}

    def _gradients(self, given: Any, has_aux: bool) -> tuple[Any, list[Any]]:
        value = None
        if _is_closure(given):
            _check_closure(given)
            if self._is_one_tree():
                value, given = self._sources[0].value_and_grad(given, self._trees[0], has_aux)
            elif any(isinstance(s, ModuleSource) for s in self._sources):
                raise TypeError("a closure over several parameter trees takes no modules")
            else:
                value, given = jax.value_and_grad(given, has_aux=has_aux)(self.params)
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
        """Applies ``fn`` to every state value; what it returns, unless None, replaces it."""
        with self.lock:
            entries = self._entries()
            for entry in entries.values():
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

    # --- state_dict --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State and groups in torch's layout.

        Returns:
          a dict like ``{"state": {0: {"exp_avg": ...}, ...}, "param_groups": [{"lr": ...,
          "params": [0, ...], "param_names": ["dense.bias", ...]}, ...]}``; parameters are
          numbered in the order of the groups. A function among the group values, such as a
          schedule, is stored as None, and is kept on loading.
        """
        with self.lock:
            return to_state_dict(self.param_groups, self._entries())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over state and group values; all or, on an error, nothing.

        Parameters are matched by name where the dict has ``param_names`` that are all ours,
        else by position. Arrays may be JAX, NumPy or torch tensors; they are copied, in the
        dtype of the state that they replace. A key that a group lacks takes the optimizer's
        default.

        Raises:
          ValueError: names what is missing, unexpected, of another shape, or out of range.
        """
        with self.lock:
            match = match_parameters(state_dict, self.param_groups)
            ours, groups = self._full_entries(), []
            for mine, loaded in zip(self.param_groups, match.groups, strict=True):
                group = normalize({**self.defaults, **self._import_group(loaded, mine)})
                group["params"] = list(mine["params"])
                check_keys(group, self.defaults)
                self._check_loaded_group(mine, group)
                groups.append(group)
            entries = dict(ours)
            if match.has_state:
                for group in groups:
                    for name in group["params"]:
                        loaded = self._import_state(match.entries.get(name), group, ours[name])
                        entries[name] = load_array(name, loaded, ours[name])
            self._load_shared(state_dict)
            for mine, group in zip(self.param_groups, groups, strict=True):
                mine.clear()
                mine.update(group)
            self._set_entries(entries)
            self._was_stepped = True

    def _check_loaded_group(self, ours: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
        self._check_group(loaded)

    def _import_group(self, group: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in group.items() if k not in ("params", "param_names")}

    def _import_state(self, entry: Any, group: Mapping[str, Any], ours: Mapping[str, Any]) -> Any:
        return entry

    def _load_shared(self, state_dict: Mapping[str, Any]) -> None:
        """Hook: takes over what belongs to no parameter."""

    # --- the parts that change, for jit and trace ------------------------------------------------

    def parts(self) -> Parts:
        """See `Stateful`: arrays are parameters and states; numbers, those of the groups."""
        lists = self._array_lists()
        arrays: list[Any] = [x for values in lists for x in values]
        refs: list[Any] = [s.module for s in self._sources if not isinstance(s, TreeSource)]
        numbers, groups = self._split_groups()
        bounds = (self.max_gradient_norm, self.max_gradient_value)
        numbers += [x for x in bounds if x is not None]
        static = (
            type(self),
            groups,
            tuple(map(len, lists)),
            tuple(x is None for x in bounds),
            tuple(s.key for s in self._sources),
            *self._hashables(),
            freeze(self._rest(), arrays, refs),
        )
        return Parts(arrays, numbers, static, refs)

    def restore(self, arrays: list[Any], numbers: list[Any], refs: list[Any] | None = None) -> None:
        """See `Stateful`."""
        remaining, values = iter(arrays), iter(numbers)
        modules = None if refs is None else iter(refs)
        for target in self._array_lists():
            target[:] = itertools.islice(remaining, len(target))
        if modules is not None:
            self._sources = [
                s if isinstance(s, TreeSource) else ModuleSource.of(next(modules))
                for s in self._sources
            ]
        for group, mark in zip(self.param_groups, self._split_groups()[1], strict=True):
            group.update(group_numbers.join(values, mark[1]))
        for name in ("max_gradient_norm", "max_gradient_value"):
            if getattr(self, name) is not None:
                setattr(self, name, next(values))
        fill = Fill(remaining, modules)
        for name, value in self._rest().items():
            setattr(self, name, fill(value))

    def array_names(self) -> list[str]:
        """See `Stateful`."""
        names = [n for n, v in zip(self._source_names(), self._trees, strict=True) if v]
        known = [name for group in names for name in group]
        return [*known, *self._state_names(), *self._rest_names()]

    def _source_names(self) -> list[tuple[str, ...]]:
        """The names of each source's parameters."""
        names = iter(self._names)
        return [tuple(itertools.islice(names, len(s.names))) for s in self._sources]

    def _state_names(self) -> list[str]:
        """Names for the arrays of `_array_lists` that are no parameters."""
        return []

    def _rest_names(self) -> list[str]:
        """Names for the arrays among the other attributes."""
        found: list[Any] = []
        freeze(self._rest(), found, [])
        return [f"attribute {i}" for i in range(len(found))]

    def _array_lists(self) -> list[list[Any]]:
        """Lists of arrays, in the order of `parts`."""
        return self._trees

    def _hashables(self) -> tuple[Any, ...]:
        """Attributes that are hashable as they are."""
        return (self._names,)

    def _rest(self) -> dict[str, Any]:
        """The attributes that are taken apart like those of any `Stateful`."""
        return {k: v for k, v in self._attributes().items() if k not in self.special}

    def _split_groups(self) -> tuple[list[Any], tuple]:
        """The groups' numbers, and a hashable value made of the rest."""
        numbers: list[Any] = []
        static = []
        for i, group in enumerate(self.param_groups):
            values = {k: v for k, v in group.items() if k != "params"}
            live = {key for j, key in self._live if j == i}
            mine, marks = group_numbers.split(
                values, lambda key, v, live=live: group_numbers.is_live(key, v, live)
            )
            numbers += mine
            static.append((tuple(group["params"]), marks))
            self._remember_live(i, marks)
        return numbers, tuple(static)

    def _remember_live(self, i: int, marks: tuple) -> None:
        """A number that was an argument once stays one, so that a zero is no new program."""
        for key, mark in marks:
            if (mark is NUMBER or (isinstance(mark, tuple) and NUMBER in mark)) and (
                (i, key) not in self._live
            ):
                self._live.add((i, key))

    def as_arguments(self, numbers: list[Any]) -> list[Any]:
        """See `Stateful`."""
        return [as_argument(x) for x in numbers]

    def live(self) -> frozenset[Any]:
        """See `Stateful`."""
        return frozenset(self._live)

    def set_live(self, live: frozenset[Any]) -> None:
        """See `Stateful`."""
        self._live = set(live)

    def is_traced(self) -> bool:
        """Whether its parameters are tracers, as within `trace` or ``jax.jit``."""
        return any(
            is_traced(x) for i in range(len(self._sources)) for x in self._source_values(i)[:1]
        )

    def schedule_value(self, i: int, key: str) -> None:
        """Says that a value of group ``i`` will change, so that its zero is an argument too."""
        self._live.add((i, key))

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

    def modules(self) -> list[nnx.Module]:
        """The nnx modules whose parameters this optimizer updates in place."""
        return [s.module for s in self._sources if isinstance(s, ModuleSource)]

    def __getstate__(self) -> dict[str, Any]:
        # A PyTreeDef with custom nodes cannot be pickled, the trees that it describes can.
        with self.lock:
            state = self._attributes()
            state["_sources"] = [s.tree(v) for s, v in zip(self._sources, self._trees, strict=True)]
            return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        made = [make_source(tree) for tree in state["_sources"]]
        state["_sources"] = [source for source, _ in made]
        state["_trees"] = [[] if isinstance(s, ModuleSource) else values for s, values in made]
        vars(self).update(state)

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
        sizes = {n: getattr(v, "size", 0) for n, v in self.named_parameters()}
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            total = sum(sizes[n] for n in group["params"])
            lines.append(f"Parameter Group {i}")
            lines += [f"    {k}: {plain_value(v)}" for k, v in sorted(_values_of(group).items())]
            lines.append(f"    params: {len(group['params'])} arrays, {total:,} elements")
        if self.copied:
            lines.append(f"copied before steps, because held elsewhere: {self.copied} arrays")
        return "\n".join([*lines, ")"])

    def _repr_html_(self) -> str:
        """For Jupyter: what the groups hold, and how much."""
        values = dict(self.named_parameters())
        keys = list(dict.fromkeys(k for g in self.param_groups for k in _values_of(g)))
        head = "".join(f"<th>{html.escape(k)}</th>" for k in ["arrays", "elements", *keys])
        rows = []
        for group in self.param_groups:
            size = sum(values[n].size for n in group["params"])
            cells = [len(group["params"]), f"{size:,}"]
            cells += [plain_value(group.get(k, "")) for k in keys]
            rows.append("".join(f"<td>{html.escape(str(c))}</td>" for c in cells))
        total = sum(x.nbytes for x in jax.tree.leaves(self._state))
        body = "".join(f"<tr><td>{i}</td>{row}</tr>" for i, row in enumerate(rows))
        title = html.escape(type(self).__name__)
        return (
            f"<table><caption><code>{title}</code>: {len(self._names)} arrays, "
            f"{total:,} bytes of state</caption><tr><th>group</th>{head}</tr>{body}</table>"
        )


# --- helpers -------------------------------------------------------------------------------------


def _values_of(group: Mapping[str, Any]) -> dict[str, Any]:
    return normalize({k: v for k, v in group.items() if k != "params"})


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
