"""The other kinds of things in a checkpoint, and which of them an object is."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from cerebras_jax.checkpoint import tree as trees
from cerebras_jax.checkpoint.leaves import Leaves, Options, Place, Report, Target
from cerebras_jax.checkpoint.node import About, Arrays, LeavesNode, Node
from cerebras_jax.checkpoint.optimizer_node import OptimizerNode
from cerebras_jax.checkpoint.values import Text, is_array, is_plain, pack, shown_packed, unpack
from cerebras_jax.engine.trees import path_name
from cerebras_jax.messages import shown
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.optim.scheduler import Scheduler
from cerebras_jax.stateful import Stateful
from cerebras_jax.transforms.averages import Average

# --- by name --------------------------------------------------------------------------------------


class TreeNode(LeavesNode):
    """A pytree of arrays and plain values; restoring returns another."""

    def leaves(self) -> Leaves:
        found = trees.to_leaves(self.obj)
        for place, value in found.values.items():
            if not is_array(value) and not is_plain(value):
                where = f"{self.where}{place.path}".rstrip("/")
                is_sharding = isinstance(value, jax.sharding.Sharding)
                hint = "; restore into jax.ShapeDtypeStruct(..., sharding=...)" * is_sharding
                raise TypeError(
                    f"{where} can not be stored: it must be an array, a number or a string, got "
                    f"{shown(value)}{hint}"
                )
        return found

    def put(self, leaves: Leaves) -> Any:
        return trees.from_leaves(self.obj, leaves, self.where)

    def load(self, arrays: Mapping[str, Any]) -> None:
        super().load(arrays)
        assert self._new is not None
        self.put(self._new)  # it may still be refused

    def undo(self) -> None:
        pass


class ModuleNode(TreeNode):
    """All variables of an nnx module."""

    def __init__(self, obj: Any, where: str):
        # A map makes new variables; those of nnx.state are the module's own.
        super().__init__(jax.tree.map(lambda x: x, nnx.state(obj)), where)
        self.module = obj

    def commit(self) -> Any:
        nnx.update(self.module, super().commit())
        return self.module

    def undo(self) -> None:
        nnx.update(self.module, self.obj)


class AverageNode(LeavesNode):
    """An average of parameters, by the parameters' names."""

    def leaves(self) -> Leaves:
        state = self.obj.state_dict()
        params = {Place("params", name): x for name, x in state["params"].items()}
        counts = {Place("", name): state[name] for name in ("count", "n_averaged")}
        return Leaves(params | counts, {})

    def put(self, leaves: Leaves) -> Any:
        values = leaves.values
        params = {place.name: x for place, x in values.items() if place.folder == "params"}
        counts = {place.name: x for place, x in values.items() if not place.folder}
        self.obj.load_state_dict({**counts, "params": params})
        return self.obj


class StatefulNode(LeavesNode):
    """Any other `Stateful` object: its arrays, its numbers, and its public plain attributes."""

    def leaves(self) -> Leaves:
        with self.obj.lock:
            parts = self.obj.parts()
            values = dict(zip(self.obj.array_names(), parts.arrays, strict=True))
            values |= {f"numbers.{i}": x for i, x in enumerate(parts.numbers)}
        return Leaves({Place("", name): x for name, x in values.items()}, {})

    def about(self) -> About:
        return {"class": type(self.obj).__name__, "attributes": self._attributes()}

    def _attributes(self) -> dict[str, Any]:
        public = {k: v for k, v in vars(self.obj).items() if not k.startswith("_") and is_plain(v)}
        return {k: pack(v, k, None) for k, v in public.items()}

    def match(
        self, about: About, stored: Mapping[str, Target], options: Options, report: Report
    ) -> dict[str, Target]:
        self._set: dict[str, Any] = {}
        for name, mine in self._attributes().items():
            theirs = about.get("attributes", {}).get(name, mine)
            if theirs != mine and options.hyper == "saved":
                report.differs(f"{self.where}{name}", repr(mine), repr(theirs), took=True)
                self._set[name] = unpack(theirs, str)
        return super().match(about, stored, options, report)

    def commit(self) -> Any:
        self._before = {name: getattr(self.obj, name) for name in self._set}
        vars(self.obj).update(self._set)
        return super().commit()

    def undo(self) -> None:
        super().undo()
        vars(self.obj).update(self._before)

    def put(self, leaves: Leaves) -> Any:
        values = [*leaves.values.values()]
        with self.obj.lock:
            n = len(self.obj.parts().arrays)
            self.obj.restore(values[:n], values[n:])
        return self.obj


# --- as a whole -----------------------------------------------------------------------------------


class ValueNode(Node):
    """What gives and takes its state as one value: a scheduler, an iterator, a generator."""

    kind = "value"

    def __init__(self, obj: Any, where: str, get: Callable[[], Any], put: Callable[[Any], Any]):
        super().__init__(obj, where)
        self._get, self._put = get, put

    def record(self) -> tuple[About, Arrays]:
        arrays: Arrays = {}
        packed = pack(self._get(), "", arrays)
        return {"kind": self.kind, "class": type(self.obj).__name__, "state": packed}, arrays

    def match(
        self, about: About, stored: Mapping[str, Target], options: Options, report: Report
    ) -> dict[str, Target]:
        self._about, self._options = about, options
        self._old = self._get()
        if about["class"] != type(self.obj).__name__ and options.hyper == "saved":
            report.problems.append(
                f"{self.where[:-1]} was saved by {about['class']}, this is "
                f"{type(self.obj).__name__}{self._hint()}"
            )
        return dict(stored)

    def _hint(self) -> str:
        return ""

    def load(self, arrays: Mapping[str, Any]) -> None:
        self._new = unpack(self._about["state"], arrays.__getitem__)

    def commit(self) -> Any:
        self._put(self._new)
        return self.obj

    def undo(self) -> None:
        self._put(self._old)


class SchedulerNode(ValueNode):
    """A scheduler: its step, and its values; a schedule that is a function stays ours."""

    obj: Scheduler

    def __init__(self, obj: Scheduler, where: str):
        super().__init__(obj, where, obj.state_dict, obj.load_state_dict)

    def _hint(self) -> str:
        return ' (hyper="mine" puts ours to the step of the checkpoint)'

    def match(
        self, about: About, stored: Mapping[str, Target], options: Options, report: Report
    ) -> dict[str, Target]:
        wanted = super().match(about, stored, options, report)
        for group in self.obj.groups():
            report.scheduled.add((id(group), self.obj.key))
        theirs, ours = about["state"], pack(self._old, "", None)
        for key in theirs:
            if key in ("last_epoch", "_last_lr", "_schedulers") or theirs[key] == ours.get(key):
                continue
            took = options.hyper == "saved" and not isinstance(unpack(theirs[key], str), Text)
            mine, saved = shown_packed(ours.get(key)), shown_packed(theirs[key])
            report.differs(f"{self.where}{key}", mine, saved, took)
        return wanted

    def load(self, arrays: Mapping[str, Any]) -> None:
        super().load(arrays)
        if self._options.hyper == "mine":
            ours = {k: v for k, v in self._old.items() if k != "_last_lr"}
            self._new = {**ours, "last_epoch": self._new["last_epoch"]}
        self._new = _without_text(self._new)


def _without_text(value: Any) -> Any:
    """With None, as a state dict has it, in place of functions."""
    if isinstance(value, Text):
        return None
    if isinstance(value, dict):
        return {k: _without_text(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_text(v) for v in value)
    return value


# --- which kind -----------------------------------------------------------------------------------


_PROTOCOLS = (("get_state", "set_state"), ("state_dict", "load_state_dict"))


def _has_node(x: Any) -> bool:
    """Whether a state of its own makes an object a node."""
    return isinstance(x, Stateful | nnx.Module | np.random.Generator) or any(
        callable(getattr(x, get, None)) and callable(getattr(x, put, None))
        for get, put in _PROTOCOLS
    )


def node_of(x: Any, where: str) -> Node:
    """The node of an object with a state of its own."""
    if isinstance(x, Optimizer):
        return OptimizerNode(x, where)
    if isinstance(x, Scheduler):
        return SchedulerNode(x, where)
    if isinstance(x, Average):
        return AverageNode(x, where)
    if isinstance(x, nnx.Module):
        return ModuleNode(x, where)
    if isinstance(x, np.random.Generator):
        bits: Any = x.bit_generator
        return ValueNode(x, where, lambda: bits.state, lambda state: setattr(bits, "state", state))
    for get, put in _PROTOCOLS:
        if callable(getattr(x, get, None)) and callable(getattr(x, put, None)):
            return ValueNode(x, where, getattr(x, get), getattr(x, put))
    return StatefulNode(x, where)


class Nodes:
    """An object as one or several nodes, by path: containers may hold some, arrays, or both.

    Attributes:
      by_path: what there is; the tree of arrays, if any, has the path "".
    """

    def __init__(self, name: str, obj: Any):
        self.by_path: dict[str, Node] = {}
        if _has_node(obj):
            self._treedef = None
            self.by_path[""] = node_of(obj, f"{name}/")
            return
        found, self._treedef = jax.tree_util.tree_flatten_with_path(obj, is_leaf=_has_node)
        self._paths = [path_name(path) if _has_node(x) else None for path, x in found]
        for (_, x), path in zip(found, self._paths, strict=True):
            if path is not None:
                self.by_path[path] = node_of(x, f"{name}/{path}/")
        if not self.by_path or None in self._paths:
            rest = self._treedef.unflatten([None if _has_node(x) else x for _, x in found])
            self.by_path[""] = TreeNode(rest, f"{name}/")

    def assemble(self, new: Mapping[str, Any]) -> Any:
        """The object with what its nodes became."""
        if self._treedef is None:
            return new[""]
        remaining = iter(jax.tree.leaves(new.get("")))
        return self._treedef.unflatten(
            [next(remaining) if path is None else new[path] for path in self._paths]
        )
