"""A training run as plain data: what every file format is read into and written from."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cerebras_jax.formats.matching import CLOCKS, Names, name_parameters, shape_of
from cerebras_jax.formats.state_dict import checked_layout
from cerebras_jax.messages import shown


@dataclasses.dataclass
class Run:
    """Parameters, optimizer states and the rest of a checkpoint, by parameter name.

    Attributes:
      params: name -> array, in the order of the file: all weights, also buffers and tied aliases
        that no group lists.
      states: name -> {state: array}; a scalar is an array of shape ().
      groups: dicts; ``"params"`` lists names, every other key is a value of that group.
      schedulers: the schedulers' state dicts, as the file has them.
      step: how many steps the run has made; None: the file does not say.
      extra: whatever else the file holds and can be read.
      unread: paths of what can not be read: objects that only their own code could restore.
      ordered: whether names stand in the order of the model that made the file, on which formats
        without names rely.
      rule: the algorithm that the states belong to, if it is known.

    >>> run = Run.of({"w": np.ones(2)}, {"state": {0: {"m": np.zeros(2)}}, "param_groups": [
    ...     {"lr": 0.1, "params": [0]}]})
    >>> run.groups, list(run.states)
    ([{'lr': 0.1, 'params': ['w']}], ['w'])
    >>> run.state_dict()["param_groups"]
    [{'lr': 0.1, 'params': [0], 'param_names': ['w']}]
    """

    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    states: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    groups: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    schedulers: list[Any] = dataclasses.field(default_factory=list)
    step: int | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    unread: list[str] = dataclasses.field(default_factory=list)
    ordered: bool = True
    rule: str | None = None

    @classmethod
    def of(
        cls,
        params: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] | None = None,
        schedulers: Iterable[Any] = (),
        step: Any = None,
        *,
        names: Names | None = None,
        ordered: bool = True,
        **rest: Any,
    ) -> "Run":
        """A run from a model's parameters and an optimizer's state dict.

        For a run that was made here: ``Run.of(dict(opt.named_parameters()), opt.state_dict(),
        step=n, ordered=False)``.

        Args:
          params: name -> array.
          optimizer: torch's layout: ``{"state": {0: ...}, "param_groups": [...]}``.
          schedulers: their state dicts.
          step: number of steps made.
          names: the parameters' names in the model's order, or one list for each group in the
            optimizer's order. Needed where neither ``param_names`` nor shapes tell which state
            belongs to which parameter.
          ordered: whether ``params`` is in the model's order.

        Raises:
          TypeError: if a part of ``optimizer`` is of another kind than in torch's layout.
          ValueError: if names cannot be told, or do not fit the shapes.
        """
        params = dict(params or {})
        step = None if step is None else int(_number("step", step))
        run = cls(params, schedulers=list(schedulers), step=step, ordered=ordered, **rest)
        if optimizer is None:
            return run
        groups, entries = checked_layout(optimizer)
        run.rule = optimizer.get("optimizer")
        state = {number: dict(entry) for number, entry in entries.items()}
        found = name_parameters(groups, state, params, names, ordered)
        for group, members in zip(groups, found, strict=True):
            values = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            run.groups.append({**values, "params": members})
            for name, i in zip(members, group["params"], strict=True):
                if i in state:
                    run.states[name] = state.pop(i)
                    for key in CLOCKS & set(run.states[name]):
                        _number(f"state {key!r} of parameter {name!r}", run.states[name][key])
        if state:
            raise ValueError(f"the optimizer has state for parameters {[*state][:5]} of no group")
        run.step = _common_step(run) if step is None else step
        return run if names is None else run._ordered_by(names)

    def _ordered_by(self, names: Names) -> "Run":
        """The parameters in the order of names that were given for reading."""
        flat = [n for part in names for n in ([part] if isinstance(part, str) else part)]
        _check_same("names", flat, self.trained, extra=self.params)
        order = dict.fromkeys([*(n for n in flat if n in self.params), *self.params])
        return dataclasses.replace(self, params={n: self.params[n] for n in order}, ordered=True)

    @property
    def trained(self) -> list[str]:
        """Names of the parameters that the groups list, in their order."""
        return [name for group in self.groups for name in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Groups and states in torch's layout with ``param_names``, for ``opt.load_state_dict``."""
        numbers = {name: i for i, name in enumerate(self.trained)}
        groups = [
            {
                **{k: v for k, v in group.items() if k != "params"},
                "params": [numbers[name] for name in group["params"]],
                "param_names": list(group["params"]),
            }
            for group in self.groups
        ]
        return {
            "state": {i: self.states[n] for n, i in numbers.items() if n in self.states},
            "param_groups": groups,
            **({} if self.rule is None else {"optimizer": self.rule}),
        }

    def tree(self) -> dict[str, Any]:
        """The parameters as nested dicts: ``"dense.kernel"`` under ``["dense"]["kernel"]``."""
        result: dict[str, Any] = {}
        for name, value in self.params.items():
            *path, last = name.split(".")
            node = result
            for part in path:
                node = node.setdefault(part, {})
                if not isinstance(node, dict):
                    raise ValueError(f"{name!r} lies inside of another parameter")
            if last in node:
                raise ValueError(f"other parameters lie inside of {name!r}")
            node[last] = value
        return result

    def in_order(self, names: Names | None = None) -> "Run":
        """The run with parameters and groups in the order of a model.

        Args:
          names: the names in the model's order, or one list for each group, which then are the
            groups; None: as they are.

        Raises:
          ValueError: if the run's own order is not a model's and ``names`` is None, if names are
            missing or unknown, or if values differ inside of a new group.
        """
        if names is None:
            if self.groups and not self.ordered:
                raise ValueError(
                    "the file tells parameters apart by their order in the model, and these are in "
                    "the order of a dict: names= must list them in the model's order "
                    "(of cerebras-jax convert: --target-names, a file with one name a line)"
                )
            return self
        run = self._ordered_by(names)
        if all(isinstance(n, str) for n in names):
            place = {name: i for i, name in enumerate(names)}
            groups = [
                {**group, "params": sorted(group["params"], key=place.__getitem__)}
                for group in self.groups
            ]
        else:
            groups = [self._group_of(list(members)) for members in names]
        return dataclasses.replace(run, groups=groups)

    def _group_of(self, members: list[str]) -> dict[str, Any]:
        old = {n: g for g in self.groups for n in g["params"]}
        if not members:
            return {**self.groups[-1], "params": []}
        values = {k: v for k, v in old[members[0]].items() if k != "params"}
        for name in members:
            for key in {*values, *old[name]} - {"params"}:
                mine: Any = old[name].get(key)
                first: Any = values.get(key)
                if not np.array_equal(mine, first):
                    raise ValueError(
                        f"{members[0]!r} and {name!r} cannot be in one group: {key} is {first!r} "
                        f"and {mine!r}"
                    )
        return {**values, "params": members}

    def check(self) -> None:
        """Refuses a run whose parts do not belong together.

        Raises:
          ValueError: if a name is in two groups, or has a state but is in no group, or if a state
            has not the shape of its parameter.
        """
        twice = [n for n, count in Counter(self.trained).items() if count > 1]
        if twice:
            raise ValueError(f"parameters {twice[:5]} are in more than one group")
        astray = sorted(set(self.states) - set(self.trained))
        if astray:
            raise ValueError(f"parameters {astray[:5]} have states, but no group lists them")
        for name, entry in self.states.items():
            shape = shape_of(entry)
            if name in self.params and shape not in (None, np.shape(self.params[name])):
                raise ValueError(
                    f"the states of {name!r} have shape {shape}, expected "
                    f"{np.shape(self.params[name])}"
                )


def _check_same(
    what: str, given: Sequence[str], needed: Sequence[str], extra: Iterable[str] = ()
) -> None:
    twice = [n for n, count in Counter(given).items() if count > 1]
    missing = [n for n in needed if n not in set(given)]
    unknown = [n for n in given if n not in {*needed, *extra}]
    if twice or missing or unknown:
        raise ValueError(
            f"{what} must list each parameter once: missing {missing[:5]}, unknown {unknown[:5]}, "
            f"twice {twice[:5]}"
        )


def _number(what: str, value: Any) -> float:
    """A number, or an array of one; 0 for None, which stands for a state that is not there yet."""
    try:
        number = 0.0 if value is None else float(np.asarray(value).item())
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{what} must be a number, got {shown(value)}") from None
    if not math.isfinite(number):
        raise ValueError(f"{what} must be finite, got {number}")
    return number


def _common_step(run: Run) -> int | None:
    """The step that all clocks show; None if there is none, or they differ."""
    steps = {int(np.asarray(e["step"])) for e in run.states.values() if e.get("step") is not None}
    return steps.pop() if len(steps) == 1 else None
