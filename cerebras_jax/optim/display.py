"""How an optimizer is shown: as text, and as a table in Jupyter."""

import html
from collections.abc import Mapping
from typing import Any

import jax

from cerebras_jax.engine.hyper import normalize
from cerebras_jax.formats.state_dict import plain_value
from cerebras_jax.messages import with_few_digits
from cerebras_jax.optim.guarding import SETTINGS
from cerebras_jax.optim.owner import Owner

_SHOWN = (
    *SETTINGS,
    *("sparsity", "state_dtype", "rounding", "pack", "zero_axis", "state_memory", "around"),
)


def as_text(optimizer: Owner) -> str:
    """The groups' values, and how much they hold."""
    sizes = {n: getattr(v, "size", 0) for n, v in optimizer.named_parameters()}
    lines = [f"{type(optimizer).__name__} ("]
    for i, group in enumerate(optimizer.param_groups):
        total = sum(sizes[n] for n in group["params"])
        lines.append(f"Parameter Group {i}")
        lines += [f"    {k}: {_as_shown(v)}" for k, v in sorted(_values_of(group).items())]
        lines.append(f"    params: {len(group['params'])} arrays, {total:,} elements")
    lines += _settings_of(optimizer)
    if optimizer.copied:
        lines.append(f"copied before steps, because held elsewhere: {optimizer.copied} arrays")
    return "\n".join([*lines, ")"])


def as_html(optimizer: Owner, state: Any) -> str:
    """A table of the groups, under the bytes of the state."""
    values = dict(optimizer.named_parameters())
    groups = optimizer.param_groups
    keys = list(dict.fromkeys(k for g in groups for k in _values_of(g)))
    head = "".join(f"<th>{html.escape(k)}</th>" for k in ["arrays", "elements", *keys])
    rows = []
    for group in groups:
        size = sum(values[n].size for n in group["params"])
        cells = [len(group["params"]), f"{size:,}"]
        cells += [_as_shown(group.get(k, "")) for k in keys]
        rows.append("".join(f"<td>{html.escape(str(c))}</td>" for c in cells))
    total = sum(x.nbytes for x in jax.tree.leaves(state))
    body = "".join(f"<tr><td>{i}</td>{row}</tr>" for i, row in enumerate(rows))
    title = html.escape(type(optimizer).__name__)
    settings = html.escape("".join(f"; {x}" for x in _settings_of(optimizer)))
    return (
        f"<table><caption><code>{title}</code>: {len(values)} arrays, "
        f"{total:,} bytes of state{settings}</caption>"
        f"<tr><th>group</th>{head}</tr>{body}</table>"
    )


def _settings_of(optimizer: Owner) -> list[str]:
    """What the whole optimizer does, beside its groups, where that is not the default."""
    values = {name: getattr(optimizer, name, None) for name in _SHOWN}
    return [
        f"{name}: {_as_shown(value) if hasattr(value, 'shape') else value}"
        for name, value in values.items()
        if not _is_default(value)
    ]


def _as_shown(value: Any) -> Any:
    return with_few_digits(plain_value(value))


def _is_default(value: Any) -> bool:
    is_plain = value is None or isinstance(value, bool | int | str | tuple)
    return is_plain and value in (None, False, "nearest", ())


def _values_of(group: Mapping[str, Any]) -> dict[str, Any]:
    return normalize({k: v for k, v in group.items() if k != "params"})
