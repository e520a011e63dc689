"""An optimizer in a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from cerebras_jax.checkpoint.leaves import OPTIONAL, Leaves, Options, Place, Report, Target
from cerebras_jax.checkpoint.node import About, LeavesNode
from cerebras_jax.checkpoint.values import Text, pack, shown_packed, unpack
from cerebras_jax.formats.state_dict import other_rule
from cerebras_jax.messages import shown
from cerebras_jax.optim.entries import NamedState
from cerebras_jax.optim.optimizer import Optimizer


class OptimizerNode(LeavesNode):
    """An optimizer: parameters, states, clocks, wrappers' states, and what is in its groups."""

    obj: Optimizer

    def leaves(self) -> Leaves:
        with self.obj.lock:
            state = self.obj.named_state()
            values = {Place("params", name): x for name, x in self.obj.named_parameters()}
        for name, entry in state.states.items():
            values |= {Place(f"state/{key}", name): x for key, x in entry.items()}
        values |= {Place("around", path): x for path, x in state.shared.items()}
        values |= {Place(OPTIONAL, name): x for name, x in state.guard.items()}
        return Leaves(values, {f"clock/{key}": dict(x) for key, x in state.clocks.items()})

    def about(self) -> About:
        return {
            "rule": self.obj.rule_name,
            "groups": [
                {"params": list(group["params"]), "values": _packed(group)}
                for group in self.obj.param_groups
            ],
            "bounds": {name: pack(getattr(self.obj, name), name, None) for name in _BOUNDS},
        }

    def match(
        self, about: About, stored: Mapping[str, Target], options: Options, report: Report
    ) -> dict[str, Target]:
        where = self.where[:-1]
        if problem := other_rule(where, about.get("rule"), self.obj.rule_name):
            report.problems.append(
                f"{problem}; the parameters alone can be restored into a tree, as "
                f"{where}={{'params': opt.params}}"
            )
            return {}
        wanted = super().match(about, stored, options, report)
        self._groups = [_values(group) for group in self.obj.param_groups]
        self._scheduled: list[tuple[int, str]] = []  # left to a scheduler
        self._bounds = {name: getattr(self.obj, name) for name in _BOUNDS}
        self._before = [dict(group) for group in self._groups], dict(self._bounds)
        if "groups" in about:
            self._match_groups(about, options, report)
        return wanted

    def _match_groups(self, about: About, options: Options, report: Report) -> None:
        group_of = {
            options.rename(name): group["values"]
            for group in about["groups"]
            for name in group["params"]
        }
        for i, mine in enumerate(self.obj.param_groups):
            sources = [group_of[name] for name in mine["params"] if name in group_of]
            ours, where = _packed(mine), f"{self.where}param_groups[{i}]"
            for key in dict.fromkeys([*ours, *(k for source in sources for k in source)]):
                theirs = [source[key] for source in sources if key in source]
                if (id(mine), key) in report.scheduled:
                    is_one = bool(theirs) and all(x == theirs[0] for x in theirs)
                    if not (options.hyper == "saved" and is_one and self._take(i, key, theirs[0])):
                        self._scheduled.append((i, key))
                    continue
                if not theirs:
                    continue
                if any(x != theirs[0] for x in theirs):
                    if options.hyper == "saved":
                        report.problems.append(
                            f"{where} joins parameters for which {key} is {shown(theirs[0])} and "
                            f'others in the checkpoint (hyper="mine" keeps ours)'
                        )
                    continue
                if theirs[0] == ours.get(key):
                    continue
                mine, saved = shown_packed(ours.get(key)), shown_packed(theirs[0])
                took = options.hyper == "saved" and self._take(i, key, theirs[0])
                report.differs(f"{where}.{key}", mine, saved, took)
        for name, mine in self._bounds.items():
            theirs = about["bounds"].get(name)
            if theirs != pack(mine, name, None):
                took = options.hyper == "saved"
                report.differs(f"{self.where}{name}", repr(mine), shown_packed(theirs), took)
                if took:
                    self._bounds[name] = unpack(theirs, str)

    def _take(self, i: int, key: str, packed: Any) -> bool:
        """Takes a saved value over, if it is one, and ours is one."""
        new, mine = unpack(packed, str), self._groups[i].get(key)
        is_program = any(
            callable(x) or isinstance(x, Text)
            for value in (new, mine)
            for x in jax.tree.leaves(value, is_leaf=callable)
        )
        if not is_program:
            self._groups[i][key] = new
        return not is_program

    def commit(self) -> Any:
        for name, value in self._bounds.items():
            setattr(self.obj, name, value)
        return super().commit()

    def put(self, leaves: Leaves) -> Any:
        for i, key in self._scheduled:  # the scheduler has written by now
            self._groups[i][key] = self.obj.param_groups[i][key]
        return self._replace(leaves, self._groups)

    def undo(self) -> None:
        groups, bounds = self._before
        for name, value in bounds.items():
            setattr(self.obj, name, value)
        assert self._old is not None
        self._replace(self._old, groups)

    def _replace(self, leaves: Leaves, groups: Sequence[Mapping[str, Any]]) -> Any:
        params, shared, guard = {}, {}, {}
        states: dict[str, dict[str, Any]] = {}
        for (folder, name), value in leaves.values.items():
            if folder == "params":
                params[name] = value
            elif folder == "around":
                shared[name] = value
            elif folder == OPTIONAL:
                guard[name] = value
            else:
                states.setdefault(name, {})[folder.removeprefix("state/")] = value
        clocks = {folder.removeprefix("clock/"): x for folder, x in leaves.clocks.items()}
        self.obj.take_over(params, NamedState(states, clocks, shared, guard), groups)
        return self.obj


_BOUNDS = ("max_gradient_norm", "max_gradient_value")


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k != "params"}


def _packed(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: pack(v, k, None) for k, v in _values(group).items()}
