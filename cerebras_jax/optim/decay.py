"""Which parameters get no weight decay: biases, and the scale and bias of normalisation layers."""

import re
from collections.abc import Callable
from typing import Any

from flax import nnx

from cerebras_jax.optim.selection import module_of

_NORM_LAYERS = (nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.GroupNorm)
_NORM_NAME = re.compile(r".*norm.*|(ln|bn|gn)([_\d].*)?", re.IGNORECASE)


def no_decay_rule(params: Any) -> Callable[[str], bool]:
    """A test of dotted names: whether a parameter of this tree or module gets no weight decay.

    Those are the parameters with ``bias`` anywhere in their name (``in_proj_bias``,
    ``relative_attention_bias.weight``), those called ``scale``, and those of normalisation
    layers: known by their type in an nnx.Module, and by a whole component of the name such as
    ``norm1``, ``LayerNorm_0``, ``ln_f`` or ``bn2``.

    >>> is_free = no_decay_rule({})
    >>> [is_free(n) for n in ("attn.in_proj_bias", "ln_f.weight", "dense.kernel")]
    [True, True, False]
    """
    norms, module = set(), module_of(params)
    if module is not None:
        norms = {
            ".".join(map(str, path))
            for path, node in nnx.iter_graph(module)
            if isinstance(node, _NORM_LAYERS)
        }

    def is_free(name: str) -> bool:
        *parents, last = name.split(".")
        return (
            "bias" in name.lower()
            or last == "scale"
            or ".".join(parents) in norms
            or bool(parents and _NORM_NAME.fullmatch(parents[-1]))
        )

    return is_free
