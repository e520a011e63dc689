"""One table of rules from the names of one model to those of another, for weights and states.

A rule is ``(pattern, replacement, transform, ndim)``: a regular expression that matches a whole
name, what the name becomes, what becomes of the array, and optionally for which rank. The first
rule that matches wins. Every name must match one, and no two may become the same, so that a table
is one-to-one, and a plan can be undone.

What happens to a parameter happens to its states: those of its shape are transformed alike, scalars
follow, and of Adafactor's row and column each becomes the other where the parameter is transposed.

Transforms:
  * ``"transpose"`` of a matrix, ``{"transpose": axes}`` of any array
  * ``{"reshape": shape}``
  * ``{"split": axis}``: equal parts, for which the replacement lists names;
    ``{"split": {"axis": axis, "sizes": sizes}}``: parts of these sizes
  * ``"stack"``: arrays that differ in the pattern's group ``(?P<layer>\\d+)`` become one, with the
    layer as axis 0
  * a list of them, of which only the last may split or stack

>>> from cerebras_jax.formats.run import Run
>>> run = Run({"layers.0.weight": np.ones((3, 2)), "layers.1.weight": np.ones((3, 2))})
>>> rules = [(r"layers\\.(?P<layer>\\d+)\\.weight", "layers.kernel", ["transpose", "stack"])]
>>> renamed = plan(run, rules).apply(run)
>>> renamed.params["layers.kernel"].shape
(2, 2, 3)
>>> plan(run, rules).inverse().apply(renamed).params["layers.1.weight"].shape
(3, 2)
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from cerebras_jax.formats.matching import CLOCKS, FACTORS, Shape, shape_of
from cerebras_jax.formats.operations import Arrays, Operation, Stack, operation
from cerebras_jax.formats.run import Run

Rule: TypeAlias = Sequence[Any]
"""``(pattern, replacement, transform, ndim)``; the last two may be left out."""

TORCH_TO_FLAX: tuple[Rule, ...] = (
    (r"(.*\.)?([^.]*(?:emb|wte|wpe)[^.]*)\.weight", r"\1\2.embedding", None, 2),
    (r"(.*\.)?weight", r"\1scale", None, 1),
    (r"(.*\.)?weight", r"\1kernel", "transpose", 2),
    (r"(.*\.)?weight", r"\1kernel", {"transpose": (2, 1, 0)}, 3),
    (r"(.*\.)?weight", r"\1kernel", {"transpose": (2, 3, 1, 0)}, 4),
    (r"(.*)", r"\1"),
)
"""torch.nn's Embedding, LayerNorm, Linear, Conv1d and Conv2d as flax has them."""


def plan(run: Run, rules: Iterable[Rule], ordered: bool | None = None) -> "Renaming":
    """What a table of rules does to the names of a run.

    Args:
      run: its parameters' names and shapes count, or those of its states if it has no parameters.
      rules: see above; a replacement of None leaves the array out.
      ordered: whether the result of `Renaming.inverse` is in a model's order; by default whether
        the run is.

    Raises:
      ValueError: if a rule is malformed, a name matches none, or two names become one.
    """
    shapes: dict[str, Shape | None] = {name: np.shape(p) for name, p in run.params.items()}
    shapes = {**{n: shape_of(run.states.get(n, {})) for n in run.trained}, **shapes}
    if run.params:
        shapes = {n: shapes[n] for n in dict.fromkeys([*run.params, *run.trained])}
    table = [_Rule.of(i, rule) for i, rule in enumerate(rules)]
    links: dict[Any, Link] = {}
    layers: dict[Any, dict[int, str]] = {}
    dropped, unmatched = [], []
    for name, shape in shapes.items():
        rule, match = next(((r, m) for r in table if (m := r.match(name, shape))), (None, None))
        if rule is None or match is None:
            unmatched.append(name)
        elif rule.targets is None:
            dropped.append(name)
        else:
            targets = tuple(match.expand(t) for t in rule.targets)
            if rule.stacks:
                members = layers.setdefault((rule.number, targets), {})
                layer = int(match["layer"])
                if members.setdefault(layer, name) != name:
                    both = f"{members[layer]!r} and {name!r}"
                    raise ValueError(f"{both} both become layer {layer} of {targets[0]!r}")
                links.setdefault((rule.number, targets), Link((), targets, ()))
            else:
                links[name] = Link((name,), targets, rule.operations(shape, len(targets)))
    if unmatched:
        raise ValueError(f"no rule matches {unmatched[:5]}; (r'(.*)', r'\\1') would keep a name")
    by_number = {rule.number: rule for rule in table}
    for key, members in layers.items():
        if sorted(members) != list(range(len(members))):
            raise ValueError(f"{key[1][0]!r} would be a stack of the layers {sorted(members)}")
        names = tuple(members[i] for i in range(len(members)))
        if len({shapes[n] for n in names}) > 1:
            raise ValueError(f"{names[0]!r} ... have several shapes and cannot be stacked")
        operations = by_number[key[0]].operations(shapes[names[0]], 1)
        links[key] = Link(names, key[1], (*operations, Stack(len(names))))
    seen: dict[str, str] = {}
    for link in links.values():
        for target in link.targets:
            if seen.setdefault(target, link.sources[0]) != link.sources[0] or (
                link.targets.count(target) > 1
            ):
                raise ValueError(f"{seen[target]!r} and {link.sources[0]!r} both become {target!r}")
    ordered = run.ordered if ordered is None else ordered
    return Renaming(tuple(links.values()), tuple(dropped), ordered)


@dataclasses.dataclass(frozen=True)
class Link:
    """Some arrays of one model and what becomes of them in the other."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[Operation, ...]

    def inverse(self) -> "Link":
        operations = tuple(op.inverse() for op in reversed(self.operations))
        return Link(self.targets, self.sources, operations)


@dataclasses.dataclass(frozen=True)
class Renaming:
    """A plan: names of one model, what they become, and how.

    Attributes:
      links: in the order of the model that was planned for.
      dropped: names that are left out.
      ordered: whether that order is a model's, on which files without names rely.
    """

    links: tuple[Link, ...]
    dropped: tuple[str, ...] = ()
    ordered: bool = False

    def inverse(self) -> "Renaming":
        """The way back; what was dropped stays away."""
        return Renaming(tuple(link.inverse() for link in self.links), (), self.ordered)

    def apply(self, run: Run) -> Run:
        """The run by its new names, parameters, states and groups alike.

        Raises:
          ValueError: if the run has other names than were planned for, if a state cannot follow
            its parameter, or if parameters that become one differ in their clocks or groups.
        """
        known = {n for link in self.links for n in link.sources} | set(self.dropped)
        unknown = sorted({*run.params, *run.trained} - known)
        lost = sorted(set(self.dropped) & set(run.trained))
        if unknown or lost:
            raise ValueError(
                f"the plan knows nothing of {unknown[:5]}"
                if unknown
                else f"{lost[:5]} are trained, and cannot be left out"
            )
        params: dict[str, Any] = {}
        states: dict[str, dict[str, Any]] = {}
        members: list[list[str]] = [[] for _ in run.groups]
        of = {name: i for i, group in enumerate(run.groups) for name in group["params"]}
        for link in self.links:
            if _all_or_none(link, run.params, "in the run"):
                arrays, _ = _run_on([np.asarray(run.params[n]) for n in link.sources], link, None)
                params |= zip(link.targets, arrays, strict=True)
            if _all_or_none(link, run.states, "with states"):
                states |= _states(link, run)
            if _all_or_none(link, of, "trained"):
                groups = {of[n] for n in link.sources}
                if len(groups) > 1:
                    raise ValueError(
                        f"{link.sources[0]!r} ... become {link.targets[0]!r}, but are in the "
                        f"groups {sorted(groups)}"
                    )
                members[groups.pop()] += link.targets
        groups = [{**g, "params": m} for g, m in zip(run.groups, members, strict=True)]
        return dataclasses.replace(
            run, params=params, states=states, groups=groups, ordered=self.ordered
        )


def _all_or_none(link: Link, names: Any, what: str) -> bool:
    present = [n for n in link.sources if n in names]
    if present and len(present) < len(link.sources):
        missing = [n for n in link.sources if n not in names]
        raise ValueError(f"{present[0]!r} is {what}, but not {missing[:5]}, which belong together")
    return bool(present)


def _run_on(arrays: Arrays, link: Link, reduced: int | None) -> tuple[Arrays, int | None]:
    for step in link.operations:
        arrays, reduced = step(arrays, reduced)
    return arrays, reduced


def _states(link: Link, run: Run) -> dict[str, dict[str, Any]]:
    """The states of the link's targets."""
    entries = [run.states[n] for n in link.sources]
    for name, entry in zip(link.sources, entries, strict=True):
        if set(entry) != set(entries[0]):
            raise ValueError(
                f"{name!r} has the states {sorted(entry)}, {link.sources[0]!r} {sorted(entries[0])}"
            )
    result: dict[str, dict[str, Any]] = {name: {} for name in link.targets}
    for key in entries[0]:
        values = [entry[key] for entry in entries]
        try:
            new, arrays = _follow(key, values, link, run)
        except ValueError as error:
            raise ValueError(f"state {key!r} of {link.sources[0]!r} {error}") from None
        for target, array in zip(link.targets, arrays, strict=True):
            result[target][new] = array
    return result


def _follow(key: str, values: list[Any], link: Link, run: Run) -> tuple[str, list[Any]]:
    """What a state is called and has become, for each of the link's targets."""
    if not link.operations:
        return key, values
    name = link.sources[0]
    shape = np.shape(run.params[name]) if name in run.params else shape_of(run.states[name])
    arrays = [np.asarray(v) for v in values]
    if any(v is None for v in values) or key in CLOCKS or (arrays[0].ndim == 0 and shape != ()):
        if any(v is not values[0] and not np.array_equal(v, values[0]) for v in values):
            raise ValueError(f"differs: {[str(v) for v in values][:8]}; they become one parameter")
        return key, [values[0]] * len(link.targets)
    if shape is None or arrays[0].shape == shape:
        return key, _run_on(arrays, link, None)[0]
    for row, col in FACTORS.items():
        if key in (row, col):
            axis, keeps_axis = (-1 if key == row else -2), row == "row_var"
            padded = arrays if keeps_axis else [np.expand_dims(a, axis) for a in arrays]
            padded, reduced = _run_on(padded, link, len(shape) + axis)
            place = None if reduced is None else reduced - padded[0].ndim
            if place not in (-1, -2):
                raise ValueError("would be a mean over another axis than the last two")
            new = row if place == -1 else col
            return new, padded if keeps_axis else [np.squeeze(a, place) for a in padded]
    raise ValueError(f"has shape {arrays[0].shape}, the parameter {shape}; it cannot follow")


# --- rules ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Rule:
    number: int
    pattern: re.Pattern
    targets: tuple[str, ...] | None
    steps: tuple[Any, ...]
    ndim: int | None

    @classmethod
    def of(cls, number: int, rule: Rule) -> "_Rule":
        what = f"rule {number}"
        if not isinstance(rule, list | tuple) or not 2 <= len(rule) <= 4:
            raise ValueError(
                f"{what} must be (pattern, replacement, transform, ndim), got {rule!r}"
            )
        pattern, replacement, transform, ndim = [*rule, None, None][:4]
        try:
            compiled = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"{what}: {pattern!r} is no regular expression: {error}") from None
        steps = () if transform is None else transform
        steps = tuple(steps) if isinstance(steps, list | tuple) else (steps,)
        targets = (replacement,) if isinstance(replacement, str) else replacement
        kinds = [step if isinstance(step, str) else next(iter(step), None) for step in steps]
        for step, kind in zip(steps, kinds, strict=True):
            known = kind in ("transpose", "reshape", "split", "stack")
            if not known or (isinstance(step, Mapping) and len(step) != 1):
                raise ValueError(f"{what}: unknown transform {step!r}")
        if {"split", "stack"} & set(kinds[:-1]):
            raise ValueError(
                f"{what}: split and stack come last; apply two tables one after another"
            )
        splits = kinds[-1:] == ["split"]
        if targets is not None and (len(targets) > 1) != splits:
            raise ValueError(f"{what}: several names need a split and a split several names")
        if kinds[-1:] == ["stack"] and "layer" not in compiled.groupindex:
            raise ValueError(rf"{what}: a stack needs (?P<layer>\d+) in its pattern {pattern!r}")
        return cls(number, compiled, None if targets is None else tuple(targets), steps, ndim)

    @property
    def stacks(self) -> bool:
        return self.steps[-1:] == ("stack",)

    def match(self, name: str, shape: Shape | None) -> re.Match | None:
        if self.ndim is not None and (shape is None or len(shape) != self.ndim):
            return None
        return self.pattern.fullmatch(name)

    def operations(self, shape: Shape | None, parts: int) -> tuple[Operation, ...]:
        """The transform for arrays of this shape, without the stack."""
        result: list[Operation] = []
        for step in self.steps:
            kind, argument = (step, None) if isinstance(step, str) else next(iter(step.items()))
            if kind == "stack":
                continue
            if shape is None:
                raise ValueError(f"rule {self.number}: {kind} of an array of unknown shape")
            made, shape = operation(f"rule {self.number}", kind, argument, shape, parts)
            result.append(made)
        return tuple(result)
