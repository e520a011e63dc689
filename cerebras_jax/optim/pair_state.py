"""The state of an optimizer as the leaves of an optax state, seen by parameter and name."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from cerebras_jax.checks import is_number
from cerebras_jax.engine import rounding
from cerebras_jax.engine.hyper import normalize, saturating_increment
from cerebras_jax.engine.memory import on_device
from cerebras_jax.engine.placement import Placement, Placements, beside, in_place_of
from cerebras_jax.engine.state_memory import StateMemory, in_memory
from cerebras_jax.formats import pytorch as torch_format
from cerebras_jax.formats.state_dict import load_known, load_shared
from cerebras_jax.optim import clocks, entries, numbers
from cerebras_jax.optim.entries import Catalogue, NamedState, StateView
from cerebras_jax.optim.guarding import Guard
from cerebras_jax.optim.makers import Maker, RuleMaker
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.stateful import Fill, Memento, Slot
from cerebras_jax.transforms.spikes import SkipSpikes
from cerebras_jax.types import Array


class PairOptimizer(Optimizer):
    """An optimizer whose state is that of an optax pair; `ShellOptimizer` steps it."""

    maker: ClassVar[Maker]
    counts_steps: ClassVar[bool] = False
    states_to_sparsify: ClassVar[tuple[str, ...]] = ()
    transient = (*Optimizer.transient, "_cache", "_where")
    special = Optimizer.special | {
        *("_state", "_structure", "_groups", "_same", "_checked", "_keys", "_fitted"),
        "defaults",
    }

    _state: list[Array]
    _structure: Any  # of the state
    _groups: tuple[tuple[str, ...], ...]  # the members that the state was made for
    _same: Any  # per group, see `clocks`; None: not known
    _checked: list[dict[str, Any]]  # the groups' values when they were last checked
    _keys: list[tuple[str, ...]]  # and their keys
    _fitted: Guard  # what the state was made for

    pack: int  # see `makers.How`
    skip_nonfinite: bool
    skip_spikes: SkipSpikes | None
    measure_gradients: bool
    measure_norms: bool | Sequence[str]
    state_memory: StateMemory = None
    zero_axis: str | None = None

    def _hyper(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return normalize({name: group[name] for name in self.defaults})

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

    def _members(self) -> tuple[tuple[str, ...], ...]:
        """Per group, for each entry of its clocks, in their order, the parameter that it is of.

        Of parameters that are packed together it is the first.
        """
        order = {name: i for i, name in enumerate(self._names)}
        groups = [sorted(group, key=order.__getitem__) for group in self._groups]
        if not self.pack:
            return tuple(map(tuple, groups))
        of = self._catalogue().of
        rows = [{of[name]["step"].row or 0: name for name in reversed(group)} for group in groups]
        return tuple(tuple(mine[row] for row in sorted(mine)) for mine in rows)

    def set_parameter(self, name: str, value: Array) -> None:
        """See `Optimizer.set_parameter`; with ``rounding="exact"`` no bit of a float32 is lost.

        A bfloat16 value then is all there is of a parameter, and elements that have it already
        stay: set parameters before `load_state_dict`, which brings the bits that they lack.
        """
        with self.lock:
            place = self._catalogue().of.get(name, {}).get(entries.LOW_BITS)
            if place is None:
                return super().set_parameter(name, value)
            value, old = jnp.asarray(value), self._value_of(name)
            is_whole = value.dtype != old.dtype
            top, low = rounding.split(value.astype(jnp.float32))
            super().set_parameter(name, top)
            kept = entries.read(self._state, {entries.LOW_BITS: place}, {})[entries.LOW_BITS]
            low = low if is_whole else jnp.where(top == old, on_device(kept), low)
            self._set_entries({name: {entries.LOW_BITS: low}})

    def full_precision(self) -> Any:
        """The parameters as float32 where ``rounding="exact"`` keeps what bfloat16 cannot."""
        with self.lock:
            leaves, host = [], {}
            for name, p in self.named_parameters():
                places = self._catalogue().of[name]
                mine = {k: v for k, v in places.items() if k == entries.LOW_BITS}
                low = entries.read(self._state, mine, host).get(entries.LOW_BITS)
                leaves.append(p if low is None else rounding.join(p, on_device(low)))
            return self._treedef().unflatten(leaves)

    # --- state -------------------------------------------------------------------------------

    @property
    def _is_sparse(self) -> bool:
        """Hook: whether there are masks in the state, around the groups."""
        return False

    def _kept_state(self) -> Any:
        return self._full_entries(), self._shared(), self._seen(), self._checked

    def _take_state(self, state: Any) -> None:
        """Sets the state; what lies nowhere goes beside the parameters, each in its memory."""
        state = beside(state, self._home())
        params = self._treedef().unflatten(self._values())
        state = in_memory(state, params, self.state_memory)
        self._state, self._structure = jax.tree.flatten(state)

    def _settle(self) -> tuple[Sharding | None, Placement]:
        """Where numbers lie, and where the arrays stay; what lay nowhere lies beside the others."""
        placements: Placements = vars(self).setdefault("_where", Placements())
        (state, params), home, placement = placements.settle(
            self._state, self._values(), names=lambda: [*self._state_names(), *self._names]
        )
        if state is not self._state:
            self._state = state
            self._set_values(params)
        return home, placement

    def _allocate(self, kept: Any = None) -> None:
        self._state = []
        self.preinitialize()
        if kept is not None:
            entries, shared, seen, checked = kept
            self._checked[: len(checked)] = checked
            self._set_entries(entries)
            self._set_shared(shared, seen)

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
        before = Memento(self)
        try:
            self._allocate(self._kept_state())
        except BaseException:
            before.undo()
            raise

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
                self._fitted,
                self._is_sparse,
            )
        return cache["catalogue"]

    def state_names_to_sparsify(self) -> list[str]:
        """Names of the states that a sparsity mask of the parameter applies to."""
        return list(self.states_to_sparsify)

    @property
    def state(self) -> Mapping[str, Mapping[str, Any]]:
        """A read-only view: per parameter name, the states by name. See `visit_state`."""
        with self.lock:
            self.note_use()
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

    def _mask_keys(self) -> tuple[str, ...]:
        """The names of states that are masks of ours; a pair may call one of its own so."""
        return (entries.MASK,) if self._is_sparse else ()

    def _entries(self) -> dict[str, dict[str, Any]]:
        return entries.without(self.state, *self._mask_keys())

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

    def _seen(self) -> dict[str, Any]:
        """What watches over the steps, by name."""
        return entries.read(self._state, self._catalogue().guard, {})

    def _set_shared(self, shared: Mapping[str, Any], seen: Mapping[str, Any]) -> None:
        known = self._catalogue()
        for places, values in ((known.shared, shared), (known.guard, seen)):
            for path in places.keys() & values.keys():
                leaf = places[path].leaf
                self._state[leaf] = in_place_of(self._state[leaf], values[path])

    def _check_new_attribute(self, name: str) -> None:
        super()._check_new_attribute(name)
        if vars(self).get("_structure") is not None and name in self.defaults:
            raise AttributeError(
                f"{name} is a value of the parameter groups: set param_groups[i][{name!r}]"
            )

    def named_state(self) -> NamedState:
        """See `Optimizer.named_state`."""
        with self.lock:
            self._regroup()
            found = entries.named(self._state, self._catalogue())
            shared = found.shared | super().named_state().shared
            return found._replace(shared=shared, guard=self._seen())

    def _check_named_state(self, state: NamedState) -> None:
        self._check_entries(self._entries_of(state))

    def _entries_of(self, state: NamedState) -> dict[str, dict[str, Any]]:
        clocks = state.clocks.items()
        return {
            name: {
                **state.states.get(name, {}),
                **{key: named[name] for key, named in clocks if name in named},
            }
            for name in self._catalogue().of
        }

    def _set_named_state(self, state: NamedState) -> None:
        known = self._catalogue()
        self._set_entries(self._entries_of(state))
        shared = {k: v for k, v in state.shared.items() if k in known.shared}
        self._set_shared(shared, state.guard)
        attributes = [v for k, v in state.shared.items() if k not in known.shared]
        self._refill(Fill(iter(attributes), None))

    def _increment(self, name: str) -> Array:
        place = self._catalogue().of[name].get("step")
        if place is None or place.row is None:
            raise RuntimeError(f"{type(self).__name__} does not count steps of its own")
        if any(x.part is not None for x in self._catalogue().of[name].values()):
            raise RuntimeError(f"parameter {name!r} is packed, and shares its step count (pack=)")
        count = self._state[place.leaf]
        new = saturating_increment(count[place.row])
        self._state[place.leaf] = count.at[place.row].set(new)
        self._same = None
        return new

    # --- state dicts -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See `Optimizer.state_dict`.

        The states of wrappers are under ``"around"``, by path; what was measured and skipped is
        under ``"guard"``, which is taken over as far as both sides have it.
        """
        with self.lock:
            result = super().state_dict()
            more = {"around": self._shared(), "guard": self._seen()}
            return {**result, **{k: v for k, v in more.items() if v}}

    def _load_shared(self, state_dict: Mapping[str, Any]) -> None:
        seen = load_known(state_dict.get("guard"), self._seen())
        self._set_shared(load_shared(state_dict.get("around"), self._shared()), seen)

    def _import_group(self, group: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
        return torch_format.import_group(self._dialect(), group, self.defaults, ours)

    def _import_state(self, entry: Any, group: Mapping[str, Any], ours: Mapping[str, Any]) -> Any:
        if entry is None:
            return None
        entry = torch_format.import_state(self._dialect(), entry, group)
        if not self._stores_step(group) and "step" in ours:
            entry.setdefault("step", ours["step"])
        return entry

    def _complete(
        self, loaded: dict[str, Any], ours: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        completed = entries.with_our_low_bits(loaded, ours)
        self._check_entries({n: {**ours[n], **(entry or {})} for n, entry in completed.items()})
        return completed

    def _check_entries(self, given: Mapping[str, Mapping[str, Any]]) -> None:
        entries.check_shared(self._catalogue(), given)

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
            mine = entries.without(self._full_entries(), entries.LOW_BITS, *self._mask_keys())
            return torch_format.to_torch_state_dict(self._dialect(), self.param_groups, mine, names)

    # --- the parts that change, for jit and trace ------------------------------------------------

    def hints(self) -> Any:
        """See `Stateful`: which parameters are known to have equal clocks."""
        if self._same is None:  # after loading: a resumed run has the program of the one before
            self._same = clocks.known(self._members(), self._catalogue().of, self._state)
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
                is_own = place.row is None and place.part is None
                names[place.leaf] = f"{name}.{key}" if is_own else key
        for path, place in catalogue.shared.items():
            names[place.leaf] = path
        for path, place in catalogue.guard.items():
            names[place.leaf] = f"guard.{path}"
        for path, place in catalogue.norms.items():
            names[place.leaf] = f"norms.{path}"
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
        super().__setstate__(state)
        self._take_state(state["_state"])  # NumPy, and so pickle, knows no memories


# --- helpers -------------------------------------------------------------------------------------


def _is_any_number(key: str, value: Any) -> bool:
    return is_number(value) or isinstance(value, Slot)


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """The shape of a leaf; a map over an optimizer may have put anything in its place."""
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    return jax.ShapeDtypeStruct(shape or (), jnp.float32 if dtype is None else dtype)
