"""torch.optim's state dicts, and those of Hugging Face's optimizers: what they call differently.

Plain functions on entries ``{parameter name: {state name: array}}`` and parameter groups; no
optimizer is needed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cerebras_jax.formats.state_dict import Entry, Group, plain_value, to_numpy, with_functions

# How torch executes a step; says nothing about what is computed.
EXECUTION_FLAGS = {"foreach", "fused", "capturable", "differentiable"}
_BOOKKEEPING = {"params", "param_names"}


def _same_entry(entry: Entry, group: Group) -> Entry:
    return entry


def _same_group(group: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return group


class Dialect(NamedTuple):
    """How torch.optim's optimizer of the same name differs.

    Attributes:
      flags: its flags that ours has not, and what they are here.
      names: its name of a group value -> ours.
      counts_steps: whether its state has ``step``.
      powers: our running powers of ``betas`` that follow from its ``step``.
      import_entry: turns its state of one parameter into ours.
      export_entry: the inverse, on NumPy arrays.
      import_group: turns its group values into ours.
      kept: our group values that it has not, and that say what a parameter is: they stay.
    """

    flags: Mapping[str, Any] = {}
    names: Mapping[str, str] = {}
    counts_steps: bool = True
    powers: tuple[str, ...] = ()
    import_entry: Callable[[Entry, Group], Entry] = _same_entry
    export_entry: Callable[[Entry, Group], Entry] = _same_entry
    import_group: Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any]] = _same_group
    kept: tuple[str, ...] = ()


# --- Adafactor ------------------------------------------------------------------------------------

_ADAFACTOR_STATES = {
    "row_var": "exp_avg_sq_row",
    "col_var": "exp_avg_sq_col",
    "variance": "exp_avg_sq",
}
_ADAFACTOR_AXES = {"row_var": -1, "col_var": -2}  # torch keeps the axis of the mean


def _adafactor_in(entry: Entry, group: Group) -> Entry:
    result = {}
    for name, value in entry.items():
        if name in _ADAFACTOR_AXES and value is not None:
            value = value.squeeze(_ADAFACTOR_AXES[name])
        result[_ADAFACTOR_STATES.get(name, name)] = value
    return result


def _adafactor_out(entry: Entry, group: Group) -> Entry:
    names = {ours: theirs for theirs, ours in _ADAFACTOR_STATES.items()}
    result = {}
    for name, value in entry.items():
        theirs = names.get(name, name)
        if theirs in _ADAFACTOR_AXES:
            axis = _ADAFACTOR_AXES[theirs]
            value = value[..., None] if axis == -1 else value[..., None, :]
        result[theirs] = value
    return result


def _adafactor_group(group: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    eps = group.get("eps")
    if isinstance(eps, tuple) and eps[:1] == (None,):  # torch: the dtype's precision, as a bound
        group["eps"] = (defaults["eps"][0], *eps[1:])
    return group


# --- Muon -----------------------------------------------------------------------------------------


def _muon_in(entry: Entry, group: Group) -> Entry:
    """torch's has no step; that of a matrix is not used. See `formats.muon` for other layouts."""
    return {"step": 0.0, **entry} if "momentum_buffer" in entry else entry


POWERS = ("beta1_power", "beta2_power")

DIALECTS = {
    "adafactor": Dialect(
        names={"beta2_decay": "decay_rate", "d": "clip_threshold"},
        import_entry=_adafactor_in,
        export_entry=_adafactor_out,
        import_group=_adafactor_group,
    ),
    "adam": Dialect(flags={"decoupled_weight_decay": False}, powers=POWERS),
    "adam_base": Dialect(powers=POWERS),
    "adamax": Dialect(powers=("beta1_power",)),
    "adamw": Dialect(flags={"decoupled_weight_decay": True}, powers=POWERS),
    "muon": Dialect(import_entry=_muon_in, kept=("axes", "split", "use_muon")),
    "nadam": Dialect(flags={"decoupled_weight_decay": False}),
    "radam": Dialect(flags={"decoupled_weight_decay": False}),
    "sgd": Dialect(counts_steps=False),
}
_PLAIN = Dialect()


def dialect_of(factory: Any) -> Dialect:
    """The dialect of one of this package's algorithms; of others, that of equal names."""
    if not getattr(factory, "__module__", "").startswith("cerebras_jax."):
        return _PLAIN
    return DIALECTS.get(factory.__name__, _PLAIN)


# --- in -------------------------------------------------------------------------------------------


def check_flags(dialect: Dialect, group: Group, defaults: Mapping[str, Any]) -> None:
    """Refuses a flag of torch's that asks for an algorithm that this optimizer is not.

    Raises:
      ValueError: names the flag and what it is here.
    """
    for key in {*dialect.flags, "maximize"} & set(group) - set(defaults):
        expected, value = dialect.flags.get(key, False), plain_value(group[key])
        if not isinstance(value, bool | int | float | np.generic) or bool(value) != expected:
            raise ValueError(f"this optimizer has {key}={expected}, got {key}={value!r}")


def import_group(
    dialect: Dialect, group: Group, defaults: Mapping[str, Any], ours: Group
) -> dict[str, Any]:
    """The values of a loaded group that mean something to us.

    Args:
      dialect: what torch calls differently.
      group: the loaded group.
      defaults: names and values of our hyper-parameters.
      ours: our group, whose functions stay where the loaded one has None.

    Raises:
      ValueError: if a flag of torch asks for an algorithm that this optimizer is not.
    """
    renamed = {dialect.names.get(k, k): v for k, v in group.items() if k not in _BOOKKEEPING}
    check_flags(dialect, renamed, defaults)
    result: dict[str, Any] = {}
    for key, value in renamed.items():
        if key not in defaults and key in {*EXECUTION_FLAGS, *dialect.flags, "maximize"}:
            continue
        result[key] = with_functions(plain_value(value), ours.get(key))
    result |= {k: ours[k] for k in dialect.kept if k in ours and k not in result}
    return dialect.import_group(result, defaults)


def import_state(dialect: Dialect, entry: Entry, group: Group) -> dict[str, Any]:
    """One parameter's loaded state in our names; powers follow from a step count."""
    entry = dict(dialect.import_entry(entry, group))
    powers = dialect.powers if group.get("correct_bias", True) else ()
    if powers and entry.get("step") is not None:
        step = float(np.asarray(plain_value(entry["step"])))
        for name, beta in zip(powers, group["betas"], strict=False):
            if not callable(beta):
                entry.setdefault(name, float(beta) ** (step + 1))
    return entry


# --- out ------------------------------------------------------------------------------------------


def to_torch_state_dict(
    dialect: Dialect,
    groups: Sequence[Group],
    entries: Mapping[str, Entry],
    order: Sequence[str],
) -> dict[str, Any]:
    """The state dict for torch.optim, with torch tensors.

    Args:
      dialect: what torch calls differently.
      groups: our parameter groups.
      entries: our states by parameter name, with ``step``.
      order: the names in the order in which torch has its parameters, group after group.

    Raises:
      ImportError: if torch is not installed.
      ValueError: if ``order`` is not made of all names, group after group, or a value is a
        schedule.
    """
    if sorted(order) != sorted(entries):
        raise ValueError(f"param_names must be {sorted(entries)}, got {sorted(order)}")
    place = {name: i for i, name in enumerate(order)}
    in_order = sorted(groups, key=lambda g: min(map(place.__getitem__, g["params"]), default=0))
    back = {ours: theirs for theirs, ours in dialect.names.items()}
    state: dict[int, Any] = {}
    result = []
    for group in in_order:
        names = sorted(group["params"], key=place.__getitem__)
        if names != list(order[len(state) : len(state) + len(names)]):
            raise ValueError(f"param_names must list group after group, got {list(order)}")
        numbers = range(len(state), len(state) + len(names))
        for key, value in group.items():
            if any(callable(x) for x in jax.tree.leaves(value, is_leaf=callable)):
                raise ValueError(f"{key} is a schedule, {value!r}; torch needs a number")
        values = {back.get(k, k): plain_value(v) for k, v in group.items()}
        result.append({**values, **dialect.flags, "params": [*numbers], "param_names": names})
        for number, name in zip(numbers, names, strict=True):
            state[number] = _torch_entry(dialect, entries[name], group)
    return {"state": state, "param_groups": result}


def _torch_entry(dialect: Dialect, entry: Entry, group: Group) -> dict[str, Any]:
    ours = {k: v for k, v in entry.items() if k != "step" and not k.endswith("_power")}
    theirs = dict(dialect.export_entry(ours, group))
    if dialect.counts_steps:
        theirs["step"] = np.float32(_steps_taken(entry, group))
    return {k: to_torch(v) for k, v in theirs.items()}


def _steps_taken(entry: Entry, group: Group) -> float:
    """The step count, or where it is 0 because a checkpoint had none, what the powers tell."""
    step = float(entry.get("step", 0))
    if step:
        return step
    powers = {name: float(entry[name]) for name in POWERS if name in entry}
    if powers:
        told = steps_of_powers(powers, [float(b) for b in group["betas"]])
        if told is not None:
            return max(round(told[0]), 0)
        # Both have underflowed: so many steps that the bias correction is 1 in any case.
        return _underflown(entry, group)
    return 0.0


def steps_of_powers(
    powers: Mapping[str, float], betas: Sequence[float]
) -> tuple[float, float] | None:
    """The t of running products beta^(t + 1), and how far it may be off; None: they do not tell.

    A running product in float32 is off by up to 2^-24 in each step, so the smaller beta tells t
    better, until its power underflows.
    """
    for name, beta in zip(POWERS, betas, strict=True):
        power = powers.get(name, 0.0)
        if np.finfo(np.float32).tiny <= power < 1 and 0 < beta < 1:
            steps = float(np.log(power) / np.log(beta))
            return steps - 1, 1e-3 - steps * 2**-24 / float(np.log(beta))
    return None


def _underflown(entry: Entry, group: Group) -> float:
    betas = [
        float(b)
        for name, b in zip(POWERS, group["betas"], strict=False)
        if name in entry and 0 < float(b) < 1
    ]
    if not betas:
        return 0.0
    return float(np.ceil(np.log(np.finfo(np.float32).tiny) / np.log(max(betas))))


def to_torch(x: Any) -> Any:
    """A torch tensor of a JAX or NumPy array, in the same dtype."""
    import torch  # pyright: ignore[reportMissingImports]

    is_bfloat16 = jnp.result_type(x) == jnp.bfloat16
    array = np.array(to_numpy(x), np.float32 if is_bfloat16 else None)
    tensor = torch.from_numpy(array) if array.ndim else torch.tensor(array.item())
    return tensor.bfloat16() if is_bfloat16 else tensor
