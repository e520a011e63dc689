"""Small sparse optimizers, and what tests look at in them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cerebras_jax import optim, sparse

RIGL = sparse.RigL(0.5, update=sparse.Every(1), init_method="topk")
STATIC = sparse.Static(0.5, init_method="topk")


def tree(seed: int, dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(seed)
    kernel, bias = rng.normal(size=(6, 8)), rng.normal(size=8)
    return {"layer": {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.asarray(bias, dtype)}}


def made(sparsity: Any = RIGL, kind: Any = optim.AdamW, **options: Any) -> Any:
    opt = kind(tree(0), **{"lr": 0.1, **options})
    opt.apply(sparsity)
    return opt


def mask_of(opt: Any) -> np.ndarray:
    return np.asarray(opt.state["layer.kernel"]["mask"])


def kernel_of(opt: Any) -> np.ndarray:
    return np.asarray(opt.params["layer"]["kernel"])


def equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def same_run(a: Any, b: Any) -> None:
    equal(a.params, b.params)
    assert a.state.keys() == b.state.keys()
    for name in a.state:
        equal(dict(a.state[name]), dict(b.state[name]))
