"""Who is Muon's and who is Adam's: parameter groups for a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cerebras_jax.axes import EXAMPLES, check_axes
from cerebras_jax.checks import check
from cerebras_jax.optim.param_groups import ParamGroups, matching
from cerebras_jax.optim.roles import Role, roles, shapes_of

_ADAM = {"use_muon": False}


class MuonGroups(ParamGroups):
    """Parameter groups of Muon; printing them shows who got what."""

    def __str__(self) -> str:
        sizes = {name: math.prod(shape) for name, shape in shapes_of(self.tree).items()}
        rows = [("", "arrays", "elements", "")]
        for group in self:
            rest = {k: v for k, v in group.items() if k not in ("params", "axes", "use_muon")}
            who = "Adam" if group.get("use_muon") is False else f"Muon {group['axes']}"
            who = ", ".join([who, *(f"{k}={_short(v)}" for k, v in rest.items())])
            total = sum(sizes[name] for name in group["params"])
            rows.append((who, f"{len(group['params'])}", f"{total:,}", " ".join(group["params"])))
        widths = [max(len(row[k]) for row in rows) for k in range(3)]
        return "\n".join(
            f"{who:<{widths[0]}}  {count:>{widths[1]}}  {total:>{widths[2]}}  {names}".rstrip()
            for who, count, total, names in rows
        )


def muon_groups(
    params: Any,
    overrides: Mapping[str, str | Mapping[str, Any] | None] | None = None,
    *,
    lr: float | None = None,
    adam_lr: float | None = None,
    matrix_axes: str = "io",
) -> MuonGroups:
    """Groups for `Muon`: hidden matrices by their axes; embeddings, heads and vectors to Adam.

    In a module the types of the layers decide: kernels of dense layers, convolutions and einsums
    are matrices with known axes, grouped convolutions are split. Adam gets embeddings, depthwise
    convolutions, biases and norms. In a tree ranks decide, and names: ``kernel`` of rank 2 is a
    matrix, vectors, ``bias``, ``scale`` and what belongs to a norm is Adam's; axes of higher
    ranks are never guessed. In both, a path with a component such as ``embedding``, ``wte``,
    ``head``, ``lm_head`` or ``logits`` is Adam's; an output layer of another name needs an
    override.

    Args:
      params: a pytree of arrays or an nnx.Module.
      overrides: globs on dotted paths, the first that matches decides: axes, as ``"iiio"``; values
        of the group, as ``{"axes": "io", "split": 3}``; or None for Adam.
      lr: Muon's learning rate; None: the optimizer's.
      adam_lr: Adam's; needs lr. Its groups then have an ``adjust_learning_rate`` too, so that one
        schedule of lr serves both.
      matrix_axes: the axes of arrays of rank 2 in a tree; ``"oi"`` for torch's layout.

    Returns:
      groups to give to `Muon`; ``print`` shows them, and their ``transformation(optim.muon)``
      is the pure form.

    Raises:
      ValueError: if an array of rank > 2 has unknown axes, a pattern matches nothing, or adam_lr
        comes without lr.

    >>> import jax.numpy as jnp
    >>> params = {"wte": jnp.ones((50, 8)), "conv": {"kernel": jnp.ones((3, 3, 8, 8))},
    ...           "mlp": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
    >>> groups = muon_groups(params, {"conv.kernel": "iiio"}, lr=0.02, adam_lr=3e-4)
    >>> print(groups)
                                                 arrays  elements
    Muon iiio, lr=0.02                                1       576  conv.kernel
    Muon io, lr=0.02                                  1        64  mlp.kernel
    Adam, lr=0.0003, adjust_learning_rate=0.015       2       408  mlp.bias wte
    """
    check_axes(matrix_axes)
    rates = _rates(lr, adam_lr)
    shapes = shapes_of(params)
    given = {pattern: _values(pattern, value) for pattern, value in (overrides or {}).items()}
    for pattern in given:
        if not matching(pattern, [*shapes]):
            raise ValueError(f"overrides: pattern {pattern!r} matches none of {[*shapes][:8]}")
    groups: list[dict[str, Any]] = []
    for name, role in roles(params, matrix_axes).items():
        pattern = next((p for p in given if matching(p, [name])), None)
        if pattern is None and role.kind == "unknown":
            raise ValueError(
                f"overrides must say which axes of {name!r}, of shape {shapes[name]}, are reduced "
                f"(i), outputs (o) or stacked (b), for example {EXAMPLES}; or None, to leave it "
                "to Adam"
            )
        values = _of_role(role) if pattern is None else given[pattern]
        values = {**values, **rates["use_muon" in values]}
        for group in groups:
            if {k: v for k, v in group.items() if k != "params"} == values:
                group["params"].append(name)
                break
        else:
            groups.append({"params": [name], **values})
    return MuonGroups(params, sorted(groups, key=lambda group: "use_muon" in group))


def muon_values(params: Any) -> dict[str, dict[str, Any]]:
    """What `muon_groups` gives each parameter, by name; nothing, if its axes are not known.

    >>> import jax.numpy as jnp
    >>> muon_values({"wte": jnp.ones((50, 8)), "mlp": {"kernel": jnp.ones((8, 8))}})
    {'mlp.kernel': {'axes': 'io'}, 'wte': {'use_muon': False}}
    """
    return {name: _of_role(role) for name, role in roles(params).items()}


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _rates(lr: float | None, adam_lr: float | None) -> tuple[dict[str, float], dict[str, float]]:
    """Values of Muon's and of Adam's groups."""
    if lr is not None:
        check("lr", lr, "> 0")
    if adam_lr is None:
        both = {} if lr is None else {"lr": lr}
        return both, both
    if lr is None:
        raise ValueError(f"adam_lr={adam_lr} needs lr, to which it is a ratio")
    check("adam_lr", adam_lr, "> 0")
    return {"lr": lr}, {"lr": adam_lr, "adjust_learning_rate": adam_lr / lr}


def _values(pattern: str, value: Any) -> dict[str, Any]:
    if value is None:
        return dict(_ADAM)
    values = dict(value) if isinstance(value, Mapping) else {"axes": value}
    if values.get("use_muon") is False:
        return values
    values.pop("use_muon", None)
    values.setdefault("axes", "io")
    try:
        check_axes(values["axes"])
    except (TypeError, ValueError) as error:
        raise type(error)(f"overrides[{pattern!r}]: {error}") from None
    return values


def _of_role(role: Role) -> dict[str, Any]:
    if role.kind == "unknown":
        return {}
    if role.kind != "hidden":
        return dict(_ADAM)
    return {"axes": role.axes, **({"split": role.split} if role.split > 1 else {})}
