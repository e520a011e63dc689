"""From a checkpoint to the objects: compared, fetched, verified, and only then changed."""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cerebras_jax.checkpoint import store
from cerebras_jax.checkpoint.fingerprint import fingerprints
from cerebras_jax.checkpoint.leaves import (
    CheckpointError,
    DamagedError,
    Extra,
    Hyper,
    Missing,
    Options,
    Report,
    Target,
)
from cerebras_jax.checkpoint.nodes import Node, Nodes
from cerebras_jax.checkpoint.writing import FORMAT, join

PathLike = str | os.PathLike[str]
Rename = Mapping[str, str] | Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint gave.

    Attributes:
      step: the number it was saved under; None if it was saved without one.
      objects: by name, what was asked for. Objects that can change were changed in place and are
        the same; trees, arrays and keys are new.
      overridden: values of the groups, bounds and schedules that are the checkpoint's now.
      kept: values that stayed although the checkpoint has others.
      filled: paths that the checkpoint lacks: there everything is as it was.
      unused: paths of the checkpoint that nothing asked for.
    """

    step: int | None
    objects: dict[str, Any]
    overridden: tuple[str, ...]
    kept: tuple[str, ...]
    filled: tuple[str, ...]
    unused: tuple[str, ...]

    def __getitem__(self, name: str) -> Any:
        return self.objects[name]


def options_of(hyper: Hyper, missing: Missing, extra: Extra, rename: Rename | None) -> Options:
    for name, value, allowed in (
        ("hyper", hyper, ("saved", "mine")),
        ("missing", missing, ("error", "init")),
        ("extra", extra, ("error", "ignore")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
    if rename is None:
        return Options(hyper, missing, extra)
    if callable(rename):
        return Options(hyper, missing, extra, rename)
    if not isinstance(rename, Mapping):
        raise TypeError(f"rename must be a dict or a function, got {rename!r}")
    table = dict(rename)

    def renamed(name: str) -> str:
        for old in sorted(table, key=len, reverse=True):
            if name == old or name.startswith(f"{old}."):
                return table[old] + name[len(old) :]
        return name

    return Options(hyper, missing, extra, renamed)


def read_about(path: Path) -> dict[str, Any]:
    """What a checkpoint's text says, brought to the present format."""
    about = json.loads(store.read_text(path))
    if about["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {about['format']}, written by a later version "
            f"({about['versions'].get('cerebras_jax')}); this one reads up to {FORMAT}"
        )
    return about


def target_of(entry: Mapping[str, Any]) -> Target:
    """What a checkpoint's text says of an array."""
    return Target(tuple(entry["shape"]), jnp.dtype(entry["dtype"]), None)


def restore_objects(
    path: Path, objects: Mapping[str, Any], options: Options, verify: bool, context: Any
) -> Restored:
    """Compares, fetches, verifies, and then changes all of the objects; see `files.restore`."""
    if not objects:
        raise ValueError("there is nothing to restore; name the objects, like opt=opt")
    about, report = read_about(path), Report()
    nodes = {name: Nodes(name, obj) for name, obj in objects.items()}
    work: list[tuple[str, str, Node, dict[str, Target]]] = []
    for name, path_, node, saved in _pairs(nodes, about["objects"], options, report):
        prefix = join(name, path_)
        stored = {
            full[len(prefix) :].removeprefix("/"): target_of(entry)
            for full, entry in about["arrays"].items()
            if full == prefix or full.startswith(f"{prefix}/")
        }
        work.append((name, path_, node, node.match(saved, stored, options, report)))
    if report.problems:
        listed = "\n- ".join([f"{path} does not fit:", *report.problems])
        differing = "\n- ".join(["values that differ:", *report.overridden, *report.kept])
        more = f"\n{differing}" if report.overridden or report.kept else ""
        raise CheckpointError(listed + more)
    wanted = {
        join(name, path_): {join(name, path_, local): t for local, t in targets.items()}
        for name, path_, _, targets in work
    }
    fetched = fetch(path, about, wanted, verify, context)
    for name, path_, node, targets in work:
        prefix = join(name, path_)
        node.load({local: fetched[prefix][join(prefix, local)] for local in targets})
    new = _commit(nodes, work)
    _tell(path, report)
    return Restored(
        about["step"],
        new,
        *(tuple(x) for x in (report.overridden, report.kept, report.filled, report.unused)),
    )


def _pairs(
    nodes: Mapping[str, Nodes], saved: Mapping[str, Any], options: Options, report: Report
) -> list[tuple[str, str, Node, Any]]:
    """Nodes with what the checkpoint says about them; schedulers come before optimizers."""
    found = []
    for name, mine in nodes.items():
        theirs = dict(saved.get(name, {}))
        for path, node in mine.by_path.items():
            about = theirs.pop(path, None)
            if about is None:
                report.filled.append(join(name, path))
                if options.missing == "error":
                    report.problems.append(
                        f"the checkpoint lacks {join(name, path)!r}; it has {sorted(saved)} "
                        '(missing="init" keeps ours)'
                    )
            elif about["kind"] != node.kind:
                report.problems.append(
                    f"{join(name, path)} was saved by {about.get('class', 'arrays')}, which "
                    f"{type(node.obj).__name__} cannot take over"
                )
            else:
                found.append((name, path, node, about))
        report.unused += [join(name, path) for path in theirs]
        if theirs and options.extra == "error":
            report.problems.append(
                f"the checkpoint has more: {[join(name, p) for p in theirs][:5]} "
                '(extra="ignore" does without)'
            )
    report.unused += [name for name in saved if name not in nodes]
    return sorted(found, key=lambda pair: pair[2].kind != "value")


def fetch(
    path: Path,
    about: Mapping[str, Any],
    wanted: Mapping[str, Mapping[str, Target]],
    verify: bool,
    context: Any = None,
) -> dict[str, dict[str, Any]]:
    """The arrays of each node; arrays that are one in the checkpoint are read once.

    Raises:
      DamagedError: names the arrays that are not what was saved.
    """
    entries = about["arrays"]
    targets: dict[str, Target] = {}
    for mine in wanted.values():
        for full, target in mine.items():
            if np.prod(target.shape):
                targets.setdefault(entries[full].get("same", full), target)
    read = store.read_arrays(path, targets, context or store.default_context())
    wrong = [
        name
        for name, target in targets.items()
        if tuple(read[name].shape) != target.shape or read[name].dtype != target.dtype
    ]
    if verify and not wrong:
        checked = [name for name in read if "fingerprint" in entries[name]]
        values = fingerprints([read[name] for name in checked])
        wrong = [n for n, v in zip(checked, values, strict=True) if v != entries[n]["fingerprint"]]
    if wrong:
        raise DamagedError(f"{path} is damaged: {wrong[:5]} are not what was saved")
    result: dict[str, dict[str, Any]] = {}
    given: set[str] = set()
    for node, mine in wanted.items():
        result[node] = {}
        for full, target in mine.items():
            name = entries[full].get("same", full)
            if name not in read:
                result[node][full] = np.zeros(target.shape, target.dtype)
                continue
            result[node][full] = _placed(read[name], target, copy=name in given)
            given.add(name)
    return result


def _placed(x: Any, target: Target, copy: bool) -> Any:
    """An array where it is wanted; a buffer belongs to one place alone."""
    if target.sharding is None:
        return np.array(x) if copy else np.asarray(x)
    if isinstance(x, jax.Array) and x.sharding == target.sharding:
        return jnp.copy(x) if copy else x
    return jax.device_put(jnp.array(x, copy=True), target.sharding)


def _commit(nodes: Mapping[str, Nodes], work: list[tuple[str, str, Node, Any]]) -> dict[str, Any]:
    new: dict[str, dict[str, Any]] = {
        name: {path: node.obj for path, node in mine.by_path.items()}
        for name, mine in nodes.items()
    }
    done: list[Node] = []
    try:
        for name, path, node, _ in work:
            done.append(node)
            new[name][path] = node.commit()
    except BaseException as error:
        for node in reversed(done):
            try:
                node.undo()
            except Exception as second:
                error.add_note(f"{node.where.rstrip('/')} could not be brought back: {second}")
        if isinstance(error, ValueError | TypeError):
            where = done[-1].where.rstrip("/")
            raise CheckpointError(f"{where} does not take what was saved: {error}") from error
        raise
    return {name: mine.assemble(new[name]) for name, mine in nodes.items()}


def _tell(path: Path, report: Report) -> None:
    parts = [
        ("taken from the checkpoint", report.overridden),
        ("kept, the checkpoint has others", report.kept),
        ("not in the checkpoint, kept", report.filled),
    ]
    lines = [f"{what}: {'; '.join(items)}" for what, items in parts if items]
    if report.overridden:
        lines[0] += ' (hyper="mine" keeps yours)'
    if lines:
        warnings.warn(f"restored {path}. " + ". ".join(lines), stacklevel=4)
