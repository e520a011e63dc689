"""The parameter trees: shapes only, and random values for them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SMALL = [(8,), (16,), (64,), (128,), (8, 8), (16, 8), (16, 16), (32, 16), (32, 32), (4, 4, 4)]
_MEDIUM = [(384, 576), (576, 384), (128, 384), (576,), (384,)]


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def _count(n: int, scale: float) -> int:
    return max(1, round(n * min(1.0, scale) ** 0.5))


def _scaled(shape: tuple[int, ...], scale: float) -> tuple[int, ...]:
    return tuple(max(1, round(d * scale ** (1 / len(shape)))) for d in shape)


def one_leaf(scale: float) -> Any:
    """One matrix of 64 Mi elements."""
    return {"kernel": _scaled((8192, 8192), scale)}


def gpt2_small(scale: float) -> Any:
    """The tree of GPT-2 small: 148 leaves, 124M elements."""
    width = max(4, round(768 * scale**0.5))

    def norm() -> dict[str, Any]:
        return {"scale": (width,), "bias": (width,)}

    def dense(a: int, b: int) -> dict[str, Any]:
        return {"kernel": (a * width, b * width), "bias": (b * width,)}

    blocks = {
        f"block_{i:02}": {
            "ln_1": norm(),
            "attention": {"qkv": dense(1, 3), "out": dense(1, 1)},
            "ln_2": norm(),
            "mlp": {"in": dense(1, 4), "out": dense(4, 1)},
        }
        for i in range(_count(12, scale))
    }
    embeddings = {"wte": (max(8, round(50257 * scale**0.5)), width), "wpe": (1024, width)}
    return {**embeddings, **blocks, "ln_f": norm()}


def block_matrices(scale: float) -> dict[str, tuple[int, int]]:
    """The matrices of one block of GPT-2 small."""
    width = max(4, round(768 * scale**0.5))
    return {
        name: (a * width, b * width)
        for name, a, b in (("qkv", 1, 3), ("out", 1, 1), ("mlp_in", 1, 4), ("mlp_out", 4, 1))
    }


def medium_leaves(scale: float) -> Any:
    """300 leaves of five shapes, 30M elements."""
    return _repeated([_scaled(s, scale) for s in _MEDIUM], _count(300, scale))


def small_leaves(scale: float) -> Any:
    """1,000 small leaves of ten shapes."""
    return _repeated(_SMALL, _count(1000, scale))


def _repeated(shapes: list[tuple[int, ...]], n: int) -> dict[str, Any]:
    return {f"leaf_{i:04}": shapes[i % len(shapes)] for i in range(n)}


def many_leaves(n: int) -> Any:
    """n small leaves of ten shapes."""
    return _repeated(_SMALL, n)


def distinct_leaves(n: int) -> Any:
    """n leaves, no two of one shape."""
    return {f"leaf_{i:04}": (8 + i, 16) for i in range(n)}


def scalar_leaves(n: int) -> Any:
    """n leaves of one element: what remains of a step is its dispatch."""
    return {f"leaf_{i:04}": (1,) for i in range(n)}


TREES = {
    "64M": one_leaf,
    "148 leaves": gpt2_small,
    "300 leaves": medium_leaves,
    "1000 leaves": small_leaves,
}


def values(shapes: Any, seed: int, size: float) -> Any:
    """NumPy arrays of normal random numbers, of standard deviation ``size``."""
    block = np.random.default_rng(seed).standard_normal(1 << 20, np.float32) * np.float32(size)

    def leaf(shape: tuple[int, ...]) -> np.ndarray:
        n = int(np.prod(shape))
        return np.array(block[:n] if n <= block.size else np.resize(block, n)).reshape(shape)

    return jax.tree.map(leaf, shapes, is_leaf=_is_shape)


def abstract(shapes: Any) -> Any:
    """Shapes as arrays without values."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=_is_shape)
