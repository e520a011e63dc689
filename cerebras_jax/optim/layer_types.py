"""Layer types that ``adjust_learning_rate`` may name, and the factors of muP models."""

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cerebras_jax.checks import check
from cerebras_jax.messages import shown
from cerebras_jax.optim.names import to_number


def _any_of(*patterns: str) -> Callable[[str], bool]:
    return lambda name: any(fnmatch.fnmatchcase(name, p) for p in patterns)


def _weights(*layers: str) -> list[str]:
    """Globs for the matrices of layers with one of these names, in flax and elsewhere."""
    return [f"*{layer}.{leaf}" for layer in layers for leaf in ("kernel", "weight")]


def _is_decoder_kernel(name: str) -> bool:
    lower = name.lower()
    return ("weight" in lower or "kernel" in lower) and ("linear" in lower or "dense" in lower)


def _is_embedding(name: str) -> bool:
    return any("embed" in part for part in name.lower().split("."))


# First the Model Zoo's own globs, then the names that JAX models usually give.
_ATTENTION = ["*attn*kernel", "*attention*kernel"]
_INPUT_FFN = ["*ffn.ffn.[!1]*kernel"] + _weights(
    *("dense_in", "fc_in", "c_fc", "fc1", "linear1", "up_proj", "gate_proj", "intermediate.dense"),
    *("wi", "wi_[0-9]", "mlp.Dense_0", "ffn.Dense_0", "mlp.layers.0", "ffn.layers.0"),
)
_OUTPUT_FFN = ["*ffn.ffn.[1]*kernel"] + _weights(
    *("dense_out", "fc_out", "mlp.c_proj", "fc2", "linear2", "down_proj", "[0-9].output.dense"),
    *("wo", "mlp.Dense_1", "ffn.Dense_1", "mlp.layers.1", "ffn.layers.1"),
)
LAYER_TYPES: dict[str, Callable[[str], bool]] = {
    "decoder_kernel": _is_decoder_kernel,
    "embedding": _is_embedding,
    "decoder_attention": _any_of("*decoder*attn*dense*weight", *_ATTENTION),
    "decoder_input_ffn": _any_of(
        "*decoder*ffn.ffn.[!1]*weight", "*decoder*ffn.ffn.[!1]*expert_weights", *_INPUT_FFN
    ),
    "decoder_output_ffn": _any_of(
        "*decoder*ffn.ffn.[1]*weight", "*decoder*ffn.ffn.[1]*expert_weights", *_OUTPUT_FFN
    ),
    "encoder_attention": _any_of("*transformer_encoder*attn*dense*weight", *_ATTENTION),
    "encoder_input_ffn": _any_of("*encoder.layers*ffn.ffn.[!1]*weight", *_INPUT_FFN),
    "encoder_output_ffn": _any_of("*encoder.layers*ffn.ffn.[1]*weight", *_OUTPUT_FFN),
    "pooler": _any_of("*pooler*weight", "*pooler*kernel"),
    "lm_head": _any_of("*lm_head*weight", "*lm_head*kernel"),
}
for _side in ("decoder", "encoder"):  # T5 and the original Transformer
    LAYER_TYPES |= {
        f"{_side}_qkv_projection": _any_of(
            *(f"*{_side}*attn.proj_{x}*dense*weight" for x in "qkv"),
            *(
                f"*{_side}*{x}.kernel"
                for x in ("query", "key", "value", "[qkv]_proj", "proj_[qkv]")
            ),
        ),
        f"{_side}_output_projection": _any_of(
            f"*{_side}*attn.proj_output*dense*weight",
            *(f"*{_side}*att*{x}.kernel" for x in ("out", "o_proj", "out_proj", "proj_output")),
        ),
    }


def layer_names(layer_type: str | Sequence[str], names: Sequence[str]) -> list[str]:
    """The parameters of a layer type, or those that a glob or one of several globs matches.

    Raises:
      ValueError: if there are none.
    """
    patterns = [layer_type] if isinstance(layer_type, str) else list(layer_type)
    tests = [LAYER_TYPES.get(pattern) or _any_of(pattern) for pattern in patterns]
    found = [n for n in names if any(test(n) for test in tests)]
    if not found:
        raise ValueError(
            f"adjust_learning_rate: {shown(layer_type)} is neither a layer type with parameters "
            f"here ({sorted(LAYER_TYPES)}) nor a pattern that matches one of "
            f"{shown(list(names))}; give a pattern of your own, and None to a type to leave out"
        )
    return found


def mup_factors(model: Mapping[str, Any]) -> dict[str, float]:
    r"""The factors of the learning rate by which a model section asks for muP.

    With :math:`m_h` = ``hidden_size / mup_base_hidden_size`` and :math:`m_f` = ``filter_size /
    mup_base_filter_size`` attention and the first layer of a feed-forward network (and BERT's
    pooler) learn at :math:`1/m_h` of the rate, its second layer at :math:`1/m_f`, as in the Model
    Zoo from release 2.3 on. T5 has ``d_model``, ``d_ff`` and ``d_kv`` for widths; its embeddings,
    output layer and, unless d_kv varies, attention learn at the root of :math:`1/m`. A factor of 1
    is left out.

    Args:
      model: the section ``model`` of a configuration.

    Returns:
      Layer types to factors, as for ``adjust_learning_rate``.

    Raises:
      ValueError: if a size is missing or not a number above 0.

    References:
      Yang et al., Tensor Programs V, https://arxiv.org/abs/2203.03466

    >>> mup_factors({"hidden_size": 768, "mup_base_hidden_size": 256})
    {'decoder_attention': 0.3333333333333333, 'decoder_input_ffn': 0.3333333333333333}
    """
    if _T5_WIDTHS & set(model):
        return {
            k: v for k, v in _t5_factors(model).items() if not math.isclose(v, 1.0, rel_tol=1e-6)
        }
    name = model.get("name")
    is_bert = "encoder_nonlinearity" in model or (isinstance(name, str) and "bert" in name.lower())
    side = "encoder" if is_bert else "decoder"
    hidden, filter = _inverse_width(model, "hidden_size"), _inverse_width(model, "filter_size")
    if math.isclose(hidden, filter, rel_tol=1e-6):  # bases are rounded to some digits
        filter = hidden
    factors = {f"{side}_attention": hidden, f"{side}_input_ffn": hidden}
    if is_bert:
        factors["pooler"] = hidden
    factors[f"{side}_output_ffn"] = filter
    return {k: v for k, v in factors.items() if not math.isclose(v, 1.0, rel_tol=1e-6)}


_T5_WIDTHS = {"d_model", "mup_base_d_model", "mup_base_d_ff"}


def _t5_factors(model: Mapping[str, Any]) -> dict[str, float]:
    if model.get("use_transformer_initialization"):
        return {}
    factors: dict[str, float] = {}
    if model.get("mup_base_d_model") is not None:
        width = _inverse_width(model, "d_model")
        factors = {"embedding": width**0.5, "lm_head": width**0.5}
        inner = output = width**0.5
        if model.get("mup_base_d_kv") is not None:
            inner, output = width, _inverse_width(model, "d_kv")
        for side in ("decoder", "encoder"):
            factors[f"{side}_input_ffn"] = width
            factors[f"{side}_qkv_projection"] = inner
            factors[f"{side}_output_projection"] = output
    filter = _inverse_width(model, "d_ff")
    return factors | {"decoder_output_ffn": filter, "encoder_output_ffn": filter}


def _inverse_width(model: Mapping[str, Any], key: str) -> float:
    """The base model's size over the model's; 1 where there is no base."""
    sizes = []
    if model.get(f"mup_base_{key}") is None:
        return 1.0
    for name in (f"mup_base_{key}", key):
        if model.get(name) is None:
            raise ValueError(f"model.{name} must be given beside model.mup_base_{key}, got None")
        size = to_number(f"model.{name}", model[name])
        check(f"model.{name}", size, "> 0")
        sizes.append(float(size))
    return sizes[0] / sizes[1]
