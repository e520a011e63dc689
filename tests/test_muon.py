"""Muon: the iteration, by the singular value decomposition; who is whose; what is refused."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cerebras_jax import optim
from cerebras_jax.optim.algorithms.newton_schulz import newton_schulz, steps_of

RNG = np.random.default_rng(0)
CLASSIC = (15 / 8, -5 / 4, 3 / 8)
KELLER = (3.4445, -4.7750, 2.0315)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def run(tx, params, grads):
    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for g in grads:
        params, state = step(params, state, g)
    return params


def direction(g, **kwargs):
    """The first step of size 1 from a gradient, without decay: minus s times O."""
    p = jnp.zeros_like(g)
    rule = optim.muon.rule(lr=1.0, weight_decay=0.0, **kwargs)
    return np.asarray(jax.jit(rule.update)(g, rule.init(p), 1.0, p)[0])


# --- the iteration --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 6), (6, 10), (10, 6), (3, 6, 4)])
def test_the_classic_iteration_gives_the_polar_factor(shape):
    """Oracle: U V^T of the singular value decomposition."""
    with jax.enable_x64(True):
        x = jnp.asarray(RNG.normal(size=shape))
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        got = newton_schulz(x, steps_of("classic", 16))
        np.testing.assert_allclose(got, u @ vt, atol=2e-15)
    got = newton_schulz(x.astype(jnp.float32), steps_of("classic", 16))
    np.testing.assert_allclose(got, u @ vt, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("keller", 0.47, 1.21), ("polar_express", 0.858, 1.142)]
)
def test_where_five_steps_send_singular_values(name, low, high):
    """Oracle: the polynomials, evaluated at 100,000 singular values."""
    values = np.geomspace(1e-3, 1.0, 100_000)
    for a, b, c in steps_of(name, 5):
        values = a * values + b * values**3 + c * values**5
    assert low < values.min() < low + 0.01
    assert high - 0.01 < values.max() < high
    x = np.diag(np.geomspace(2e-3, 1.0, 24)).astype(np.float32)
    got = np.linalg.svd(newton_schulz(jnp.asarray(x), steps_of(name, 5)), compute_uv=False)
    assert low < got.min()
    assert got.max() < high


def test_polar_express_goes_on_to_one():
    values = np.geomspace(1e-3, 1.0, 1000)
    for a, b, c in steps_of("polar_express", 9):
        values = a * values + b * values**3 + c * values**5
    np.testing.assert_allclose(values, 1, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e-6, 1e6, 1e12, 1e18])
def test_any_scale_of_the_gradient_gives_the_same_step(scale):
    g = normal(8, 12)
    np.testing.assert_allclose(direction(g * np.float32(scale)), direction(g), rtol=2e-4, atol=2e-6)


def test_a_zero_gradient_gives_no_step():
    assert not direction(np.zeros((3, 4))).any()
    assert direction(np.zeros((0, 4))).shape == (0, 4)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_coefficients_stay_float32_and_only_products_are_rounded(dtype):
    """Oracle: the iteration in float64. bfloat16 coefficients alone would cost 3 %."""
    x = normal(96, 96)
    exact = newton_schulz_in_numpy(x, [KELLER] * 5)
    got = newton_schulz(jnp.asarray(x), steps_of("keller", 5), dtype)
    assert got.dtype == jnp.float32
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert error < (1e-5 if dtype is None else 0.02)


def newton_schulz_in_numpy(x, coefficients):
    y = np.asarray(x, np.float64) / np.linalg.norm(np.asarray(x, np.float64))
    for a, b, c in coefficients:
        square = y @ y.T
        y = a * y + (b * square + c * square @ square) @ y
    return y


def test_a_triple_for_every_step():
    triples = [KELLER, (2.0, -1.5, 0.5), CLASSIC]
    got = direction(normal(5, 5), ns_coefficients=triples, ns_steps=3)
    assert got.shape == (5, 5)
    g = normal(5, 5)
    expected = -newton_schulz_in_numpy(g, triples)
    np.testing.assert_allclose(
        direction(g, ns_coefficients=triples, ns_steps=3), expected, atol=1e-5
    )


# --- who is whose ---------------------------------------------------------------------------------


def states_of(**kwargs):
    opt = optim.Muon({"w": jnp.ones((2, 4)), "b": jnp.ones(4), "k": jnp.ones((3, 2, 4))}, **kwargs)
    return {name: set(state) - {"step"} for name, state in opt.state.items()}


def test_who_is_muons():
    muons, adams = {"momentum_buffer"}, {"exp_avg", "exp_avg_sq"}
    assert states_of(axes="io") == {"w": muons, "b": adams, "k": adams}
    assert states_of(axes="iio") == {"w": adams, "b": adams, "k": muons}
    assert states_of(use_muon=False) == {"w": adams, "b": adams, "k": adams}


def test_groups_say_who_is_whose_in_both_forms():
    params = {"w": jnp.asarray(normal(4, 6)), "embed": jnp.asarray(normal(10, 4))}
    grads = jax.tree.map(jnp.sin, params)
    values = [{"axes": "oi", "lr": 0.1}, {"use_muon": False, "lr": 0.01}]
    groups = optim.param_groups(
        params, [{"params": "w", **values[0]}, {"params": "embed", **values[1]}]
    )
    opt = optim.Muon(groups, weight_decay=0.0)
    opt.step(grads)
    pairs = {str(i): optim.muon(**v, weight_decay=0.0) for i, v in enumerate(values)}
    got = run(optax.partition(pairs, {"w": "0", "embed": "1"}), params, [grads])
    chex.assert_trees_all_close(got, opt.params, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(
        got["embed"], params["embed"] - 0.01 * np.sign(grads["embed"]), rtol=1e-5
    )
    assert set(opt.state["embed"]) == {"exp_avg", "exp_avg_sq", "step"}


def test_a_matrix_that_looks_like_an_embedding_is_warned_of():
    params = {"wte": jnp.ones((5, 2)), "dense": {"kernel": jnp.ones((2, 2))}}
    with pytest.warns(UserWarning, match=r"not for embeddings.*\['wte'\].*muon_groups"):
        optim.Muon(params)
    optim.Muon({"dense": params["dense"]})
    optim.Muon(params, axes="io")


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1"),
        ({"ns_steps": 100}, ValueError, "ns_steps must be a whole number from 1 to 99, got 100"),
        ({"ns_steps": 2.5}, TypeError, "ns_steps must be a whole number from 1 to 99, .*got 2.5"),
        ({"ns_steps": lambda t: 5}, TypeError, "ns_steps must be a whole number .* fixed"),
        ({"shard_stack": 3}, TypeError, "shard_stack must be names of mesh axes, got 3"),
        ({"split": 0}, ValueError, "split must be a whole number >= 1, got 0"),
        ({"ns_coefficients": "best"}, ValueError, "must be one of .*'classic'.*, got 'best'"),
        ({"ns_coefficients": (1.0, 2.0)}, ValueError, r"triples \(a, b, c\), got \(1.0, 2.0\)"),
        ({"ns_coefficients": [KELLER] * 4}, ValueError, "each of ns_steps=5, got 4"),
        ({"adjust_lr_fn": "rms"}, ValueError, "adjust_lr_fn must be one of .*, got 'rms'"),
        ({"axes": "ixo"}, ValueError, "axes must have the letters i, o and b.*got 'ixo'"),
        ({"axes": 2}, TypeError, "axes must be a string"),
        ({"ns_dtype": "int8"}, ValueError, "ns_dtype must be the name of a floating point type"),
        ({"eps": 0.0}, ValueError, "eps must be > 0, got 0"),
        ({"nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
    ],
)
def test_errors(kwargs, error, message):
    with pytest.raises(error, match=message):
        optim.muon(**kwargs)
    with pytest.raises(error, match=message):
        optim.Muon({"w": jnp.ones((2, 2))}, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "shape", "message"),
    [
        ({}, (3, 3, 8, 32), r"axes must say .* shape \(3, 3, 8, 32\).*'iiio'.*use_muon=False"),
        ({"split": 3}, (4, 8), r"split must divide the 8 outputs of the shape \(4, 8\).*got 3"),
        ({"use_muon": True, "axes": "bio"}, (2, 3), r"one letter per axis of the shape \(2, 3\)"),
    ],
)
def test_axes_that_do_not_fit_are_refused_at_construction(kwargs, shape, message):
    rule = optim.muon.rule(**kwargs)
    with pytest.raises(ValueError, match=message):
        rule.init(jnp.ones(shape))
    with pytest.raises(ValueError, match=message):
        optim.Muon({"w": jnp.ones(shape)}, **kwargs)
    with pytest.raises(ValueError, match=message):
        optim.muon(**kwargs).init({"w": jnp.ones(shape)})


def test_a_learning_rate_of_zero_in_one_group():
    """Each group needs the states of its own members only."""
    params = {"w": jnp.ones((4, 3)), "embed": jnp.ones((4, 3))}
    opt = optim.Muon(optim.muon_groups(params), lr=0.1, weight_decay=0.0)
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step(params)
    np.testing.assert_array_equal(opt.params["w"], 1)
    np.testing.assert_array_equal(opt.params["embed"], 1)
    opt.load_state_dict(opt.state_dict())


def test_static_whole_numbers_of_a_group():
    params = {"w": jnp.asarray(normal(4, 6))}
    opt = optim.Muon(params, lr=0.1, weight_decay=0.0, split=2)
    opt.step(params)
    expected = params["w"] + 0.1 * direction(params["w"], split=2)
    np.testing.assert_allclose(opt.params["w"], expected, atol=1e-5)
    opt.param_groups[0]["split"] = 3
    opt.load_state_dict(opt.state_dict())
    opt.step(params)
    assert opt.state_dict()["param_groups"][0]["split"] == 3


def test_a_new_number_is_no_new_program(compilations):
    params = {"w": jnp.ones((3, 5)), "b": jnp.ones(5)}
    opt = optim.Muon(params, lr=0.1)
    opt.step(params)
    with compilations(0):
        for lr, momentum in itertools.product([0.2, 0.3], [0.8, 0.9]):
            opt.param_groups[0].update(lr=lr, momentum=momentum, ns_coefficients=CLASSIC)
            opt.step(params)
