"""muP in Model Zoo configurations: factors of learning rates that follow from the model section.

From release 2.3 on a configuration names the widths of a base model, and each family of models
derives the factors of its groups of layers from them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple


class LayerGroup(NamedTuple):
    """A group of layers with a learning rate of its own.

    Attributes:
      factor: of the learning rate.
      patterns: globs on parameter names, in torch's and in flax's words.
    """

    factor: float
    patterns: tuple[str, ...]


_FFN_IN = "*{}*ffn.ffn.[!1]*weight"
_FFN_OUT = "*{}*ffn.ffn.[1]*weight"
_EXPERTS_IN = "*{}*ffn.ffn.[!1]*expert_weights"
_EXPERTS_OUT = "*{}*ffn.ffn.[1]*expert_weights"

_DECODER = {
    "embedding": ("*embedding*weight",),
    "decoder_kernel": (
        "*decoder*dense*weight", "*decoder*linear*weight", "*decoder*linear*expert_weights",
    ),
    "decoder_attention": ("*decoder*attn*dense*weight",),
    "decoder_input_ffn": (_FFN_IN.format("decoder"), _EXPERTS_IN.format("decoder")),
    "decoder_output_ffn": (_FFN_OUT.format("decoder"), _EXPERTS_OUT.format("decoder")),
}  # fmt: skip
_BERT = {
    "embedding": ("*embedding*weight",),
    "encoder_attention": ("*transformer_encoder*attn*dense*weight",),
    "encoder_input_ffn": (_FFN_IN.format("transformer_encoder"),),
    "encoder_output_ffn": (_FFN_OUT.format("transformer_encoder"),),
    "pooler": ("*pooler*weight",),
}
_T5 = {"embedding": ("*embedding*weight",), "lm_head": ("*lm_head*weight",)}
for _side in ("decoder", "encoder"):
    _T5 |= {
        f"{_side}_qkv_projection": tuple(f"*{_side}*attn.proj_{x}*dense*weight" for x in "qkv"),
        f"{_side}_output_projection": (f"*{_side}*attn.proj_output*dense*weight",),
        f"{_side}_input_ffn": (_FFN_IN.format(_side),),
        f"{_side}_output_ffn": (_FFN_OUT.format(_side),),
    }
FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {"decoder": _DECODER, "bert": _BERT, "t5": _T5}
"""The groups of each family: GPT-like decoders, BERT, and T5 with the original Transformer."""

_T5_KEYS = {"d_model", "mup_base_d_model", "mup_base_d_ff"}
_BERT_KEYS = {"disable_nsp", "mlm_nonlinearity", "pooler_nonlinearity", "encoder_nonlinearity"}


def family_of(model: Mapping[str, Any]) -> str:
    """The family of a model section: "decoder", "bert" or "t5", by its name or its keys.

    >>> family_of({"name": "gptj"}), family_of({"disable_nsp": True}), family_of({"d_model": 512})
    ('decoder', 'bert', 't5')
    """
    name = str(model.get("name", "")).lower()
    if name in ("t5", "transformer") or _T5_KEYS & set(model):
        return "t5"
    return "bert" if "bert" in name or _BERT_KEYS & set(model) else "decoder"


def mup_factors(model: Mapping[str, Any], family: str | None = None) -> dict[str, float]:
    """Factors of learning rates by group of layers, from the widths in a model section.

    Args:
      model: the section, of which are read ``hidden_size``, ``filter_size``,
        ``mup_base_hidden_size`` and ``mup_base_filter_size``; of T5 ``d_model``, ``d_ff``,
        ``d_kv``, their ``mup_base_`` widths, and ``use_transformer_initialization``.
      family: a key of `FAMILIES`; None: `family_of` the section.

    Returns:
      the factors that are not 1; none without base widths.

    Raises:
      ValueError: if there is no such family, or a width is missing or not > 0.

    >>> mup_factors({"hidden_size": 768, "mup_base_hidden_size": 256})
    {'decoder_attention': 0.3333333333333333, 'decoder_input_ffn': 0.3333333333333333}
    """
    family = family_of(model) if family is None else family
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {[*FAMILIES]}, got {family!r}")
    factors = _t5(model) if family == "t5" else _by_hidden_and_filter(model, family)
    return {group: factor for group, factor in factors.items() if factor != 1}


def mup_layers(
    model: Mapping[str, Any],
    adjust_learning_rate: Mapping[str, float] | None = None,
    family: str | None = None,
) -> dict[str, LayerGroup]:
    """The groups of layers whose learning rate is scaled, with the globs that find them.

    Args:
      model: the model section; see `mup_factors`.
      adjust_learning_rate: factors by group that the configuration spells out. They win, with a
        warning where the widths say something else.
      family: see `mup_factors`.

    Returns:
      name -> `LayerGroup`, without those of factor 1; equal factors come as one group, under the
      first of the names.

    Raises:
      ValueError: if the family has no group of that name.

    >>> mup_layers({"hidden_size": 512, "mup_base_hidden_size": 256})["decoder_attention"].factor
    0.5
    """
    family = family_of(model) if family is None else family
    factors = mup_factors(model, family)
    patterns = FAMILIES[family]
    for name, factor in (adjust_learning_rate or {}).items():
        if name not in patterns:
            raise ValueError(
                f"adjust_learning_rate: {name!r} is no group of a {family} model, which has "
                f"{sorted(patterns)}"
            )
        if name in factors and not math.isclose(factors[name], factor, rel_tol=1e-6):
            warnings.warn(
                f"adjust_learning_rate[{name!r}] is {factor}, the widths say {factors[name]:.6g}",
                stacklevel=2,
            )
        factors[name] = factor
    result: dict[str, LayerGroup] = {}
    for name in (name for name in patterns if factors.get(name, 1) != 1):
        group = LayerGroup(factors[name], tuple(_both(patterns[name])))
        same = (n for n, g in result.items() if math.isclose(g.factor, group.factor, rel_tol=1e-6))
        first = next(same, None)
        if first is None:
            result[name] = group
        else:
            result[first] = result[first]._replace(
                patterns=(*result[first].patterns, *group.patterns)
            )
    return result


def _both(patterns: tuple[str, ...]) -> list[str]:
    """Globs in torch's words, then in those of flax: kernel for weight, embedding for a table's."""
    flax = [p.replace("weight", "kernel") for p in patterns if p.endswith("*weight")]
    tables = ["*embedding"] if "*embedding*weight" in patterns else []
    return [*patterns, *flax, *tables]


def _by_hidden_and_filter(model: Mapping[str, Any], family: str) -> dict[str, float]:
    by_hidden = {
        "decoder": ("decoder_attention", "decoder_input_ffn"),
        "bert": ("encoder_attention", "encoder_input_ffn", "pooler"),
    }[family]
    by_filter = {"decoder": "decoder_output_ffn", "bert": "encoder_output_ffn"}[family]
    hidden, filters = _ratio(model, "hidden_size"), _ratio(model, "filter_size")
    return {**dict.fromkeys(by_hidden, hidden), by_filter: filters}


def _t5(model: Mapping[str, Any]) -> dict[str, float]:
    if model.get("use_transformer_initialization"):
        return {}
    factors = {}
    width = _ratio(model, "d_model")
    varies_d_kv = bool(model.get("mup_base_d_kv"))
    if width != 1:
        factors |= {"embedding": width**0.5, "lm_head": width**0.5}
    for side in ("decoder", "encoder"):
        if model.get("mup_base_d_model"):
            factors[f"{side}_input_ffn"] = width
            factors[f"{side}_qkv_projection"] = width if varies_d_kv else width**0.5
            factors[f"{side}_output_projection"] = (
                _ratio(model, "d_kv") if varies_d_kv else width**0.5
            )
        factors[f"{side}_output_ffn"] = _ratio(model, "d_ff")
    return factors


def _ratio(model: Mapping[str, Any], key: str) -> float:
    """The base model's width over the model's; 1 if no base is named."""
    base_key = f"mup_base_{key}"
    if not model.get(base_key):
        return 1.0
    if model.get(key) is None:
        raise ValueError(f"model.{base_key} needs model.{key}, which is missing")
    widths = []
    for name in (base_key, key):
        try:
            widths.append(float(model[name]))
        except (TypeError, ValueError):
            raise ValueError(f"model.{name} must be a number, got {model[name]!r}") from None
        if not (math.isfinite(widths[-1]) and widths[-1] > 0):
            raise ValueError(f"model.{name} must be > 0, got {widths[-1]:g}")
    # The quotient the other way round is what the original computes.
    return 1 / (widths[1] / widths[0])
