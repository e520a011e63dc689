"""Adaptive clipping, against optax where it agrees and the paper's formula elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cerebras_jax import optim
from cerebras_jax.transforms.agc import agc

RNG = np.random.default_rng(0)
SHAPES = {"scalar": (), "bias": (5,), "row": (1, 5), "dense": (4, 5), "conv": (3, 3, 4, 8),
          "conv3d": (2, 2, 2, 3, 4)}  # fmt: skip


def tree(scale=1.0, shapes=SHAPES):
    return {k: jnp.asarray(scale * RNG.normal(size=s), jnp.float32) for k, s in shapes.items()}


def clipped(grads, params, *args):
    tx = agc(*args)
    return tx.update(grads, tx.init(params), params)[0]


@pytest.mark.parametrize(("clipping", "eps"), [(0.01, 1e-3), (0.5, 2.0), (10.0, 1e-3)])
def test_optax_where_it_agrees(clipping, eps):
    params, grads = tree(), tree(0.5)
    theirs = optax.adaptive_grad_clip(clipping, eps)
    expected, _ = theirs.update(grads, theirs.init(params), params)
    got = clipped(grads, params, clipping, eps)
    for name in SHAPES:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-6)


def test_filters_of_a_convolution_of_rank_3():
    """Oracle: the paper's formula, filter by filter. optax takes the norm over axis 0 only."""
    params, grads = tree(shapes={"w": (3, 4, 5)}), tree(shapes={"w": (3, 4, 5)})
    got = clipped(grads, params, 0.1)
    for j in range(5):
        p, g = params["w"][..., j], grads["w"][..., j]
        factor = 0.1 * np.linalg.norm(p) / np.linalg.norm(g)
        np.testing.assert_allclose(got["w"][..., j], g * min(1, factor), rtol=1e-5)
    theirs = optax.adaptive_grad_clip(0.1)
    other, _ = theirs.update(grads, theirs.init(params), params)
    assert not np.allclose(other["w"], got["w"], rtol=0.1)


def test_small_gradients_keep_every_bit_and_low_precision_is_safe():
    params = {"w": jnp.full((4, 2), 100.0, jnp.float16)}
    grads = {"w": jnp.full((4, 2), 300.0, jnp.float16)}  # its squares overflow float16
    got = clipped(grads, params, 0.5)["w"]
    np.testing.assert_allclose(got, 50.0)
    assert got.dtype == jnp.float16
    np.testing.assert_array_equal(clipped(grads, params, 4.0)["w"], grads["w"])
    huge = {"w": jnp.full((4, 2), 1e30)}
    np.testing.assert_allclose(clipped(huge, {"w": jnp.ones((4, 2))}, 0.5)["w"], 0.5, rtol=1e-6)


def test_in_both_forms():
    params, grads = tree(), tree()
    chain = lambda tx: optax.chain(agc(0.01), tx)  # noqa: E731
    opt = optim.SGD(params, lr=1.0, around=[chain])
    opt.step({**grads, "bias": None})
    expected = clipped(grads, params, 0.01)
    np.testing.assert_allclose(
        opt.params["dense"], params["dense"] - expected["dense"], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(opt.params["bias"], params["bias"])
    tx = chain(optim.sgd(lr=1.0))
    updates, _ = jax.jit(tx.update)({**grads, "bias": None}, tx.init(params), params)
    np.testing.assert_allclose(updates["dense"], -expected["dense"], rtol=1e-6)
    assert not np.any(updates["bias"])


def test_errors():
    with pytest.raises(ValueError, match="clipping must be > 0, got 0"):
        agc(0.0)
    with pytest.raises(ValueError, match="eps must be > 0"):
        agc(0.1, eps=-1.0)
    with pytest.raises(ValueError, match="update needs the parameters"):
        agc().update(tree(), optax.EmptyState())
