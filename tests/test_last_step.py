"""The step after the largest count that int32 holds, and other sizes that only long runs see."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import OPTIMIZERS

from cerebras_jax import optim
from cerebras_jax.optim.algorithms.radam import _rho

LAST = 2.0**31


def late_update(entry, shape, dtype):
    rule = entry.pure.rule(**entry.kwargs)
    clock = jax.tree.map(lambda x: jnp.asarray(x, dtype), rule.clock)
    p, g = jnp.linspace(0.5, 2.0, 6, dtype=dtype), jnp.linspace(-1.0, 1.4, 6, dtype=dtype)
    p, g = p.reshape(shape), g.reshape(shape)
    state = jax.tree.map(lambda x: x + jnp.asarray(0.01, dtype), rule.init(p))
    for _ in range(2):
        now, clock = rule.tick(clock, jnp.asarray(LAST, dtype))
    return rule.update(g, state, now, p)


MATRICES = [e for e in OPTIMIZERS if e.name in ("adafactor", "muon", "soap")]  # have other formulas


@pytest.mark.parametrize(
    ("entry", "shape"),
    [(e, (6,)) for e in OPTIMIZERS] + [(e, (2, 3)) for e in MATRICES],
    ids=repr,
)
def test_formulas_at_the_last_step(entry, shape):
    """Oracle: the same in float64."""
    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, late_update(entry, shape, jnp.float64))
    found = late_update(entry, shape, jnp.float32)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("b2", [0.0, 0.5, 0.9, 0.999, 0.9999])
def test_radams_rho(b2):
    """Oracle: rho_t = rho_inf - 2 t b2^t / (1 - b2^t), exactly in rationals where t is small."""
    b = Fraction(float(np.float32(b2)))
    limit = float(2 / (1 - b) - 1)
    for t in (1, 2, 5, 10, 40, 100):
        exact = float(2 / (1 - b) - 1 - 2 * t * b**t / (1 - b**t))
        np.testing.assert_allclose(_rho(jnp.float32(b2), jnp.float32(t)), exact, rtol=5e-7)
    for t in (1e7, LAST):
        np.testing.assert_allclose(_rho(jnp.float32(b2), jnp.float32(t)), limit, rtol=5e-7)


def test_adafactor_of_more_elements_than_int32_counts():
    rule = optim.adafactor.rule(lr=0.1)
    p = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)
    state = jax.eval_shape(rule.init, p)
    t = jax.ShapeDtypeStruct((), jnp.float32)
    u, _ = jax.eval_shape(rule.update, p, state, t, p)
    assert u.shape == p.shape


def test_adafactor_in_float16_with_float32_moments():
    """Gradients of 300, whose squares float16 does not hold; oracle: parameters in float32."""
    g = {"w": np.full((4, 4), 300.0)}
    paths = {}
    for dtype in (jnp.float16, jnp.float32):
        tx = optim.adafactor(lr=0.1)
        params = {"w": jnp.ones((4, 4), dtype)}
        state = tx.init(params)
        for _ in range(3):
            grads = jax.tree.map(lambda x, p: jnp.asarray(x, p.dtype), g, params)
            updates, state = tx.update(grads, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        paths[dtype] = params["w"]
    np.testing.assert_allclose(paths[jnp.float16], paths[jnp.float32], rtol=3e-3)
