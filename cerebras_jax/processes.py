"""Several processes that train together: what each of them holds for itself must be equal."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cerebras_jax.checks import is_number, is_traced


def is_first() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return jax.process_index() == 0


def from_first(make: Callable[[], str]) -> str:
    """What ``make`` returns on process 0, which alone calls it; all of them must call this.

    Raises:
      Exception: on process 0, what ``make`` raises.
      ValueError: on the others, if it raised, with its text.
    """
    if jax.process_count() == 1:
        return make()
    error, answer = None, {}
    if is_first():
        try:
            answer = {"made": make()}
        except Exception as raised:
            error, answer = raised, {"error": str(raised)}
    answer = json.loads(_broadcast(json.dumps(answer).encode()))
    if error is not None:
        raise error
    if "error" in answer:
        raise ValueError(f"process 0: {answer['error']}")
    return answer["made"]


def _broadcast(data: bytes) -> bytes:
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.frombuffer(data[:size].ljust(size), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded)))


def meet(where: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


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
