"""muP: learning rates that carry over from a narrow network to a wide one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cerebras_jax.axes import EXAMPLES, Layout, check_axes
from cerebras_jax.checks import check, check_choice, check_flag
from cerebras_jax.optim.algorithms.muon import SCALES
from cerebras_jax.optim.muon_groups import muon_groups
from cerebras_jax.optim.param_groups import ParamGroups, matching
from cerebras_jax.optim.roles import Role, roles, shapes_of

Shape = tuple[int, ...]


class Scale(NamedTuple):
    """What muP prescribes for one parameter, relative to the base network.

    Attributes:
      lr: factor of the learning rate.
      init: factor of the standard deviation at initialisation.
      output: factor of the layer's output; other than 1 for output layers only.
      width: ratio of the widths, by which gradients shrink.
    """

    lr: float = 1.0
    init: float = 1.0
    output: float = 1.0
    width: float = 1.0


class MupGroups(ParamGroups):
    """Parameter groups with muP's rates; printing them shows what each parameter got.

    Attributes:
      scales: a `Scale` for every parameter name.
    """

    def __init__(self, tree: Any, groups: Sequence[dict[str, Any]], scales: dict[str, Scale]):
        super().__init__(tree, groups)
        self.scales = scales

    def __str__(self) -> str:
        width = max(map(len, self.scales), default=0)
        head = f"{'':<{width}}  {'lr':>9}  {'init':>9}  {'output':>9}"
        rows = (
            f"{name:<{width}}  {s.lr:>9.6g}  {s.init:>9.6g}  {s.output:>9.6g}"
            for name, s in self.scales.items()
        )
        return "\n".join([head, *rows])


def mup(
    params: Any,
    base_params: Any,
    rule: str = "adam",
    *,
    delta_params: Any = None,
    axes: Mapping[str, str] | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    eps: float | None = None,
    keep_decay: bool = False,
    adjust_lr_fn: str | None = "spectral",
) -> MupGroups:
    r"""The maximal update parametrisation: what to scale in a network wider than a base network.

    An axis is wide if its size differs from that of the base network, there or in delta_params.
    With m_in and m_out the ratios of a matrix's inputs and outputs, the factors are

    ==================================  ==========  ============  ============  ========
    wide axes                           lr of Adam  lr of SGD     init          output
    ==================================  ==========  ============  ============  ========
    inputs and outputs (hidden)         1/m_in      m_out/m_in    m_in^(-1/2)   1
    outputs (embedding, bias, norm)     1           m_out         1             1
    inputs (output layer)               1           m_in          1             1/m_in
    none                                1           1             1             1
    ==================================  ==========  ============  ============  ========

    With rule="muon", the matrices that `muon_groups` gives to Muon get the factor that keeps the
    spectral norm of their steps in proportion to :math:`\sqrt{out/in}`: 1 with adjust_lr_fn
    "spectral", and :math:`m^{-1/2}` with "match_rms_adamw", whose steps grow with the width. The
    others get Adam's.

    The model is left alone: multiply its initial deviations and outputs by the factors, and scale
    attention logits by 1/d instead of 1/sqrt(d). A tied embedding keeps Adam's 1, and needs the
    output factor where it is the output layer.

    "adam" serves all optimizers whose steps do not depend on the gradient's scale, such as Lion.
    Adafactor and Lamb scale their steps by the parameter already: muP's factors are not theirs.

    Args:
      params: the wide network: a pytree of arrays or shapes, an nnx.Module, or groups made of one
        by `param_groups` or `muon_groups`, which are split further.
      base_params: the base network, for which the rates were found: the same names and ranks. Only
        shapes are read; ``jax.eval_shape(init)`` is enough.
      rule: "adam", "sgd" or "muon".
      delta_params: the base network with all widths changed, where some of params' widths are
        the base's: it tells that they could be others.
      axes: globs on dotted paths -> one letter per axis (see `muon`), where layers and names do not
        tell; other matrices are "io".
      lr: the base learning rate; None: groups get only the factor ``adjust_learning_rate``, for
        `ScalePerParamLR`.
      weight_decay: the base decay, for keep_decay.
      eps: Adam's base eps; groups get it divided by the ratio of widths, as gradients shrink.
      keep_decay: divide weight_decay by the factor, so that lr times decay stays.
      adjust_lr_fn: Muon's, for rule="muon"; its groups get it too.

    Returns:
      groups for an optimizer, with ``scales`` per parameter; print them.

    Raises:
      ValueError: if names or ranks differ, a stacking axis is wide, or the axes of a wide array of
        rank > 2 are not known.

    References:
      Yang et al., Tensor Programs V, https://arxiv.org/abs/2203.03466; Yang, Simon and Bernstein,
      A Spectral Condition for Feature Learning, https://arxiv.org/abs/2310.17813

    >>> import jax
    >>> def shapes(width):
    ...     f32 = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
    ...     return {"embed": f32(50, width), "dense": {"kernel": f32(width, 4 * width)},
    ...             "head": f32(width, 10)}
    >>> groups = mup(shapes(256), shapes(64), lr=0.01)
    >>> print(groups)
                         lr       init     output
    dense.kernel       0.25        0.5          1
    embed                 1          1          1
    head                  1          1       0.25
    >>> dict(groups[0])
    {'params': ('dense.kernel',), 'lr': 0.0025, 'adjust_learning_rate': 0.25}
    """
    if rule not in ("adam", "sgd", "muon"):
        raise ValueError(
            f"rule must be adam, sgd or muon, got {rule!r}; optimizers whose steps scale with the "
            "parameter, as Adafactor's and Lamb's, have no muP factors"
        )
    if adjust_lr_fn is not None:
        check_choice("adjust_lr_fn", adjust_lr_fn, [*filter(None, SCALES)])
    check_flag("keep_decay", keep_decay)
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
        if value is not None:
            check(name, value, ">= 0")
    given = _groups_of(params, rule)
    shapes, base = shapes_of(given.tree), shapes_of(base_params)
    delta = base if delta_params is None else shapes_of(delta_params)
    _check_same(shapes, base, "base_params")
    _check_same(shapes, delta, "delta_params")
    letters_of = _letters(given, shapes, axes or {})
    eps_key = "adam_eps" if rule == "muon" else "eps"
    scales: dict[str, Scale] = {}
    groups: list[dict[str, Any]] = []
    for group in given:
        own = {k: v for k, v in group.items() if k != "params"}
        is_muons = rule == "muon" and own.get("use_muon") is not False
        for name in group["params"]:
            letters = letters_of[name]
            scale = _scale(name, shapes[name], base[name], delta[name], letters, rule)
            if is_muons:
                layout = Layout(letters or "io", own.get("split", 1))
                factor = _muon_factor(shapes[name], base[name], layout, SCALES[adjust_lr_fn])
                scale = scale._replace(lr=factor / scale.output)
            scales[name] = scale
            values = {"lr": lr, "weight_decay": weight_decay, eps_key: eps, **own}
            if is_muons:
                values["adjust_lr_fn"] = adjust_lr_fn
            factors = {"lr": scale.lr, eps_key: 1 / scale.width}
            if keep_decay:
                factors["weight_decay"] = 1 / scale.lr
            _add(groups, name, _scaled(values, factors))
    return MupGroups(given.tree, groups, {name: scales[name] for name in shapes})


def _groups_of(params: Any, rule: str) -> ParamGroups:
    if isinstance(params, ParamGroups):
        return params
    if rule == "muon":
        return muon_groups(params)
    return ParamGroups(params, [{"params": [*shapes_of(params)]}])


def _check_same(shapes: Mapping[str, Shape], base: Mapping[str, Shape], what: str) -> None:
    missing, extra = sorted(set(shapes) - set(base)), sorted(set(base) - set(shapes))
    if missing or extra:
        raise ValueError(
            f"{what} must have the names of params; missing: {missing[:5]}; unexpected: {extra[:5]}"
        )
    for name, shape in shapes.items():
        if len(shape) != len(base[name]):
            raise ValueError(f"{name!r} has shape {shape}, in {what} {base[name]}")


def _letters(
    groups: ParamGroups, shapes: Mapping[str, Shape], axes: Mapping[str, str]
) -> dict[str, str | None]:
    """One letter per axis of every parameter: what the user, the group or the layer says."""
    for pattern, letters in axes.items():
        check_axes(letters)
        if not matching(pattern, [*shapes]):
            raise ValueError(f"axes: pattern {pattern!r} matches none of {[*shapes][:8]}")
    known = roles(groups.tree)
    result = {}
    for group in groups:
        for name in group["params"]:
            given = next((a for p, a in axes.items() if matching(p, [name])), group.get("axes"))
            if given is not None and len(given) == len(shapes[name]):
                result[name] = given
            else:
                result[name] = _own_letters(known[name], len(shapes[name]))
    return result


def _own_letters(role: Role, rank: int) -> str | None:
    return "o" * rank if role.kind == "vector" else role.axes


def _scale(
    name: str, shape: Shape, base: Shape, delta: Shape, letters: str | None, rule: str
) -> Scale:
    is_wide = [n != b or d != b for n, b, d in zip(shape, base, delta, strict=True)]
    if not any(is_wide):
        return Scale()
    if letters is None:
        raise ValueError(
            f"axes must say which axes of {name!r}, of shape {shape}, are reduced (i) or outputs "
            f"(o), for example {EXAMPLES}"
        )
    wide = {letter for letter, w in zip(letters, is_wide, strict=True) if w}
    if "b" in wide:
        raise ValueError(
            f"{name!r} has shape {shape}, in base_params {base}: networks may differ in widths, "
            f"not in the axes that stack matrices, b in {letters!r}"
        )
    ratios = [n / b if n != b else 1.0 for n, b in zip(shape, base, strict=True)]
    m_in, m_out = (
        math.prod(r for r, a in zip(ratios, letters, strict=True) if a == x) for x in "io"
    )
    is_output = wide == {"i"}
    if rule == "sgd":
        lr = m_in if is_output else m_out / m_in
    else:
        lr = 1.0 if is_output else 1 / m_in
    init = 1.0 if is_output else m_in**-0.5
    return Scale(lr, init, 1 / m_in if is_output else 1.0, m_in if "i" in wide else m_out)


def _muon_factor(
    shape: Shape, base: Shape, layout: Layout, scale: Callable[[int, int], float]
) -> float:
    """What keeps the spectral norm of Muon's step in proportion to sqrt(outputs / inputs)."""

    def excess(shape: Shape) -> float:
        n_in, n_out = layout.matrix_shape(shape)[-2:]
        return scale(n_in, n_out) / math.sqrt(n_out / n_in)

    return excess(base) / excess(shape)


def _scaled(values: Mapping[str, Any], factors: Mapping[str, float]) -> dict[str, Any]:
    """A group's values times their factors; those that are None stay the optimizer's own."""
    values = {k: v for k, v in values.items() if v is not None}
    result = {k: v * factors[k] if k in factors else v for k, v in values.items()}
    factor = values.get("adjust_learning_rate", 1.0) * factors["lr"]
    return result if factor == 1 else {**result, "adjust_learning_rate": factor}


def _add(groups: list[dict[str, Any]], name: str, values: dict[str, Any]) -> None:
    """Puts a parameter into the group with these values, or into a new one."""
    for group in groups:
        if {k: v for k, v in group.items() if k != "params"} == values:
            group["params"].append(name)
            return
    groups.append({"params": [name], **values})
