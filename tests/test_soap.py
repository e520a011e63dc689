"""SOAP: an implementation for torch, the paper in NumPy, and what the bases must be."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cerebras_jax import optim

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "soap.npz"))
NAMES = ("w", "tall", "b")
CASES = {
    "default": {},
    "often": {
        "lr": 0.01,
        "betas": (0.9, 0.99),
        "shampoo_beta": 0.8,
        "eps": 1e-4,
        "weight_decay": 0.1,
        "precondition_frequency": 2,
    },
    "plain": {
        "lr": 0.01,
        "weight_decay": 0.0,
        "correct_bias": False,
        "precondition_frequency": 3,
    },
}
STEPS = 40


def path(tx, params, grads):
    def step(carry, g):
        updates, state = tx.update(g, carry[1], carry[0])
        params = optax.apply_updates(carry[0], updates)
        return (params, state), params

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), grads))(params)


@pytest.mark.parametrize("case", CASES)
def test_an_implementation_for_torch(case):
    """The side of 9 is longer than max_precond_dim; the vector gets Adam."""
    params = {k: jnp.asarray(GOLDEN[f"params0/{k}"]) for k in NAMES}
    grads = {k: jnp.asarray(GOLDEN[f"grads/{k}"]) for k in NAMES}
    _, ours = path(optim.soap(max_precond_dim=6, **CASES[case]), params, grads)
    for name in NAMES:
        expected = GOLDEN[f"{case}/params/{name}"]
        moved = np.abs(expected[-1] - GOLDEN[f"params0/{name}"]).max()
        np.testing.assert_allclose(ours[name], expected, atol=2e-4 * moved + 1e-6)


def soap_path(params, grads, lr, b1, b2, bs, eps, weight_decay, frequency):
    """Oracle: the algorithm of the paper for one matrix, in float64."""
    p, m, v, left, right = params, 0.0, 0.0, 0.0, 0.0
    q_left = q_right = None
    result = []
    for t, g in enumerate(grads):
        if t > 0:
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * (q_left.T @ g @ q_right) ** 2
            u = q_left @ ((q_left.T @ m @ q_right) / (np.sqrt(v) + eps)) @ q_right.T
            p = p - lr * u * np.sqrt(1 - b2**t) / (1 - b1**t)
            p = p - lr * weight_decay * p
        left = bs * left + (1 - bs) * g @ g.T
        right = bs * right + (1 - bs) * g.T @ g
        if t == 0:
            q_left, q_right = np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]
        elif t % frequency == 0:
            order = np.argsort(-np.diag(q_left.T @ left @ q_left))
            q_left, v = np.linalg.qr(left @ q_left[:, order])[0], v[order]
            order = np.argsort(-np.diag(q_right.T @ right @ q_right))
            q_right, v = np.linalg.qr(right @ q_right[:, order])[0], v[:, order]
        result.append(p)
    return np.array(result)


def test_the_paper_in_float64():
    rng = np.random.default_rng(1)
    params, grads = rng.normal(size=(6, 6)), rng.normal(size=(60, 6, 6)) + 0.3
    with jax.enable_x64(True):
        tx = optim.soap(0.01, (0.9, 0.95), 0.8, 1e-8, 0.1, 4)
        _, ours = path(tx, jnp.asarray(params), jnp.asarray(grads))
    expected = soap_path(params, grads, 0.01, 0.9, 0.95, 0.8, 1e-8, 0.1, 4)
    np.testing.assert_allclose(ours, expected, rtol=1e-8, atol=1e-9)


def test_a_stack_of_matrices_is_each_matrix():
    rng = np.random.default_rng(2)
    params = jnp.asarray(rng.normal(size=(3, 4, 4)), jnp.float32)
    grads = jnp.asarray(rng.normal(size=(12, 3, 4, 4)), jnp.float32)
    tx = optim.soap(lr=0.01, precondition_frequency=3)
    _, stacked = path(tx, params, grads)
    for i in range(3):
        _, alone = path(tx, params[i], grads[:, i])
        np.testing.assert_allclose(stacked[:, i], alone, rtol=1e-4, atol=1e-5)


def test_the_bases_are_orthogonal_and_the_first_step_moves_nothing():
    rng = np.random.default_rng(3)
    params = jnp.asarray(rng.normal(size=(4, 6)), jnp.bfloat16)
    tx = optim.soap(precondition_frequency=2)
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(6):
        grads = jnp.asarray(rng.normal(size=(4, 6)), jnp.bfloat16)
        updates, state = update(grads, state, params)
        assert updates.dtype == jnp.bfloat16
        assert bool((updates == 0).all()) == (t == 0)
        for basis in (state.states.left_basis, state.states.right_basis):
            assert basis.dtype == jnp.float32
            np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-5)


def test_which_states_there_are():
    shapes = {"b": (3,), "empty": (0, 2), "wide": (2, 5), "m": (2, 2), "stack": (7, 2, 3)}
    state = optim.soap(max_precond_dim=4).init({k: jnp.zeros(s) for k, s in shapes.items()}).states
    sides = {
        k: [x[k] if x[k] is None else x[k].shape for x in (state.left, state.right)] for k in shapes
    }
    assert sides == {
        "b": [None, None],
        "empty": [None, None],
        "wide": [(2, 2), None],
        "m": [(2, 2), (2, 2)],
        "stack": [(7, 2, 2), (7, 3, 3)],
    }
    with pytest.raises(TypeError, match="cannot be traced"):
        jax.jit(lambda n: optim.soap(max_precond_dim=n).init(jnp.ones((2, 2))))(3)


def test_gradients_of_zero():
    params = jnp.ones((3, 4))
    _, ours = path(optim.soap(weight_decay=0.0), params, jnp.zeros((12, 3, 4)))
    np.testing.assert_array_equal(ours, np.ones((12, 3, 4)))
