"""Cautious steps, against the papers' formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cerebras_jax import optim, schedules
from cerebras_jax.transforms.cautious import cautious, cautious_decay

RNG = np.random.default_rng(0)
PARAMS = {"a": jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32), "b": jnp.ones(3)}
GRADS = [
    {"a": jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32), "b": jnp.asarray(RNG.normal(size=3))}
    for _ in range(5)
]


def run(tx, params=PARAMS, grads=GRADS):
    state = tx.init(params)
    for g in grads:
        updates, state = jax.jit(tx.update)(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


def lion_in_numpy(decay, lr=0.1, weight_decay=0.2, b1=0.9, b2=0.99):
    """The decay is applied to the parameters before the step, which is masked on its own."""
    result = {}
    for name, start in PARAMS.items():
        p, m = np.asarray(start, np.float64), 0.0
        for grads in GRADS:
            g = np.asarray(grads[name], np.float64)
            d = np.sign(b1 * m + (1 - b1) * g)
            m = b2 * m + (1 - b2) * g
            mask = d * g > 0 if decay != "cautious decay" else np.ones_like(p)
            decayed = p * ((d * p > 0) if decay != "kept" else 1)
            p = p - lr * d * mask / max(mask.mean(), 1e-3) - lr * weight_decay * decayed
        result[name] = p
    return result


@pytest.mark.parametrize("decay", ["kept", "cautious", "cautious decay"])
def test_lion_as_in_the_papers(decay):
    wrap = cautious_decay if decay == "cautious decay" else lambda tx: cautious(tx, decay)
    got = run(wrap(optim.lion(lr=0.1, weight_decay=0.2)))
    expected = lion_in_numpy(decay)
    opt = optim.Lion(PARAMS, lr=0.1, weight_decay=0.2, around=[wrap])
    for g in GRADS:
        opt.step(g)
    for name in PARAMS:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(opt.params[name], expected[name], rtol=1e-5, atol=1e-6)


def test_without_decay_all_are_the_same():
    expected = run(cautious(optim.adamw(lr=0.1)))
    for decay in ("kept", "cautious"):
        got = run(cautious(optim.adamw(lr=0.1), decay))
        for name in PARAMS:
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-6)
    plain = run(optim.adamw(lr=0.1))
    assert not np.allclose(plain["a"], expected["a"], atol=1e-3)


def test_any_optax_pair():
    """Closed form: a step along the gradient's descent is left alone."""
    for g in GRADS:
        tx = cautious(optax.sgd(0.1))
        got, _ = tx.update(g, tx.init(PARAMS), PARAMS)
        np.testing.assert_allclose(got["a"], -0.1 * g["a"], rtol=1e-6)
    with pytest.raises(ValueError, match="update takes weight_decay as a keyword"):
        cautious(optax.GradientTransformation(lambda p: (), lambda g, s, p: (g, s)), "kept")
    with pytest.raises(ValueError, match="decay must be one of .*, got 'none'"):
        cautious(optax.sgd(0.1), "none")


def test_a_step_that_is_all_wrong_is_none():
    tx = cautious(optax.scale(1.0))  # uphill
    got, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    assert not np.any(got["a"])


def test_none_gradients_and_dtypes():
    params = {"a": jnp.ones(4, jnp.bfloat16), "b": jnp.ones(2)}
    tx = cautious(optim.adamw(lr=0.1, weight_decay=0.1), "cautious")
    updates, _ = tx.update({"a": -params["a"], "b": None}, tx.init(params), params)
    assert updates["a"].dtype == jnp.bfloat16
    assert not np.any(updates["b"])


def test_a_new_number_is_no_new_program(compilations):
    opt = optim.AdamW(
        PARAMS, lr=0.1, weight_decay=0.1, around=[lambda tx: cautious(tx, "cautious")]
    )
    opt.step(GRADS[0])
    with compilations(0):
        opt.param_groups[0]["weight_decay"] = 0.3
        opt.step(GRADS[1])


def test_a_decay_that_does_not_follow_the_learning_rate():
    """Closed form: without gradients, (1 - 0.01)^t for any rates; and none where the rate is 0."""
    lr = schedules.warmup(schedules.cosine_decay(0.3, 0.1, 20), 4)
    decay = 0.01 / lr.clip(lower=1e-6)
    zeros = [jax.tree.map(jnp.zeros_like, PARAMS)] * 5
    got = run(optim.adamw(lr=lr, weight_decay=decay), grads=zeros)
    opt = optim.AdamW(PARAMS, lr=lr, weight_decay=decay)
    for g in zeros:
        opt.step(g)
    for name, start in PARAMS.items():
        np.testing.assert_allclose(got[name], start * 0.99**4, rtol=1e-6)
        np.testing.assert_allclose(opt.params[name], start * 0.99**4, rtol=1e-6)
