"""Arrays by name, and their counterparts in a checkpoint."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cerebras_jax.checkpoint.values import is_array, pack, unpack

Hyper = Literal["saved", "mine"]
Missing = Literal["error", "init"]
Extra = Literal["error", "ignore"]

ANY = "*"
"""The name in a clock of parameters whose names are not known."""


OPTIONAL = "guard"
"""The folder of what was measured: it is restored as far as both sides have it."""


class CheckpointError(ValueError):
    """A checkpoint does not fit what it is restored into, or cannot be used."""


class DamagedError(CheckpointError):
    """What a checkpoint holds is not what was saved."""


class Place(NamedTuple):
    """Where an array stands: folders are fixed by the layout, names are the parameters'."""

    folder: str
    name: str

    @property
    def path(self) -> str:
        return "/".join(part for part in self if part)

    @property
    def dotted(self) -> str:
        """The same for what is a folder here, and a level of a tree there."""
        return ".".join(part for part in (self.folder.replace("/", "."), self.name) if part)


class Leaves(NamedTuple):
    """An object as what it holds, by name.

    Attributes:
      values: arrays, numbers, strings.
      clocks: by folder and parameter name, the scalars that each parameter has of its own.
    """

    values: dict[Place, Any]
    clocks: dict[str, dict[str, Any]]


class Target(NamedTuple):
    """An array to be read: as NumPy's if ``sharding`` is None."""

    shape: tuple[int, ...]
    dtype: Any
    sharding: Any


@dataclasses.dataclass(frozen=True)
class Options:
    """How a checkpoint is matched with what it is restored into; see `restore`."""

    hyper: Hyper = "saved"
    missing: Missing = "error"
    extra: Extra = "error"
    rename: Callable[[str], str] = str


@dataclasses.dataclass
class Report:
    """What came up on the way.

    Attributes:
      problems: why nothing can be restored.
      overridden: values of ours that were replaced: ``name: ours -> saved``.
      kept: values of ours that stayed: ``name: ours (saved: theirs)``.
      filled: paths that the checkpoint lacks.
      unused: paths that only the checkpoint has.
      scheduled: the groups' keys, by id of the group, that a scheduler of the same call writes.
    """

    problems: list[str] = dataclasses.field(default_factory=list)
    overridden: list[str] = dataclasses.field(default_factory=list)
    kept: list[str] = dataclasses.field(default_factory=list)
    filled: list[str] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)
    scheduled: set[tuple[int, str]] = dataclasses.field(default_factory=set)

    def differs(self, name: str, mine: str, saved: str, took: bool) -> None:
        """Notes a value that the checkpoint has otherwise, and whether it was taken over."""
        if took:
            self.overridden.append(f"{name}: {mine} -> {saved}")
        else:
            self.kept.append(f"{name}: {mine} (saved: {saved})")


# --- saving ---------------------------------------------------------------------------------------


def record(leaves: Leaves, kind: str, **about: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What to write about an object, and its arrays by path.

    Raises:
      TypeError: names the path of what can not be stored.
      ValueError: if two arrays would have one path.
    """
    arrays: dict[str, Any] = {}
    places: dict[str, list[str]] = {}
    values: dict[str, dict[str, Any]] = {}
    keys: dict[str, str] = {}
    for place, x in leaves.values.items():
        if is_array(x):
            if place.path in arrays:
                raise ValueError(f"two arrays are called {place.path!r}")
            if is_key(x):
                keys[place.path] = str(jax.random.key_impl(x))
                x = jax.random.key_data(x)
            arrays[place.path] = x
            places.setdefault(place.folder, []).append(place.name)
        else:
            values.setdefault(place.folder, {})[place.name] = pack(x, place.path, {})
    for folder, numbers in leaves.clocks.items():
        arrays[folder] = np.stack([np.asarray(x) for x in numbers.values()])
    clocks = {folder: list(numbers) for folder, numbers in leaves.clocks.items()}
    parts = {"places": places, "values": values, "keys": keys, "clocks": clocks}
    return {"kind": kind, **{k: v for k, v in parts.items() if v}, **about}, arrays


def is_key(x: Any) -> bool:
    """Whether an array holds typed PRNG keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


# --- matching -------------------------------------------------------------------------------------


class Match:
    """Which of a checkpoint's arrays goes where; made before anything is read.

    Args:
      ours: what it is restored into; shapes may stand for arrays.
      about: what `record` wrote.
      stored: shape and dtype of every array of the checkpoint's object, by path.
      options: see `restore`.
      report: is added to.
      where: the path of the object, for messages.
    """

    def __init__(
        self,
        ours: Leaves,
        about: Mapping[str, Any],
        stored: Mapping[str, Target],
        options: Options,
        report: Report,
        where: str,
    ):
        self._ours, self._about, self._where = ours, about, where
        self._source: dict[Place, str] = {}  # path of the array in the checkpoint
        self._plain: dict[Place, Any] = {}  # packed values
        self._index: dict[str, dict[str, int]] = {}  # of a clock's entries, by name
        self.wanted: dict[str, Target] = {}
        theirs = {
            Place(folder, name): Place(folder, name).path
            for folder, names in about.get("places", {}).items()
            for name in names
        }
        theirs = renamed(theirs, options.rename, where)
        values = {
            Place(folder, name): value
            for folder, named in about.get("values", {}).items()
            for name, value in named.items()
        }
        dotted = {place.dotted: place for place in [*theirs, *values]}
        missing: list[str] = []
        for place, like in ours.values.items():
            is_exact = place in theirs or place in values
            found = place if is_exact else dotted.get(place.dotted, place)
            if found in theirs:
                path = theirs.pop(found)
                self._add(place, path, like, stored[path], report)
            elif found in values:
                self._plain[place] = values.pop(found)
                if is_array(like) and like.shape != ():
                    report.problems.append(f"{where}{place.path} is a number in the checkpoint")
            elif place.folder != OPTIONAL:
                missing.append(place.path)
                if options.missing == "init" and isinstance(like, jax.ShapeDtypeStruct):
                    report.problems.append(f"{where}{place.path} is missing, and ours has no value")
        clocks = dict(about.get("clocks", {}))
        for folder, numbers in ours.clocks.items():
            if folder in clocks:
                names = [options.rename(n) for n in clocks.pop(folder)]
                self._index[folder] = {name: i for i, name in enumerate(names)}
                self.wanted[folder] = stored[folder]._replace(sharding=None)
                known = set(names)
                if not known & {ANY} and ANY not in numbers:
                    missing += [f"{folder}/{n}" for n in numbers if n not in known]
            else:
                missing.append(folder)
        more = [place for place in [*theirs, *values] if place.folder != OPTIONAL]
        unused = [*(theirs.get(place, place.path) for place in more), *clocks]
        self._tell(missing, unused, options, report)

    def _tell(
        self, missing: list[str], unused: list[str], options: Options, report: Report
    ) -> None:
        for paths, total, allowed, what, hint in (
            (
                missing,
                report.filled,
                options.missing == "init",
                "lacks",
                'missing="init" keeps ours, rename= finds what is called otherwise',
            ),
            (
                unused,
                report.unused,
                options.extra == "ignore",
                "has more:",
                'extra="ignore" does without',
            ),
        ):
            total += [self._where + path for path in paths]
            if paths and not allowed:
                shown = ", ".join(repr(self._where + p) for p in paths[:5])
                more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
                report.problems.append(f"the checkpoint {what} {shown}{more} ({hint})")

    def _add(self, place: Place, path: str, like: Any, found: Target, report: Report) -> None:
        name = f"{self._where}{place.path}".rstrip("/")
        impl = self._about.get("keys", {}).get(path)
        if not is_array(like):
            if found.shape != () or impl is not None or not isinstance(like, bool | int | float):
                report.problems.append(f"{name} is an array in the checkpoint, ours is {like!r}")
            self._source[place], self.wanted[path] = path, found._replace(sharding=None)
            return
        if is_key(like) or impl is not None:
            ours = str(jax.random.key_impl(like)) if is_key(like) else f"an array of {like.dtype}"
            if ours != impl:
                report.problems.append(
                    f"{name} is {f'a key of {impl}' if impl else 'an array'} in the checkpoint, "
                    f"ours is {ours}"
                )
                return
        elif _kind(found.dtype) != _kind(like.dtype):
            report.problems.append(
                f"{name} has dtype {np.dtype(found.dtype)} in the checkpoint, ours is {like.dtype}"
            )
            return
        expected = jax.eval_shape(jax.random.key_data, like).shape if impl else like.shape
        if found.shape != tuple(expected):
            report.problems.append(
                f"{name} has shape {found.shape} in the checkpoint, ours has {tuple(expected)}"
            )
            return
        self._source[place] = path
        self.wanted[path] = found._replace(sharding=_sharding(like))

    def fill(self, fetched: Mapping[str, Any]) -> Leaves:
        """Ours with the checkpoint's arrays in it, in our dtypes.

        Raises:
          CheckpointError: if parameters have different clocks where ours has one for all.
        """
        values, clocks = {}, {}
        for place, like in self._ours.values.items():
            if place in self._source:
                values[place] = _converted(fetched[self._source[place]], like)
            elif place in self._plain:
                value = unpack(self._plain[place], fetched.__getitem__)
                values[place] = _converted(np.asarray(value), like) if is_array(like) else value
            else:
                values[place] = like
        for folder, numbers in self._ours.clocks.items():
            index = self._index.get(folder)
            if index is None:
                clocks[folder] = numbers
                continue
            vector = np.asarray(fetched[folder])
            if ANY in numbers or ANY in index:
                if len({x.item() for x in vector}) > 1:
                    raise CheckpointError(
                        f"{self._where}{folder}: parameters have taken different numbers of steps, "
                        "ours has one count for all; make it with per_leaf_clocks=True"
                    )
                clocks[folder] = {name: vector[0] for name in numbers}
            else:
                clocks[folder] = {
                    name: vector[index[name]] if name in index else mine
                    for name, mine in numbers.items()
                }
        return Leaves(values, clocks)


def renamed(theirs: dict[Place, str], rename: Callable[[str], str], where: str) -> dict[Place, str]:
    """The same under our names.

    Raises:
      CheckpointError: if two of them get one name.
    """
    result: dict[Place, str] = {}
    for place, path in theirs.items():
        new = place._replace(name=rename(place.name))
        if new in result:
            raise CheckpointError(f"rename gives two arrays the name {where}{new.path!r}")
        result[new] = path
    return result


def _kind(dtype: Any) -> str:
    kinds = {
        "complex": jnp.complexfloating, "float": jnp.floating, "int": jnp.integer
    }  # fmt: skip
    return next((k for k, v in kinds.items() if jnp.issubdtype(dtype, v)), str(dtype))


def _sharding(like: Any) -> Any:
    """Where an array must be put; None: anywhere."""
    if isinstance(like, jax.Array):
        data = jax.random.key_data(like) if is_key(like) else like
        return data.sharding if data.committed else None
    return None if is_key(like) else getattr(like, "sharding", None)


def _converted(x: Any, like: Any) -> Any:
    """A fetched array as what it replaces is: NumPy's or JAX's, in its dtype; a plain number."""
    if not is_array(like):
        return np.asarray(x).item() if is_array(x) else x
    if is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(x), impl=jax.random.key_impl(like))
    if isinstance(like, np.ndarray | np.generic):
        array = np.array(x).astype(like.dtype)
        return array[()] if isinstance(like, np.generic) else array
    if not isinstance(x, jax.Array):
        x = jnp.array(x.astype(like.dtype), copy=True)
        sharding = _sharding(like)
        return x if sharding is None else jax.device_put(x, sharding)
    return x if x.dtype == like.dtype else jax.device_put(x.astype(like.dtype), x.sharding)
