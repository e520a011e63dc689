"""Accumulation across calls: the mean gradient at every k-th step, and optax.MultiSteps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import one_each

from cerebras_jax import optim, schedules
from cerebras_jax.transforms.every import every
from cerebras_jax.transforms.finite import guard, skip_nonfinite

PARAMS = {"a": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.array([1.0, -0.0])}
RNG = np.random.default_rng(0)
GRADS = [
    {"a": jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32), "b": jnp.array([0.5, i])}
    for i in range(9)
]


def run(tx, batches, params=PARAMS, jit=True):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    state = tx.init(params)
    for grads in batches:
        params, state = step(params, state, grads)
    return params, state


def means(batches, k):
    groups = [batches[i : i + k] for i in range(0, len(batches), k)]
    return [jax.tree.map(lambda *x: sum(x) / len(x), *group) for group in groups]


@pytest.mark.parametrize("entry", one_each(1), ids=repr)
def test_equals_steps_with_the_mean_gradient(entry):
    tx = entry.pure(**entry.kwargs)
    params, state = run(every(tx, 3), GRADS)
    expected, inner = run(tx, means(GRADS, 3))
    chex.assert_trees_all_close(params, expected, rtol=2e-6, atol=1e-7)
    chex.assert_trees_all_close(state.inner, inner, rtol=2e-6, atol=1e-7)
    assert (int(state.count), int(state.steps), int(state.inner.count)) == (0, 3, 3)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, every(tx, 3).init(PARAMS))


@pytest.mark.parametrize("jit", [True, False])
def test_as_optax_multi_steps(jit):
    tx = optim.adamw(lr=0.1)
    got, _ = run(every(tx, 3), GRADS[:8], jit=jit)
    expected, _ = run(optax.MultiSteps(tx, 3), GRADS[:8])
    chex.assert_trees_all_close(got, expected, rtol=2e-6, atol=1e-7)


def test_calls_between_change_no_bit():
    tx = every(optim.adamw(lr=0.1), 4)
    params, state = run(tx, GRADS[:3])
    assert [x.tobytes() for x in jax.tree.leaves(jax.device_get(params))] == [
        x.tobytes() for x in jax.tree.leaves(jax.device_get(PARAMS))
    ]
    chex.assert_trees_all_equal(state.inner, tx.init(PARAMS).inner)
    assert int(state.count) == 3


def test_nan_ends_with_its_group():
    """MultiSteps: parameters NaN at once, accumulator NaN for ever."""
    tx = optim.adam(lr=0.1)
    bad = [*GRADS[:3], GRADS[3], {**GRADS[4], "b": jnp.array([jnp.nan, 0])}, *GRADS[5:]]
    got, state = run(every(skip_nonfinite(tx), 3), bad)
    expected, inner = run(every(skip_nonfinite(tx), 3), GRADS[:3] + GRADS[6:])
    chex.assert_trees_all_equal(got, expected)
    chex.assert_trees_all_equal(state.inner.inner, inner.inner.inner)
    assert int(state.inner.num_skipped_steps) == 1


def test_the_group_is_clipped_not_its_members():
    tx = every(guard(optim.sgd(lr=1.0), max_norm=1.0), 2)
    _, state = run(tx, [jnp.array([30.0]), jnp.array([-29.0])], jnp.zeros(1))
    assert state.inner.norm == 0.5
    assert state.inner.clip_factor == 1


def test_schedules_count_steps_and_k_may_be_one():
    k = schedules.piecewise_constant([1, 2], [2])  # one at a time, then in pairs
    lrs = schedules.linear(1.0, 0.0, 4)
    tx = every(optim.sgd(lr=lrs), k)
    state, seen = tx.init(jnp.zeros(1)), []
    for _ in range(6):
        updates, state = tx.update(jnp.ones(1), state, jnp.zeros(1))
        seen.append(-float(updates[0]))
    np.testing.assert_allclose(seen, [1, 0.75, 0, 0.5, 0, 0.25])


def test_sums_are_float32_and_missing_gradients_stay_missing():
    seen = []

    def update(updates, state, params=None):
        seen.append(updates)
        return updates, state

    inner = optax.GradientTransformation(lambda params: (), update)
    tx = every(inner, 2)
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
    state = tx.init(params)
    assert state.total["a"].dtype == jnp.float32
    for x in (1.0, 1.0078125):  # their sum needs 9 bits
        grads = {"a": jnp.full(2, x, jnp.bfloat16), "b": None}
        _, state = tx.update(grads, state, params)
    assert seen[-1]["b"] is None
    np.testing.assert_array_equal(seen[-1]["a"], [1.00390625] * 2)


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, "k must be >= 1, got 0"),
        (2.5, ValueError, "k must be an integer, got 2.5"),
        ("2", TypeError, "k must be a number or a schedule, got '2'"),
    ],
)
def test_errors_name_argument_rule_and_value(k, error, message):
    with pytest.raises(error, match=message):
        every(optim.sgd(lr=0.1), k)
