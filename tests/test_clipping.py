"""Clipping: torch's functions where they agree, NumPy in float64 elsewhere."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cerebras_jax.transforms.clipping import clip, global_norm, sum_of_squares

RNG = np.random.default_rng(0)
GRADS = {"a": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32), "b": jnp.arange(5.0)}
NORM = np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in GRADS.values()))


def clipped(grads, **kwargs):
    tx = clip(**kwargs)
    return tx.update(grads, tx.init(grads))[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16, jnp.complex64])
def test_norm_is_computed_in_float32_at_least(dtype):
    values = RNG.normal(size=1000) * 300 + (3j if dtype == jnp.complex64 else 0)
    tree = {"a": jnp.asarray(values, dtype), "b": None, "c": jnp.asarray(values[:7], dtype)}
    flat = np.concatenate([np.asarray(tree[k], np.complex128) for k in "ac"])
    norm = global_norm(tree)
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, np.linalg.norm(flat), rtol=1e-6)


def test_norm_of_float64_stays_float64():
    with jax.enable_x64(True):
        tree = [jnp.float32(3), jnp.asarray([4e30], jnp.float64)]
        assert global_norm(tree).dtype == jnp.float64
        np.testing.assert_allclose(global_norm(tree), 4e30, rtol=1e-15)


def test_norm_of_nothing_is_zero():
    assert global_norm({"a": None}) == 0
    assert sum_of_squares([]).dtype == jnp.float32


def test_norm_whose_squares_overflow_is_infinite():
    assert global_norm([jnp.float32(3e19)]) == jnp.inf


@pytest.mark.parametrize("max_norm", [0.5, 2.0, 1e3])
def test_norm_as_torch(max_norm):
    torch = pytest.importorskip("torch")
    params = [torch.nn.Parameter(torch.zeros(x.shape)) for x in GRADS.values()]
    for p, g in zip(params, GRADS.values(), strict=True):
        p.grad = torch.tensor(np.array(g))
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    np.testing.assert_allclose(global_norm(GRADS), norm.item(), rtol=1e-6)
    for p, g in zip(params, clipped(GRADS, max_norm=max_norm).values(), strict=True):
        np.testing.assert_allclose(g, p.grad, rtol=1e-6 / NORM + 1e-6)


def test_value_as_torch():
    torch = pytest.importorskip("torch")
    p = torch.nn.Parameter(torch.zeros(5))
    p.grad = torch.tensor([-3.0, 0.1, float("nan"), float("inf"), 0.75])
    expected = jnp.asarray(p.grad.numpy().copy())
    torch.nn.utils.clip_grad_value_([p], 0.75)
    np.testing.assert_array_equal(clipped(expected, max_value=0.75), p.grad)


def test_the_norm_comes_before_the_value():
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    chex.assert_trees_all_close(
        clipped(grads, max_norm=1.0, max_value=0.7), {"a": jnp.array([0.6]), "b": jnp.array([0.7])}
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16, jnp.complex64])
def test_gradients_within_the_bounds_keep_every_bit(dtype):
    values = np.concatenate([RNG.normal(size=50), [0.0, -0.0, 1e-7, 6e4]])
    grads = {"a": jnp.asarray(values, dtype), "b": None}
    new = jax.jit(lambda g: clipped(g, max_norm=1e6, max_value=1e5))(grads)
    assert new["b"] is None
    assert new["a"].dtype == dtype
    assert np.asarray(new["a"]).tobytes() == np.asarray(grads["a"]).tobytes()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_clipped_not_lost(dtype):
    """The norm of these is beyond float16; optax's clipping makes them zeros."""
    grads = jnp.full((4,), 6e4, dtype)
    np.testing.assert_allclose(
        np.asarray(clipped(grads, max_norm=2.0), np.float32), 1, rtol=float(jnp.finfo(dtype).eps)
    )


def test_complex_numbers_are_bounded_by_part():
    grads = jnp.array([3 - 4j, 0.1j], jnp.complex64)
    np.testing.assert_allclose(clipped(grads, max_norm=1.0), grads / np.linalg.norm(grads), 1e-6)
    np.testing.assert_allclose(clipped(grads, max_value=1.0), [1 - 1j, 0.1j])


def test_extremes():
    np.testing.assert_array_equal(clipped(jnp.zeros(3), max_norm=1.0), jnp.zeros(3))
    assert np.isnan(clipped(jnp.array([1.0, jnp.nan]), max_norm=1.0)).all()
    assert clipped({"a": None}, max_norm=1.0, max_value=1.0) == {"a": None}
    chex.assert_trees_all_equal(clipped(GRADS), GRADS)


def test_as_optax_where_float32_does():
    tx = optax.clip_by_global_norm(1.5)
    expected, _ = tx.update(GRADS, tx.init(GRADS))
    chex.assert_trees_all_close(clipped(GRADS, max_norm=1.5), expected, rtol=1e-6)


def test_a_new_bound_is_no_new_program(compilations):
    step = jax.jit(lambda g, norm, value: clipped(g, max_norm=norm, max_value=value))
    step(GRADS, 1.0, 2.0)
    with compilations(0):
        new = step(GRADS, 3.0, 0.5)
    chex.assert_trees_all_close(new, clipped(GRADS, max_norm=3.0, max_value=0.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"max_norm": 0.0}, ValueError, "max_gradient_norm must be > 0, got 0"),
        ({"max_norm": jnp.nan}, ValueError, "max_gradient_norm must be finite, got nan"),
        ({"max_value": -1}, ValueError, "max_gradient_value must be > 0, got -1"),
        ({"max_value": "1"}, TypeError, "max_gradient_value must be a number or None, got '1'"),
        ({"max_norm": lambda t: 1.0}, TypeError, "max_gradient_norm must be a number or None"),
        ({"max_norm": jnp.ones(2)}, ValueError, "max_gradient_norm must be a scalar"),
    ],
)
def test_errors_name_argument_rule_and_value(kwargs, error, message):
    with pytest.raises(error, match=message):
        clip(**kwargs)
