"""What is known about XLA's CPU backend: which loops it makes of an update, and which copies.

On other backends an update is the plain rule: they fuse several results by themselves.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cerebras_jax.types import Array

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
    of the process, not only for optimizers: results may differ in the last bit, and the steps of a
    model may get slower, as those of a small GPT do, so measure whole steps. It starts JAX's
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


# --- one leaf -------------------------------------------------------------------------------------


def arranged(
    new: Any,
    written_last: Sequence[str],
    run: Callable[[Any, Array], tuple[Array, Any]],
    numbers: Any,
    g: Array,
    p: Array,
    u: Array,
) -> Any:
    """The new state of one leaf, computed in the order that XLA's CPU backend needs.

    Args:
      new: the state as the plain rule gave it.
      written_last: see `Rule`.
      run: the plain rule: ``run(numbers, g) -> (update, new state)``.
      numbers: a tree of scalars.
      g: the gradient.
      p: the parameter, as it is stored.
      u: the update, as it is stored.
    """
    if not _has_an_element_at_hand(p):
        return new
    if is_enabled():
        # Each result on its own: none waits for what another also needs, and XLA makes one loop.
        for k, name in enumerate(new._fields):
            _, apart = run(*_after(g, (numbers, g), k + 1))
            new = new._replace(**{name: getattr(apart, name)})
        return new
    done = p + u if written_last else p
    for name in written_last:
        _, later = run(*_after(done, (numbers, g)))
        done = getattr(later, name)
        new = new._replace(**{name: done})
    return new


def _has_an_element_at_hand(p: Array) -> bool:
    """Whether `_after` can read an element of p: it is neither empty nor known as sharded."""
    return p.size > 0 and jax.typeof(p).sharding.mesh.empty


def _after(done: Array, tree: Any, k: int = 0) -> Any:
    """The same values, but on CPU known only when the array ``done`` is, and another expression
    for every k, so that XLA does not see that they are the same.

    An optimization barrier would say both, but XLA's CPU backend drops it before it decides what
    to fuse and what to copy.
    """

    def late(done: Array, tree: Any) -> Any:
        bits = jax.lax.bitcast_convert_type(done.real.ravel()[0].astype(jnp.float32), jnp.uint32)
        one = 1 + (bits >> (31 - k) >> (1 + k))  # whatever the bits: all 32 are shifted out
        return jax.tree.map(lambda x: x / one.astype(x.dtype), tree)

    return jax.lax.platform_dependent(done, tree, cpu=late, default=lambda done, tree: tree)
