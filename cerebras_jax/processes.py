"""Several processes that train together: what each of them holds for itself must be equal."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cerebras_jax.checks import is_number, is_traced


def check_equal(text: str, what: str) -> None:
    """Compares a text among all processes; all of them must call this.

    Raises:
      ValueError: on every process, and says which ones differ from the first.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    differing = [i for i, other in enumerate(digests) if (other != digests[0]).any()]
    if differing:
        raise ValueError(f"processes {differing} hold other numbers than process 0 in {what}")


def check_equal_numbers(tree: Any, what: str) -> None:
    """Compares the numbers, flags and words in a tree; see `check_equal`."""
    if jax.process_count() == 1:
        return
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
    check_equal(repr([_plain(x) for x in leaves if _is_plain(x)]), what)


def _is_plain(x: Any) -> bool:
    return not is_traced(x) and (x is None or isinstance(x, bool | str) or is_number(x))


def _plain(x: Any) -> Any:
    return float(np.asarray(x)) if is_number(x) else x
