"""QK-clip: logits are bilinear in both kernels, so that a head's largest becomes the bound."""

import jax.numpy as jnp
import numpy as np
import pytest

from cerebras_jax import optim

RNG = np.random.default_rng(0)


def largest_logits(x, query, key):
    repeats = query.shape[1] // key.shape[1]
    q = np.einsum("td,dhk->htk", x, query)
    k = np.einsum("td,dhk->htk", x, np.repeat(key, repeats, 1))
    return np.abs(np.einsum("htk,hsk->hts", q, k)).max((1, 2))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("heads_of_key", [4, 2])
def test_the_largest_logit_becomes_the_bound(alpha, heads_of_key):
    x = RNG.normal(size=(9, 6))
    query = jnp.asarray(RNG.normal(size=(6, 4, 3)) * np.array([[1], [2], [3], [9]]), jnp.float32)
    key = jnp.asarray(RNG.normal(size=(6, heads_of_key, 3)), jnp.float32)
    before = largest_logits(x, query, key)
    tau = float(np.sort(before)[1])  # two heads are beyond, or one run of two
    clipped = optim.qk_clip(query, key, jnp.asarray(before, jnp.float32), tau, alpha)
    runs = before.reshape(heads_of_key, -1).max(1)
    expected = before * np.repeat(np.minimum(1, tau / runs), 4 // heads_of_key)
    np.testing.assert_allclose(largest_logits(x, *clipped), expected, rtol=1e-5)
    assert expected.max() <= tau * (1 + 1e-6)


def test_dtypes_and_errors():
    w = jnp.ones((6, 4, 3), jnp.bfloat16)
    query, key = optim.qk_clip(w, w, jnp.array([0.0, 1.0, 2.0, 4.0]), 1.0)
    assert query.dtype == key.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        query[0, :, 0], jnp.sqrt(jnp.array([1, 1, 0.5, 0.25])).astype("bfloat16")
    )
    for arguments, message in [
        ((w, w, jnp.ones(3)), r"max_logits must have shape \(4,\), found \(3,\)"),
        ((w, w[:, :3], jnp.ones(4)), "the 3 heads of key must divide the 4 heads of query"),
        ((w, w, jnp.ones(4), 0.0), "tau must be > 0, got 0"),
        ((w, w, jnp.ones(4), 1.0, 2.0), r"alpha must be in \[0, 1\], got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            optim.qk_clip(*arguments)
