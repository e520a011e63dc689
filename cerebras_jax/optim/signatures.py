"""Signatures and docstrings of the classes that are made of pure functions."""

import inspect
from collections.abc import Callable
from typing import Any

from cerebras_jax.optim.makers import ForeignMaker, Maker

_KEYWORDS = {
    "enable_global_step": False,
    "state_dtype": None,
    "rounding": "nearest",
    "pack": False,
    "around": (),
    "donate": "auto",
    "zero_axis": None,
    "state_memory": None,
}


def signature_of(maker: Maker, counts_steps: bool) -> inspect.Signature:
    """That of the class form: the parameters, the factory's arguments, and those of the shell."""
    kinds = inspect.Parameter
    defaults = {**_KEYWORDS, "enable_global_step": counts_steps}
    if isinstance(maker, ForeignMaker):
        for name in ("enable_global_step", "state_dtype", "rounding", "pack"):
            del defaults[name]
    factory = [p for p in maker.signature().parameters.values() if p.kind is not kinds.VAR_KEYWORD]
    own = [
        kinds("params", kinds.POSITIONAL_OR_KEYWORD),
        *factory,
        *(kinds(k, kinds.KEYWORD_ONLY, default=v) for k, v in defaults.items()),
    ]
    return inspect.Signature(own)


def doc_of(pure: Callable[..., Any]) -> str:
    """That of the class form of a pure function."""
    name = getattr(pure, "__name__", "optimizer")
    doc = (inspect.getdoc(pure) or name).split("\n\n>>>")[0]
    return f"The optimizer `{name}` as a class that owns its parameters; see `Optimizer`.\n\n{doc}"
