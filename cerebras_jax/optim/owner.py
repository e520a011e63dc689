"""What an optimizer owns: parameters in groups; and how it comes apart for jit and trace."""

import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from cerebras_jax.checks import is_traced
from cerebras_jax.donation import Donor
from cerebras_jax.engine.hyper import normalize
from cerebras_jax.engine.placement import home_of, in_place_of
from cerebras_jax.formats.state_dict import check_keys
from cerebras_jax.optim import numbers as group_numbers
from cerebras_jax.optim.guarding import BOUNDS, SETTINGS, check_setting
from cerebras_jax.optim.numbers import as_argument
from cerebras_jax.optim.param_groups import ParamGroups, is_group_list
from cerebras_jax.optim.selection import frozen_leaves
from cerebras_jax.optim.sources import ModuleSource, Source, TreeSource, make_source
from cerebras_jax.stateful import OUTSIDE, Fill, Memento, Parts, Stateful, freeze
from cerebras_jax.types import Array


class Owner(Stateful):
    """Parameters in groups, and bounds of their gradients: the base of `Optimizer`.

    Args:
      params: see `Optimizer`.
      defaults: names and values of the hyper-parameters.
      donate: see `cerebras_jax.donation`.
    """

    transient: ClassVar[tuple[str, ...]] = (*Stateful.transient, "_index", "_donor", "_splits")
    special: ClassVar[frozenset[str]] = frozenset(
        {"param_groups", "_sources", "_trees", "_frozen", "_names", "_live"}
        | {"_was_stepped", "_was_scheduled"}
    ) | frozenset(BOUNDS)  # attributes that `parts` takes apart by itself

    settings: ClassVar[tuple[str, ...]] = BOUNDS
    """Of `SETTINGS`, those that this class acts on."""

    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]

    def __init__(self, params: Any, defaults: Mapping[str, Any] | None, donate: Any):
        self.defaults = normalize(dict(defaults or {}))
        self.max_gradient_norm: float | None = None
        self.max_gradient_value: float | None = None
        self.param_groups = []
        self.donate = donate
        self._donor = Donor(donate)
        self._sources: list[Source] = []
        self._trees: list[list[Array]] = []  # the values of each source that is no module
        self._frozen: list[list[Any]] = []  # its other leaves
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

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.settings:
            check_setting(name, value)
        elif name in SETTINGS:
            raise AttributeError(
                f"{type(self).__name__} does not act on {name}: it has a step of its own, and only "
                "classes made of a pure optimizer do (Optimizer.of, optimizer_of)"
            )
        elif not (name.startswith("_") or name in vars(self) or hasattr(type(self), name)):
            self._check_new_attribute(name)
        super().__setattr__(name, value)

    def _check_new_attribute(self, name: str) -> None:
        """Refuses names that are nearly those of a setting."""
        near = difflib.get_close_matches(name, self.settings, 1, 0.75)
        if near:
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}; did you mean {near[0]!r}?"
            )

    @property
    def params(self) -> Any:
        """The current values, in the structure that was given; a module is the module itself.

        A step reuses the buffers of the old values, except of those that somebody still holds:
        they are copied first. So ``grad(opt.params)`` costs nothing, and a tree that is kept
        stays valid.

        It is a new tree each time: ``opt.params["w"] = x`` changes that tree, not the optimizer,
        which ``opt.set_parameter("w", x)`` does.
        """
        with self.lock:
            self.note_use()
            trees = [s.tree(v) for s, v in zip(self._sources, self._leaves(), strict=True)]
        return trees[0] if self._is_one_tree() else trees

    @params.setter
    def params(self, value: Any) -> None:
        raise AttributeError(
            f"params of {type(self).__name__} cannot be set; set_parameter(name, value) replaces "
            "one of them"
        )

    @property
    def copied(self) -> int:
        """How many arrays steps had to copy so far, because something else still held them."""
        return self._the_donor().copied

    def _the_donor(self) -> Donor:
        donor = vars(self).get("_donor")
        if donor is None or donor.donate is not self.donate:
            donor = self._donor = Donor(self.donate)
        return donor

    def _leaves(self) -> list[list[Any]]:
        """The leaves of each source's tree: those that are trained, then the frozen ones."""
        return [[*mine, *rest] for mine, rest in zip(self._trees, self._frozen, strict=True)]

    def _home(self) -> Sharding | None:
        """Where what belongs to no parameter in particular lies; None: nowhere."""
        return home_of(self._values())

    def _is_one_tree(self) -> bool:
        return len(self._sources) == 1 and not self._structured_as_list

    def named_parameters(self) -> list[tuple[str, Array]]:
        """Dotted names and current values of all parameters."""
        with self.lock:
            self.note_use()
            return list(zip(self._names, self._values(), strict=True))

    def set_parameter(self, name: str, value: Array) -> None:
        """Replaces one parameter's value by another of its shape, in its dtype.

        It lies where the old one does, unless it was put elsewhere with `jax.device_put`.

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
            given = value if isinstance(value, jax.Array) else np.asarray(value)
            value = jnp.asarray(in_place_of(old, given), old.dtype)
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
        self._frozen = [*self._frozen, frozen_leaves(tree)]
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

    def _value_of(self, name: str) -> Array:
        source, i = self._place(name)
        return self._source_values(source)[i]

    def _align(self, grads: Any) -> list[Any]:
        if self._is_one_tree():
            return self._sources[0].align(grads)
        if not isinstance(grads, list | tuple) or len(grads) != len(self._sources):
            raise ValueError(
                f"the gradients must be a list of {len(self._sources)} trees, like the parameters"
            )
        pairs = zip(self._sources, grads, strict=True)
        return [g for source, tree in pairs for g in source.align(tree)]

    def modules(self) -> list[nnx.Module]:
        """The nnx modules whose parameters this optimizer updates in place."""
        return [s.module for s in self._sources if isinstance(s, ModuleSource)]

    def _kept_state(self) -> Any:
        """The state in a form that stays when parameters are added."""

    def _allocate(self, kept: Any = None) -> None:
        """Hook: makes the state anew; that of parameters which is in ``kept`` stays."""

    # --- the parts that change, for jit and trace ------------------------------------------------

    def parts(self) -> Parts:
        """See `Stateful`: arrays are parameters and states; numbers, those of the groups.

        Frozen arrays count as numbers: no step gives them away.
        """
        lists = self._array_lists()
        arrays: list[Any] = [x for values in lists for x in values]
        refs: list[Any] = self.modules()
        numbers, groups = self._split_groups()
        bounds = [getattr(self, name) for name in BOUNDS]
        numbers += [x for x in bounds if x is not None]
        frozen = freeze(self._frozen, numbers, [])
        static = (
            type(self),
            groups,
            tuple(map(len, lists)),
            tuple(x is None for x in bounds),
            tuple(s.key for s in self._sources),
            frozen,
            *self._hashables(),
            freeze(self._rest(), arrays, refs),
        )
        return Parts(arrays, numbers, static, refs)

    def refs(self) -> list[Any]:
        """See `Stateful`."""
        refs: list[Any] = self.modules()
        freeze(self._rest(), [], refs)
        return refs

    def restore(self, arrays: list[Any], numbers: list[Any], refs: list[Any] | None = None) -> None:
        """See `Stateful`."""
        remaining, values = iter(arrays), iter(numbers)
        modules = None if refs is None else iter(refs)
        for target in self._array_lists():
            target[:] = itertools.islice(remaining, len(target))
        if modules is not None:
            self._sources = [
                s if isinstance(s, TreeSource) else s.on(next(modules)) for s in self._sources
            ]
        for group, mark in zip(self.param_groups, self._split_groups()[1], strict=True):
            group.update(group_numbers.join(values, mark[1]))
        for name in BOUNDS:
            if getattr(self, name) is not None:
                vars(self)[name] = next(values)
        Fill(values, None)(self._frozen)
        self._refill(Fill(remaining, modules))

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

    def _split_groups(self) -> tuple[list[Any], tuple]:
        """The groups' numbers, and a hashable value made of the rest."""
        numbers: list[Any] = []
        static = []
        for i, group in enumerate(self.param_groups):
            values = {k: v for k, v in group.items() if k != "params"}
            mine, marks = self._split(i, values)
            numbers += mine
            static.append((tuple(group["params"]), marks))
        return numbers, tuple(static)

    def _split(self, i: int, values: Mapping[str, Any]) -> tuple[list[Any], tuple]:
        """The numbers among values of group ``i``, and a hashable value made of the rest.

        A number that was an argument once stays one, so that a zero is no new program.
        """
        splits = vars(self).setdefault("_splits", group_numbers.Splits())
        return splits.split(i, values, self._live, lambda key, v: self._is_live(i, key, v))

    def _is_live(self, i: int, key: str, value: Any) -> bool:
        return group_numbers.is_live(key, value, (i, key) in self._live)

    def as_arguments(self, numbers: list[Any], home: Sharding | None = None) -> list[Any]:
        """See `Stateful`."""
        frozen: list[Any] = []
        freeze(self._frozen, frozen, [])
        n = len(numbers) - len(frozen)
        return [*(as_argument(x, home) for x in numbers[:n]), *numbers[n:]]

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

    @property
    def took_step(self) -> Any:
        """Whether the last step was taken: True, or an array where steps may be left out."""
        return True

    def schedule_value(self, i: int, key: str) -> None:
        """Says that a value of group ``i`` will change, so that its zero is an argument too."""
        self._live.add((i, key))

    def __getstate__(self) -> dict[str, Any]:
        # A PyTreeDef with custom nodes cannot be pickled, the trees that it describes can.
        with self.lock:
            state = self._attributes()
            pairs = zip(self._sources, self._leaves(), strict=True)
            state["_sources"] = [s.given(v) for s, v in pairs]
            return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        made = [make_source(tree) for tree in state["_sources"]]
        state["_sources"] = [source for source, _ in made]
        state["_trees"] = [[] if isinstance(s, ModuleSource) else values for s, values in made]
        vars(self).update(state)
