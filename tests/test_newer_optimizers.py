"""ADOPT and AdEMAMix: the formulas of their papers, in NumPy, and optax where it has them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cerebras_jax import optim

_RNG = np.random.default_rng(0)
PARAMS = _RNG.normal(size=(4, 3))
GRADS = _RNG.normal(size=(200, 4, 3)) + 0.3


def path(tx, grads=GRADS):
    """The parameters after every step, in float64."""

    def step(carry, g):
        updates, state = tx.update(g, carry[1], carry[0])
        carry = (carry[0] + updates, state)
        return carry, carry[0]

    start = jnp.asarray(PARAMS)
    return np.asarray(jax.lax.scan(step, (start, tx.init(start)), jnp.asarray(grads))[1])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def adopt_path(lr, b1, b2, eps, weight_decay, decouple, clip_exp):
    """Oracle: Algorithm 2 of the paper, with both kinds of weight decay."""
    p, m, v, result = PARAMS, 0.0, 0.0, []
    for t, g in enumerate(GRADS):
        g = g if decouple else g + weight_decay * p
        if t == 0:
            v = g * g
        else:
            u = g / np.maximum(np.sqrt(v), eps)
            u = u if clip_exp is None else np.clip(u, -(t**clip_exp), t**clip_exp)
            m = b1 * m + (1 - b1) * u
            p = p - lr * (m + weight_decay * p * decouple)
            v = b2 * v + (1 - b2) * g * g
        result.append(p)
    return np.array(result)


@pytest.mark.parametrize(
    ("weight_decay", "decouple", "clip_exp"),
    [(0.0, False, 0.25), (0.1, False, 0.25), (0.1, True, 0.25), (0.1, True, None), (0.0, True, 0)],
)
def test_adopt(weight_decay, decouple, clip_exp):
    ours = optim.adopt(0.01, (0.9, 0.99), 1e-4, weight_decay, decouple, clip_exp)
    expected = adopt_path(0.01, 0.9, 0.99, 1e-4, weight_decay, decouple, clip_exp)
    np.testing.assert_allclose(path(ours), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("use_clipping", [True, False])
def test_optaxs_adopt(use_clipping):
    theirs = optax.contrib.adopt(0.01, use_clipping=use_clipping)
    ours = optim.adopt(lr=0.01, clip_exp=0.25 if use_clipping else None)
    np.testing.assert_allclose(path(ours), path(theirs), rtol=1e-12, atol=1e-13)


def test_adopts_first_gradient_may_be_anything():
    """Nothing of 1e30 / eps comes through a step that moves nothing."""
    with jax.enable_x64(False):
        tx = optim.adopt(lr=0.1, clip_exp=None, eps=1e-12)
        params = jnp.ones(2)
        state = tx.init(params)
        updates, state = tx.update(jnp.array([1e18, -1e18]), state, params)
        np.testing.assert_array_equal(updates, [0, 0])
        np.testing.assert_array_equal(state.states.exp_avg, [0, 0])


def ademamix_path(lr, b1, b2, b3, alpha, beta3_warmup, alpha_warmup, eps, weight_decay):
    """Oracle: Algorithm 1 of the paper, with its two schedulers as its authors wrote them."""

    def half_life(beta):
        return math.log(0.5) / math.log(beta + 1e-8) - 1

    p, m1, m2, v, result = PARAMS, 0.0, 0.0, 0.0, []
    for t, g in enumerate(GRADS, start=1):
        a = alpha * min(1, t / alpha_warmup) if alpha_warmup else alpha
        beta3 = b3
        if beta3_warmup and t < beta3_warmup:
            share = t / beta3_warmup
            steps = (1 - share) * half_life(b1) + share * half_life(b3)
            beta3 = 0.5 ** (1 / (steps + 1))
        m1 = b1 * m1 + (1 - b1) * g
        m2 = beta3 * m2 + (1 - beta3) * g
        v = b2 * v + (1 - b2) * g * g
        u = (m1 / (1 - b1**t) + a * m2) / (np.sqrt(v / (1 - b2**t)) + eps)
        p = p - lr * (u + weight_decay * p)
        result.append(p)
    return np.array(result)


@pytest.mark.parametrize(
    ("b1", "warmups", "weight_decay"),
    [(0.9, (None, None), 0.0), (0.9, (100, 50), 0.1), (0.0, (None, 30), 0.1)],
)
def test_ademamix(b1, warmups, weight_decay):
    betas = (b1, 0.99, 0.999)
    ours = optim.ademamix(0.01, betas, 4.0, *warmups, 1e-6, weight_decay)
    expected = ademamix_path(0.01, *betas, 4.0, *warmups, 1e-6, weight_decay)
    np.testing.assert_allclose(path(ours), expected, rtol=1e-11, atol=1e-12)


def test_optaxs_ademamix():
    ours = optim.ademamix(lr=0.01, alpha=5.0, weight_decay=0.1)
    theirs = optax.contrib.ademamix(0.01, alpha=5.0, weight_decay=0.1)
    np.testing.assert_allclose(path(ours), path(theirs), rtol=1e-11, atol=1e-12)


def test_ademamix_in_float32_keeps_its_slow_average():
    """beta3 = 0.9999 in float32: the average of a constant g is (1 - beta3^t) g."""
    with jax.enable_x64(False):
        tx = optim.ademamix()
        params = jnp.ones(2, jnp.bfloat16)
        state = tx.init(params)
        assert state.states.exp_avg_slow.dtype == jnp.float32
        one = jnp.ones_like(params)
        step = jax.jit(
            lambda s: jax.lax.scan(
                lambda s, _: (tx.update(one, s, params)[1], None), s, length=2000
            )[0]
        )
        np.testing.assert_allclose(step(state).states.exp_avg_slow, 1 - 0.9999**2000, rtol=1e-3)


def test_ademamix_without_a_fast_average_keeps_none():
    assert optim.ademamix(betas=(0.0, 0.999, 0.9999)).init(PARAMS).states.exp_avg_fast is None
