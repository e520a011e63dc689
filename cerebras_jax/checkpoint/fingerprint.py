"""A check of numbers that depends neither on a file format nor on where the numbers lie."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cerebras_jax.checks import is_traced
from cerebras_jax.engine.memory import on_device
from cerebras_jax.engine.trees import path_name

_BLOCK = 1 << 12  # elements that share one factor of their weights
_SALTS = (0x243F6A88, 0x85A308D3)  # of the two sums
_CHUNK = 64 * _BLOCK  # elements that the host looks at together


def fingerprint(tree: Any) -> dict[str, str]:
    """A fingerprint of every array in a tree: 16 hexadecimal digits by dotted path.

    Two sums, modulo :math:`2^{32}`, of the elements' bits times odd weights that depend on the
    place in the array. Sums that wrap around have no order, so the value is the same however an
    array is sharded and by however many processes. A single changed element is found with
    certainty, since an odd factor can be undone; other changes, almost always. Hosts, replicas
    and runs can be compared by it.

    Args:
      tree: arrays of JAX or NumPy, also typed PRNG keys. Dtype and shape are not part of the value.

    Raises:
      TypeError: if a leaf is no array.

    >>> a, b = fingerprint({"w": np.float32([1, 2])}), fingerprint({"w": jnp.array([1.0, 2.0])})
    >>> a == b, a == fingerprint({"w": jnp.array([2.0, 1.0])})
    (True, False)
    """
    paths, leaves = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int):
            hint = (
                "; of opt.state, give opt.state_dict()['state']"
                if isinstance(leaf, Mapping)
                else ""
            )
            raise TypeError(
                f"fingerprint takes arrays, {path_name(path)!r} is {type(leaf).__name__}{hint}"
            )
        if is_traced(leaf):
            raise TypeError("fingerprint reads values, which a traced function has not")
        paths.append(path_name(path))
        leaves.append(leaf if isinstance(leaf, jax.Array) else np.asarray(leaf))
    return dict(zip(paths, fingerprints(leaves), strict=True))


def fingerprints(arrays: Sequence[jax.Array | np.ndarray]) -> list[str]:
    """The fingerprint of each array; on accelerators, all are started before one is waited for."""
    started = []
    for x in arrays:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        host = _on_host(x)
        started.append(_device_sums(x) if host is None else _host_sums(_words(host)))
        if host is None and jax.default_backend() == "cpu":
            # Programs of several devices wait for each other, and would take all of XLA's threads.
            jax.block_until_ready(started[-1])
    return ["".join(f"{int(n):08x}" for n in np.asarray(pair)) for pair in started]


def _on_host(x: Any) -> np.ndarray | None:
    """The array's own memory, if this process can read all of it where it is."""
    if not isinstance(x, jax.Array):
        return np.asarray(x)
    if any(device.platform != "cpu" for device in x.sharding.device_set):
        return None
    # Through an array of its own, or the view would be kept and the buffer could not be given away.
    is_one_piece = x.is_fully_replicated and x.addressable_shards
    return np.asarray(x.addressable_data(0)) if is_one_piece else None


def _mix(n: Any, salt: int) -> Any:
    """An odd pseudo-random factor for every n."""
    n = (n + np.uint32(salt)) * np.uint32(0x9E3779B1)
    n = (n ^ (n >> np.uint32(15))) * np.uint32(0x85EBCA6B)
    return (n ^ (n >> np.uint32(13))) | np.uint32(1)


# --- on the host ----------------------------------------------------------------------------------


def _words(x: np.ndarray) -> np.ndarray:
    """The bits of every element, as unsigned integers of at most 32 bits in one dimension."""
    x = np.ascontiguousarray(x).reshape(-1)
    if x.dtype == bool:
        return x.view(np.uint8)
    if jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8:
        return x.astype(np.int8).view(np.uint8) & np.uint8((1 << jnp.iinfo(x.dtype).bits) - 1)
    return x.view({1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32))


@functools.cache
def _table(salt: int) -> np.ndarray:
    return _mix(np.arange(_BLOCK, dtype=np.uint32), salt)


def _host_sums(words: np.ndarray) -> np.ndarray:
    totals = np.zeros(2, np.uint32)
    for start in range(0, words.size, _CHUNK):
        chunk = words[start : start + _CHUNK].astype(np.uint32, copy=False)
        chunk = chunk ^ (chunk >> np.uint32(16))
        if chunk.size % _BLOCK:
            chunk = np.pad(chunk, (0, -chunk.size % _BLOCK))
        rows = chunk.reshape(-1, _BLOCK)
        block = np.arange(len(rows), dtype=np.uint32) + np.uint32(start // _BLOCK % 2**20)
        for i, salt in enumerate(_SALTS):
            sums = np.einsum("ij,j->i", rows, _table(salt))
            weights = _mix(block & np.uint32(2**20 - 1), ~salt & 0xFFFFFFFF)
            totals[i : i + 1] += (sums * weights).sum(dtype=np.uint32)
    return totals


# --- on a device ----------------------------------------------------------------------------------


@jax.jit
def _device_sums(x: jax.Array) -> jax.Array:
    words = _device_words(on_device(x))
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    words = words ^ (words >> 16)
    low, high = place % jnp.uint32(_BLOCK), place // jnp.uint32(_BLOCK)
    return jnp.stack(
        [
            jnp.sum(words * _mix(low, salt) * _mix(high, ~salt & 0xFFFFFFFF), dtype=jnp.uint32)
            for salt in _SALTS
        ]
    )


def _device_words(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jnp.finfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.floating) else None
    bits = jnp.iinfo(x.dtype).bits if bits is None else bits
    unsigned = {2: jnp.uint2, 4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16}.get(bits, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
