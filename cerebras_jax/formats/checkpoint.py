"""Our own checkpoints, as `cerebras_jax.save` writes them, as a run and back.

What an optimizer's states mean is known to its class, so a run goes through an optimizer on its way
in and out.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cerebras_jax import optim
from cerebras_jax.checkpoint import files
from cerebras_jax.checkpoint.values import Text, unpack
from cerebras_jax.formats.matching import CLOCKS, Names
from cerebras_jax.formats.run import Run

OPTIMIZER, REST, ORDER = "opt", "rest", "order"
"""The names of what is written: the optimizer with its parameters, other arrays, and the names of
both in the model's order, where it is known."""


def rule_of(name: str) -> str:
    """The algorithm that a class, or its pure function, has the name of.

    Raises:
      ValueError: if there is none.
    """
    for rule, cls in _classes().items():
        if name in (rule, cls.__name__):
            return rule
    raise ValueError(f"there is no optimizer {name!r}, but {sorted(_classes())}")


def _classes() -> dict[str, Any]:
    found: list[Any] = [
        c for c in vars(optim).values() if inspect.isclass(c) and hasattr(c, "pure")
    ]
    return {cls.pure.__name__: cls for cls in found}


# --- out ------------------------------------------------------------------------------------------


def write(path: str | Path, run: Run, names: Names | None = None) -> None:
    """A checkpoint of a run, for ``restore(path, opt=opt)``; whole or not at all.

    Weights alone are restored as ``opt={"params": params}``. Arrays that no group lists, such as
    buffers, are under ``rest``, and names in the model's order under ``order``.

    Args:
      path: a folder that does not exist yet.
      run: its ``rule`` says which optimizer it belongs to; torch's groups tell Adam from AdamW.
      names: see `Run.in_order`; parameters are found by name, so that they are not needed.

    Raises:
      FileExistsError: if there is something at ``path``.
      ValueError: if it is not known whose the states are, or they would lose digits.
    """
    if Path(path).exists():
        raise FileExistsError(f"{path} is there already")
    run = run if names is None else run.in_order(names)
    run.check()
    objects: dict[str, Any] = {ORDER: list(run.params)} if run.ordered else {}
    if not run.groups:
        objects[OPTIMIZER] = {"params": dict(run.params)}
        files.save(path, step=run.step, **objects)
        return
    missing = [name for name in run.trained if name not in run.params]
    if missing:
        raise ValueError(f"a checkpoint needs the weights, too; there are none of {missing[:5]}")
    opt = _optimizer(_rule(run), run)
    entries = {
        name: entry if run.step is None or not entry else {"step": run.step, **entry}
        for name, entry in run.states.items()
    }
    saved = Run(groups=run.groups, states=entries).state_dict()
    opt.load_state_dict(saved)
    _check_digits(opt, run)
    rest = {name: np.asarray(x) for name, x in run.params.items() if name not in set(run.trained)}
    if rest:
        objects[REST] = rest
    objects[OPTIMIZER] = opt
    files.save(path, step=run.step, **objects)


def _rule(run: Run) -> str:
    """The algorithm of a run: as it says, or as torch's groups tell Adam and AdamW apart."""
    if run.rule is not None:
        return rule_of(run.rule)
    decoupled = {group.get("decoupled_weight_decay") for group in run.groups}
    is_adam = all("amsgrad" in group for group in run.groups)
    if is_adam and len(decoupled) == 1 and decoupled <= {True, False}:
        return "adamw" if decoupled == {True} else "adam"
    raise ValueError(
        "the file does not tell which optimizer its states belong to: optimizer= or --optimizer "
        "must say, such as AdamW"
    )


def _optimizer(rule: str, run: Run) -> Any:
    """An optimizer of a run's parameters, groups and dtypes."""
    cls = _classes()[rule]
    trained = [name for name in run.params if name in set(run.trained)]
    params = {name: jnp.asarray(run.params[name]) for name in trained}
    lossy = [n for n, x in params.items() if x.dtype != np.asarray(run.params[n]).dtype]
    if lossy:
        raise ValueError(
            f"{lossy[:5]} have 64 bits, which JAX cuts to 32; set JAX_ENABLE_X64=1 to keep them"
        )
    known = inspect.signature(cls.pure).parameters
    required = {"lr": 0.0} if known["lr"].default is inspect.Parameter.empty else {}
    rounding: Any = "exact" if any("low_bits" in e for e in run.states.values()) else "nearest"
    return cls(
        optim.param_groups(params, run.groups, order=run.trained),
        **required,
        state_dtype=_state_dtypes(run) or None,
        rounding=rounding,
    )


def _state_dtypes(run: Run) -> dict[str, Any]:
    """The dtypes of states that are not their parameters'."""
    found: dict[str, Any] = {}
    for name, entry in run.states.items():
        for key, value in entry.items():
            dtype = getattr(value, "dtype", None)
            is_own = dtype is not None and dtype != run.params[name].dtype
            if is_own and key not in CLOCKS and key != "low_bits":
                found[key] = jnp.dtype(dtype)
    return found


def _check_digits(opt: Any, run: Run) -> None:
    """Refuses states that were rounded on the way."""
    for name, entry in run.states.items():
        for key, new in opt.state[name].items():
            if key in CLOCKS or not hasattr(entry.get(key), "dtype"):
                continue
            old = np.asarray(entry[key])
            if np.asarray(new).astype(old.dtype).tobytes() != old.tobytes():  # NaN is NaN here
                raise ValueError(f"state {key!r} of {name!r} does not fit into {new.dtype}")


# --- in -------------------------------------------------------------------------------------------


class _Saved(NamedTuple):
    """The optimizer in a checkpoint: its name there, and what was written about it."""

    name: str
    about: Mapping[str, Any]


def read(path: str | Path, names: Names | None = None) -> Run:
    """A run from a checkpoint, or from the latest one of a run's folder.

    Parameters that were trained with ``rounding="exact"`` come back in float32, as they were
    trained. States of wrappers are named in ``unread``, other objects are in ``extra``.

    Raises:
      FileNotFoundError, CheckpointError, DamagedError: as `restore`.
      ValueError: if there is not one optimizer in it, or one that is sparse or not of this package.
    """
    found = files.latest(Path(path))
    contents = files.inspect(found)
    others = {k: v for k, v in contents.objects.items() if k not in (REST, ORDER)}
    optimizers = [_Saved(k, v[""]) for k, v in others.items() if v.get("", {}).get("rule")]
    rest = _arrays(found, contents, REST) if REST in contents.objects else {}
    if not optimizers and _is_weights(others):
        weights = _arrays(found, contents, OPTIMIZER)
        params = {k.removeprefix("params."): v for k, v in weights.items()}
        return _in_order(found, contents, Run(params, step=contents.step))
    if len(optimizers) != 1:
        raise ValueError(
            f"{path} has {len(optimizers)} optimizers of the class form, expected 1, among "
            f"{sorted(others)}; what the pure form saved can be restored into a class"
        )
    (saved,) = optimizers
    opt, groups, unread = _restored(found, contents, saved)
    params = dict(opt.named_parameters())
    if opt.rounding == "exact":
        params = opt.full_precision()
    state = opt.state_dict()
    for entry in state["state"].values():
        entry.pop("low_bits", None)
    step = contents.step
    run = Run.of(
        {**{k: np.asarray(v) for k, v in params.items()}, **rest},
        {**state, "optimizer": saved.about["rule"]},
        step=step,
        ordered=False,
        unread=unread,
        extra={name: about for name, about in others.items() if name != saved.name},
    )
    run.groups = [{**mine, **more} for mine, more in zip(run.groups, groups, strict=True)]
    run.states = {n: {k: np.asarray(v) for k, v in e.items()} for n, e in run.states.items()}
    return _in_order(found, contents, run) if names is None else run.in_order(names)


def _in_order(found: Path, contents: files.Contents, run: Run) -> Run:
    """The run in the model's order, where the checkpoint has it."""
    about = contents.objects.get(ORDER, {}).get("", {})
    named = [name for values in about.get("values", {}).values() for name in values]
    like: dict[str, Any] = {ORDER: [""] * len(named)}
    order = files.restore(found, **like)[ORDER] if named else []
    if sorted(order) != sorted(run.params):
        return dataclasses.replace(run, ordered=False)
    return dataclasses.replace(run, params={n: run.params[n] for n in order}, ordered=True)


def _restored(found: Path, contents: files.Contents, saved: _Saved) -> tuple[Any, list, list[str]]:
    """The optimizer as it was saved, what of its groups is a program, and what was left out."""
    if saved.about["rule"] not in _classes():
        raise ValueError(f"{found} is of the optimizer {saved.about['rule']!r}, which is not ours")
    places = saved.about["places"]
    if "state/mask" in places:
        raise ValueError(f"{found} is of a sparse optimizer, which no other format has")
    like = {n: _empty(contents.arrays[f"{saved.name}/params/{n}"]) for n in places["params"]}
    run = Run(like, rule=saved.about["rule"])
    for folder, members in places.items():
        if folder.startswith("state/"):
            for name in members:
                x = contents.arrays[f"{saved.name}/{folder}/{name}"]
                run.states.setdefault(name, {})[folder.removeprefix("state/")] = x
    programs = []
    for group in saved.about["groups"]:
        values = {k: unpack(v, str) for k, v in group["values"].items()}
        programs.append({k: str(v) for k, v in values.items() if isinstance(v, Text)})
        plain = {k: v for k, v in values.items() if not isinstance(v, Text)}
        run.groups.append({**plain, "params": list(group["params"])})
    opt = _optimizer(saved.about["rule"], run)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "restored ", UserWarning)  # of programs, which stay
        objects: dict[str, Any] = {saved.name: opt}
        files.restore(found, extra="ignore", **objects)
    return opt, programs, [f"{saved.name}/around/{name}" for name in places.get("around", ())]


def _is_weights(objects: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds parameters by name, and nothing else."""
    about = objects.get(OPTIMIZER, {}).get("", {})
    names = about.get("places", {}).get("", ())
    return set(about.get("places", {})) == {""} and all(n.startswith("params.") for n in names)


def _arrays(found: Path, contents: files.Contents, name: str) -> dict[str, np.ndarray]:
    """The arrays of a tree by path."""
    paths = [p.removeprefix(f"{name}/") for p in contents.arrays if p.startswith(f"{name}/")]
    objects: dict[str, Any] = {name: {p: _empty(contents.arrays[f"{name}/{p}"]) for p in paths}}
    return files.restore(found, **objects)[name]


def _empty(shape: Any) -> np.ndarray:
    """An array of a shape and dtype that takes no memory, to restore into."""
    return np.broadcast_to(np.zeros((), shape.dtype), shape.shape)
