"""A step that cannot be poisoned: what is skipped never was.

The oracle of most tests is the same run without the bad batches, bit for bit.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import as_shipped
from optimizers import OPTIMIZERS, one_each

from cerebras_jax import optim, schedules
from cerebras_jax.transforms.finite import (
    GuardState,
    check_skips,
    guard,
    skip_nonfinite,
    skip_spikes,
)
from cerebras_jax.transforms.spikes import SkipSpikes

PARAMS = {"a": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.array([1.0, -0.0]), "c": None}
RNG = np.random.default_rng(0)
GOOD = [
    {"a": jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32), "b": jnp.array([0.5, 0.0]), "c": None}
    for _ in range(4)
]
NAN, INF, HUGE = ({**GOOD[0], "a": GOOD[0]["a"].at[0, 1].set(x)} for x in (jnp.nan, -jnp.inf, 3e19))
WITH_BAD = [NAN, GOOD[0], INF, HUGE, GOOD[1], GOOD[2], NAN, GOOD[3]]

every = pytest.mark.parametrize("entry", OPTIMIZERS, ids=repr)
one = pytest.mark.parametrize("entry", one_each(0), ids=repr)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def assert_same_bits(a, b):
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    assert bits(a) == bits(b)


def stepper(tx):
    def step(params, state, grads, **extra):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def run(step, params, state, batches):
    for grads in batches:
        params, state = step(params, state, grads)
    return params, state


# --- skipping ----------------------------------------------------------------------------------


@every
def test_bad_batches_leave_no_trace(entry):
    """The first step among them; float32 overflow of the squares counts as infinite."""
    tx = skip_nonfinite(entry.pure(**entry.kwargs))
    step = jax.jit(stepper(tx))
    clean, state = run(step, PARAMS, tx.init(PARAMS), GOOD)
    assert int(state.num_skipped_steps) == 0
    params, poisoned = run(step, PARAMS, tx.init(PARAMS), WITH_BAD)
    assert_same_bits(params, clean)
    assert_same_bits(poisoned.inner, state.inner)
    assert int(poisoned.inner.count) == len(GOOD)
    assert (int(poisoned.num_skipped_steps), int(poisoned.skipped_in_a_row)) == (4, 0)


@one
def test_eager_jit_and_scan_agree(entry):
    tx = guard(entry.pure(**entry.kwargs), max_norm=1.0, skip_nonfinite=True)
    step = stepper(tx)
    params, *batches = ({"a": tree["a"]} for tree in (PARAMS, *WITH_BAD[:5]))
    state = tx.init(params)
    eager = run(step, params, state, batches)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    scan = functools.partial(jax.lax.scan, lambda carry, g: (step(*carry, g), None))
    scanned, _ = jax.jit(scan)((params, state), stacked)
    jitted = run(jax.jit(step), params, state, batches)
    chex.assert_trees_all_close(jitted, eager, rtol=2e-6, atol=1e-7)
    chex.assert_trees_all_close(scanned, jitted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("jit", [True, False])
def test_a_skipped_step_keeps_the_sign_of_zero(jit):
    tx = skip_nonfinite(optim.sgd(lr=1.0))
    step = jax.jit(stepper(tx)) if jit else stepper(tx)
    params = {"a": jnp.array([-0.0, 0.0, 1.0, jnp.inf]), "z": jnp.array([-0.0 - 0.0j])}
    grads = {"a": jnp.full((4,), jnp.nan), "z": jnp.array([1j])}
    new, _ = step(params, tx.init(params), grads)
    assert_same_bits(new, params)


@pytest.mark.parametrize("loss", [jnp.nan, -jnp.inf])
def test_a_loss_that_is_not_finite_is_enough(loss):
    tx = skip_nonfinite(optim.adam(lr=0.1))
    updates, state = tx.update(GOOD[0], tx.init(PARAMS), PARAMS, loss=jnp.float32(loss))
    assert not state.took_step
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    _, state = tx.update(GOOD[0], state, PARAMS, loss=1.0)
    assert state.took_step
    assert int(state.inner.count) == 1


def test_state_tells_what_happened():
    tx = guard(optim.sgd(lr=1.0), max_norm=2.0, skip_nonfinite=True)
    state = tx.init(PARAMS)
    seen = []
    for norm in (1.0, 8.0, np.nan, np.inf, 4.0):
        grads = {"a": jnp.zeros((2, 3)).at[1, 1].set(norm), "b": None, "c": None}
        _, state = tx.update(grads, state, PARAMS)
        assert isinstance(state, GuardState)
        seen.append([float(x) for x in state[1:6]])
    np.testing.assert_array_equal(
        np.asarray(seen),
        [  # skipped, in a row, took the step, norm before clipping, factor
            [0, 0, 1, 1, 1],
            [0, 0, 1, 8, 0.25],
            [1, 1, 0, np.nan, np.nan],
            [2, 2, 0, np.inf, 0],
            [2, 0, 1, 4, 0.5],
        ],
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(PARAMS))


def test_missing_gradients():
    tx = guard(optim.adam(lr=0.1), max_norm=1.0, skip_nonfinite=True)
    inner = optim.adam(lr=0.1)
    grads = {"a": None, "b": jnp.array([0.25, 0.5]), "c": None}
    got, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    expected, _ = inner.update(grads, inner.init(PARAMS), PARAMS)
    assert_same_bits(got, expected)
    nothing = {"a": None, "b": None, "c": None}
    _, state = tx.update(nothing, tx.init(PARAMS), PARAMS)
    assert state.took_step
    assert state.norm == 0
    assert state.clip_factor == 1


def test_schedules_inside_wait():
    lrs = schedules.linear(0.0, 1.0, 4)
    tx = skip_nonfinite(optim.sgd(lr=lrs))
    state, seen = tx.init(jnp.zeros(1)), []
    for g in (1.0, np.nan, 1.0, np.inf, np.nan, 1.0, 1.0):
        updates, state = tx.update(jnp.array([g]), state, jnp.zeros(1))
        seen.append(-float(updates[0]))
    np.testing.assert_allclose(seen, [0, 0, 0.25, 0, 0, 0.5, 0.75])


def test_any_pair_can_be_guarded_and_gets_its_extra_arguments():
    def update(updates, state, params=None, *, factor, loss, **extra):
        return jax.tree.map(lambda g: -factor * g, updates), state + loss

    inner = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)
    tx = skip_nonfinite(optax.chain(inner, optax.trace(0.5)))
    state = tx.init(PARAMS)
    _, state = jax.jit(tx.update)(NAN, state, PARAMS, factor=2.0, loss=3.0)
    assert state.inner[0] == 0
    updates, state = jax.jit(tx.update)(GOOD[0], state, PARAMS, factor=2.0, loss=3.0)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda g: -2 * g, GOOD[0]))
    assert state.inner[0] == 3


def test_a_vector_of_runs_skips_one_by_one():
    tx = skip_nonfinite(optim.adam(lr=0.1))
    params = jnp.ones((3, 2))
    grads = jnp.array([[1.0, 2.0], [jnp.nan, 1.0], [3.0, 4.0]])
    state = jax.vmap(tx.init)(params)
    updates, state = jax.jit(jax.vmap(tx.update))(grads, state, params)
    np.testing.assert_array_equal(state.took_step, [True, False, True])
    for i in range(3):
        alone, _ = tx.update(grads[i], tx.init(params[i]), params[i])
        np.testing.assert_allclose(updates[i], alone, rtol=2e-6)


def test_float16_gradients_of_a_scaled_loss():
    """Unscaled in float16 these would be zeros; the inner update sees float32."""
    scale = 2.0**15
    grads = jnp.array([0.01, 0.0], jnp.float16)  # of the scaled loss
    expected = np.asarray(grads, np.float32) / scale
    tx = guard(optim.sgd(lr=1.0), max_norm=1.0, skip_nonfinite=True)
    params = jnp.zeros(2, jnp.float32)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, loss_scale=scale)
    np.testing.assert_array_equal(updates, -expected)
    np.testing.assert_allclose(state.norm, expected[0], rtol=1e-6)


def test_a_new_bound_is_no_new_program_and_the_inner_update_is_traced_once(compilations):
    traces = []
    inner = optim.adam(lr=0.1)

    def update(updates, state, params=None, **extra):
        traces.append(1)
        return inner.update(updates, state, params, **extra)

    pair = optax.GradientTransformationExtraArgs(inner.init, update)

    @jax.jit
    def step(max_norm, grads, state):
        return guard(pair, max_norm=max_norm, skip_nonfinite=True).update(grads, state, PARAMS)

    state = guard(pair, skip_nonfinite=True).init(PARAMS)
    _, state = step(1.0, GOOD[0], state)
    with compilations(0):
        _, state = step(0.5, GOOD[1], state)
    assert len(traces) == 1
    np.testing.assert_allclose(state.clip_factor, 0.5 / state.norm, rtol=1e-6)


def test_eager_steps_compile_nothing_new(compilations):
    tx = guard(optim.adam(lr=0.1), max_norm=1.0, skip_nonfinite=True)
    _, state = tx.update(GOOD[0], tx.init(PARAMS), PARAMS)
    _, state = tx.update(NAN, state, PARAMS)
    with compilations(0):
        _, state = tx.update(GOOD[1], state, PARAMS)
        _, state = tx.update(NAN, state, PARAMS)


def test_check_skips_raises_after_too_many_in_a_row():
    tx = skip_nonfinite(optim.sgd(lr=1.0))
    state = tx.init(PARAMS)
    for grads in (INF, GOOD[0], NAN, NAN):
        _, state = tx.update(grads, state, PARAMS)
    check_skips(state, max_in_a_row=2)
    with pytest.raises(
        FloatingPointError,
        match=r"2 steps in a row were not taken, 3 in all; the last gradient norm was nan",
    ):
        check_skips(state, max_in_a_row=1)


# --- the compiled program ------------------------------------------------------------------------

SIZE = 1 << 16
LEAVES = {f"p{i}": jnp.zeros((SIZE,)) for i in range(4)}


def returning_params(tx):
    def update(updates, state, params=None, **extra):
        updates, state = tx.update(updates, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def compiled(tx):
    def step(state, params, grads):
        params, state = tx.update(grads, state, params)
        return state, params

    state = tx.init(LEAVES)
    return as_shipped(jax.jit(step, donate_argnums=(0, 1)).lower(state, LEAVES, LEAVES))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA's CPU backend makes of it")
@pytest.mark.parametrize(
    "tx", [optim.adamw(lr=0.1), optim.lion(lr=0.1), optim.sgd(lr=0.1, momentum=0.9)]
)
def test_skipping_costs_nothing_beside_clipping(tx):
    """Every byte moved, no array copied, every buffer given away; clipping alone is the oracle."""
    clip = compiled(guard(returning_params(tx), max_norm=1.0))
    both = compiled(
        guard(returning_params(tx), max_norm=1.0, skip_nonfinite=True, returns_params=True)
    )
    few = 4096  # bytes: scalars
    moved = [c.cost_analysis()["bytes accessed"] for c in (clip, both)]
    assert moved[1] <= moved[0] + few
    memory = both.memory_analysis()
    assert memory.temp_size_in_bytes <= few
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes <= few
    assert both.as_text().count(" conditional(") == 1
    assert not re.search(rf"f32\[{SIZE}\]\S* copy", both.as_text())


def test_parameters_returned_from_inside_keep_every_bit():
    """Subnormal numbers too, which XLA's CPU backend takes for zeros in a sum."""
    tx = guard(returning_params(optim.adam(lr=0.1)), skip_nonfinite=True, returns_params=True)
    params = {"a": jnp.asarray(np.array([1e-40, -0.0, 1.0], np.float32)), "b": jnp.ones(2)}
    grads = {"a": jnp.array([jnp.nan, 0.0, 0.0]), "b": None}
    for update in (tx.update, jax.jit(tx.update)):
        new, state = update(grads, tx.init(params), params)
        assert_same_bits(new, params)
        assert not state.took_step
        new, state = update({**grads, "a": jnp.ones(3)}, state, params)
        assert state.took_step
        assert not np.array_equal(new["a"], params["a"])


def test_donated_buffers_are_valid_afterwards():
    tx = skip_nonfinite(optim.adam(lr=0.1))
    step = jax.jit(stepper(tx), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    params, state = run(step, params, tx.init(params), WITH_BAD)
    clean = run(jax.jit(stepper(tx)), PARAMS, tx.init(PARAMS), GOOD)
    assert_same_bits((params, state.inner), (clean[0], clean[1].inner))


# --- spikes --------------------------------------------------------------------------------------


def spikes_by_numpy(values, window, sigma):
    """Which of a series of finite values are spikes."""
    found = []
    for i, x in enumerate(values):
        past = np.asarray(values[max(0, i - window) : i], np.float64)
        if len(past) + 1 >= max(2, window // 2) and len(past) >= 2:
            std = max(past.std(ddof=1), 1e-6 * max(1, abs(past.mean())))
            if x - past.mean() > sigma * std:
                found.append(i)
    return found


def skipped(tx, losses, norms=None):
    """Which steps a run with these losses and gradient norms does not take."""
    norms = np.ones(len(losses)) if norms is None else norms
    params, state = jnp.zeros(2), tx.init(jnp.zeros(2))

    def step(state, x):
        loss, norm = x
        _, state = tx.update(jnp.stack([norm, 0.0]), state, params, loss=loss)
        return state, state.took_step

    xs = jnp.asarray(losses, jnp.float32), jnp.asarray(norms, jnp.float32)
    state, took = jax.jit(functools.partial(jax.lax.scan, step))(state, xs)
    return np.flatnonzero(~np.asarray(took)).tolist(), state


LOSSES = 2 + 0.1 * np.sin(np.arange(60) * 1.7) + 0.02 * np.random.default_rng(1).normal(size=60)


def planted(at):
    values = LOSSES.copy()
    values[at] += 3.0 ** np.arange(1, len(at) + 1)  # each far above those still in the window
    return values


@pytest.mark.parametrize("what", ["loss", "norm"])
def test_planted_spikes_are_found_and_nothing_else(what):
    at = [20, 21, 30, 40]
    tx = skip_spikes(optim.sgd(lr=0.1), window=16, sigma=3.0)
    series = planted(at)
    assert spikes_by_numpy(series, 16, 3.0) == at
    if what == "loss":
        found, state = skipped(tx, series)
    else:
        found, state = skipped(tx, np.full(60, 2.0), series)
    assert found == at
    assert int(state.inner.count) == 56
    assert int(state.num_skipped_steps) == 4


@pytest.mark.parametrize(("window", "sigma"), [(2, 1.0), (5, 1.5), (8, 2.0), (128, 1.0)])
def test_spikes_as_the_formula_says(window, sigma):
    rng = np.random.default_rng(window)
    series = rng.normal(size=100).astype(np.float32)
    series[rng.integers(0, 100, 5)] += 10
    found, _ = skipped(skip_spikes(optim.sgd(lr=0.1), window, sigma), series)
    assert found == spikes_by_numpy(series, window, sigma)


def test_values_that_are_not_finite_cost_their_own_step_only():
    """MaxText and OLMo-core lose a window of steps to one of them."""
    series, clean = list(planted([30])), spikes_by_numpy(planted([30]), 16, 3.0)
    tx = skip_spikes(optim.sgd(lr=0.1), window=16, sigma=3.0)
    _, expected = skipped(tx, series)
    for bad in (np.nan, np.inf):
        with_bad = series[:20] + [bad, bad] + series[20:]
        found, state = skipped(tx, with_bad)
        assert found == [20, 21] + [i + 2 for i in clean]
        assert_same_bits((state.inner, state.spikes), (expected.inner, expected.spikes))
    norms = np.ones(62)
    norms[20:22] = np.nan
    found, state = skipped(tx, series[:20] + [2.0, 2.0] + series[20:], norms)
    assert found == [20, 21] + [i + 2 for i in clean]
    assert_same_bits(state.spikes, expected.spikes)


def test_a_lasting_new_level_becomes_the_rule():
    tx = skip_spikes(optim.sgd(lr=0.1), window=8, sigma=3.0)
    found, _ = skipped(tx, np.concatenate([LOSSES[:20], LOSSES[:20] + 10]))
    assert 1 <= len(found) < 8
    assert found[0] == 20


def test_a_constant_past_has_a_standard_deviation():
    series = np.full(20, 100.0)
    series[10:] = 100.0001  # within 6 times 1e-6 of 100
    assert skipped(skip_spikes(optim.sgd(lr=0.1), window=8), series)[0] == []
    series[10] = 101
    assert skipped(skip_spikes(optim.sgd(lr=0.1), window=8), series)[0] == [10]


def test_min_history():
    series = [1.0, 1.1, 1.0, 9.0, 1.0, 1.1, 99.0]
    for min_history, expected in ((2, [3, 6]), (4, [3, 6]), (5, [6]), (None, [3, 6])):
        tx = skip_spikes(optim.sgd(lr=0.1), 8, 3.0, min_history)
        assert skipped(tx, series)[0] == expected


def test_without_a_loss_the_norm_decides():
    tx = skip_spikes(optim.sgd(lr=0.1), window=4, sigma=3.0)
    state, took = tx.init(jnp.zeros(1)), []
    for norm in (1.0, 1.1, 0.9, 1.0, 50.0, 1.0):
        _, state = tx.update(jnp.array([norm]), state, jnp.zeros(1))
        took.append(bool(state.took_step))
    assert took == [True, True, True, True, False, True]


SGD = optim.sgd(lr=0.1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SkipSpikes(window=1), ValueError, "window must be an integer >= 2, got 1"),
        (lambda: SkipSpikes(window=8.0), ValueError, "window must be an integer >= 2, got 8.0"),
        (lambda: SkipSpikes(sigma=0), ValueError, "sigma must be > 0, got 0"),
        (lambda: SkipSpikes(sigma=lambda t: 1), TypeError, "sigma must be a number, got"),
        (lambda: SkipSpikes(sigma=jnp.float32(3)), TypeError, "sigma must be a number, got"),
        (lambda: SkipSpikes(8, min_history=10), ValueError, r"in \[2, window \+ 1\], got 10"),
        (lambda: guard(SGD, skip_nonfinite=1), TypeError, "must be True or False, got 1"),
        (lambda: guard(SGD, skip_spikes=6.0), TypeError, "must be a SkipSpikes or None, got 6.0"),
        (lambda: guard(SGD, max_norm=-1), ValueError, "max_gradient_norm must be > 0, got -1"),
        (
            lambda: guard(SGD).update(GOOD[0], guard(SGD).init(PARAMS), PARAMS, loss=np.ones(2)),
            ValueError,
            r"loss must be a scalar, got shape \(2,\)",
        ),
    ],
)
def test_errors_name_argument_rule_and_value(make, error, message):
    with pytest.raises(error, match=message):
        make()
