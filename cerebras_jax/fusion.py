"""XLA's multi-output fusion on CPU: the update and the new state in one pass over memory."""

import os
import re

import jax
import jax.numpy as jnp

_FLAG = "--xla_backend_extra_options="
_OPTION = "xla_cpu_use_multi_output_fusion"
_enabled = False


def enable_multi_output_fusion() -> None:
    """Lets XLA's CPU backend compute the update and the new state in one pass over memory.

    By default it makes a loop of its own for every result, and reads gradients and moments again
    in each: an AdamW step then moves 40 bytes per float32 parameter, where 28 are enough. XLA
    reads its flags once, so this comes before JAX is used for the first time::

        import cerebras_jax
        cerebras_jax.enable_multi_output_fusion()

    It adds an option to the environment variable ``XLA_FLAGS``, which holds for every program
    of the process, not only for optimizers; results may differ in the last bit. It starts JAX's
    backend, so in a cluster ``jax.distributed.initialize`` comes first. On GPU and TPU, XLA fuses
    like this by itself, and the call does nothing.

    Raises:
      RuntimeError: if a probe shows that XLA does not fuse: because JAX was used before, or
        because its version no longer has the option.
    """
    global _enabled
    if _enabled:
        return
    before = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = _with_option(before or "")
    if jax.default_backend() != "cpu":
        return
    if not _fuses():
        if before is None:
            del os.environ["XLA_FLAGS"]
        else:
            os.environ["XLA_FLAGS"] = before
        raise RuntimeError(
            "XLA does not fuse several results: enable_multi_output_fusion must be called before "
            "JAX is used for the first time (start Python, or the notebook's kernel, again), and "
            f"jaxlib must have the option {_OPTION}"
        )
    _enabled = True


def is_enabled() -> bool:
    """Whether updates are to be written so that XLA fuses them with the new state."""
    return _enabled


def _with_option(flags: str) -> str:
    """``flags`` with the option, added to other backend options where there are some."""
    words = flags.split()
    for i, word in enumerate(words):
        if word.startswith(_FLAG):
            options = word.removeprefix(_FLAG).split(",")
            words[i] = _FLAG + ",".join(dict.fromkeys([*filter(None, options), _OPTION]))
            return " ".join(words)
    return " ".join([*words, _FLAG + _OPTION])


def _fuses() -> bool:
    """Whether two results of one argument are compiled as one loop."""
    x = jax.ShapeDtypeStruct((1024,), jnp.float32)
    program = jax.jit(lambda x: (x + 1, x * 2)).lower(x).compile().as_text()
    return re.search(r"= \(f32\[1024\]\S*, f32\[1024\]\S*\) fusion\(", program or "") is not None
