"""Life among optax and flax: every wrapper takes our optimizers as its own."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from optimizers import OPTIMIZERS, one_each

from cerebras_jax import optim, schedules
from cerebras_jax.engine.hyper import whole_arguments

PARAMS = {"a": jnp.linspace(0.5, 1.0, 6).reshape(2, 3)}
GRADS = jax.tree.map(lambda p: jnp.sin(3 * p), PARAMS)

every = pytest.mark.parametrize("entry", OPTIMIZERS, ids=repr)
one = pytest.mark.parametrize("entry", one_each(0), ids=repr)
other = pytest.mark.parametrize("entry", one_each(1), ids=repr)


def run(tx, steps=4, params=PARAMS, grads=GRADS):
    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state, grads)
    return params, state


PLAIN = {}


def plain(entry):
    """The run with nothing around it, once for all wrappers."""
    if repr(entry) not in PLAIN:
        PLAIN[repr(entry)] = run(entry.pure(**entry.kwargs))[0]
    return PLAIN[repr(entry)]


@one
def test_chain(entry):
    got, _ = run(optax.chain(optax.clip_by_global_norm(1e6), entry.pure(**entry.kwargs)))
    chex.assert_trees_all_close(got, plain(entry), rtol=2e-6)


@pytest.mark.parametrize(
    ("entry", "dtype"),
    [(e, jnp.float32) for e in OPTIMIZERS] + [(e, jnp.bfloat16) for e in one_each(1)],
    ids=str,
)
def test_inject_hyperparams(entry, dtype):
    params, grads = jax.tree.map(lambda x: x.astype(dtype), (PARAMS, GRADS))
    whole = whole_arguments(entry.pure.rule)  # static, like flags
    tx = optax.inject_hyperparams(entry.pure, whole)(**entry.kwargs)
    state = tx.init(params)
    assert state.hyperparams["lr"].dtype == dtype
    update = jax.jit(tx.update)
    updates, state = update(grads, state, params)
    # inject_hyperparams rounds the hyper-parameters themselves to the parameters' dtype
    bound = inspect.signature(entry.pure).bind(**entry.kwargs)
    bound.apply_defaults()
    rounded = {
        k: float(jnp.asarray(v, dtype)) if type(v) in (int, float) and k not in whole else v
        for k, v in bound.arguments.items()
    }
    plain_tx = entry.pure(**rounded)
    expected, _ = plain_tx.update(grads, plain_tx.init(params), params)
    f32 = jnp.float32
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.astype(f32), updates),
        jax.tree.map(lambda x: x.astype(f32), expected),
        rtol=2 * float(jnp.finfo(dtype).eps),
        atol=float(jnp.finfo(dtype).eps),
    )
    assert jax.tree.all(jax.tree.map(lambda u: bool(jnp.isfinite(u).all()), updates))
    if entry.name == "rprop":
        return
    state.hyperparams["lr"] = jnp.zeros((), dtype)
    updates, _ = update(grads, state, params)
    # asgd's first steps use the rate of the constructor; the averages of adafactor and of
    # schedule-free AdamW remember steps
    remembers = entry.name in ("asgd", "adamw_schedule_free") or "beta1" in entry.kwargs
    if not remembers:
        assert all(not np.any(u) for u in jax.tree.leaves(updates))


@other
def test_partition_and_masked(entry):
    tx = optax.multi_transform(
        {"ours": entry.pure(**entry.kwargs), "none": optax.set_to_zero()},
        {"a": "ours", "b": "none"},
    )
    params, grads = ({**tree, "b": jnp.array([1.0, -1.0])} for tree in (PARAMS, GRADS))
    got, _ = run(tx, params=params, grads=grads)
    chex.assert_trees_all_close(got["a"], plain(entry)["a"], rtol=2e-6)
    chex.assert_trees_all_equal(got["b"], params["b"])
    masked = optax.masked(entry.pure(**entry.kwargs), {"a": True, "b": False})
    got, _ = run(masked, params=params, grads=grads)
    chex.assert_trees_all_close(got["a"], plain(entry)["a"], rtol=2e-6)


@one
def test_multi_steps(entry):
    got, _ = run(optax.MultiSteps(entry.pure(**entry.kwargs), 2), steps=8)
    chex.assert_trees_all_close(got, plain(entry), rtol=2e-6)


@other
def test_apply_if_finite(entry):
    tx = optax.apply_if_finite(entry.pure(**entry.kwargs), 5)
    state = tx.init(PARAMS)
    bad = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    updates, skipped = jax.jit(tx.update)(bad, state, PARAMS)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    chex.assert_trees_all_equal(skipped.inner_state, state.inner_state)
    chex.assert_trees_all_close(run(tx)[0], plain(entry), rtol=2e-6)


@one
def test_nnx_optimizer(entry):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    opt = nnx.Optimizer(model, entry.pure(**entry.kwargs), wrt=nnx.Param)
    x = jnp.linspace(-1, 1, 12).reshape(4, 3)

    @nnx.jit
    def step(model, opt):
        opt.update(model, nnx.grad(lambda m: (m(x) ** 2).mean())(model))

    tx = entry.pure(**entry.kwargs)
    state = tx.init(params)
    for _ in range(3):
        step(model, opt)
        grads = jax.grad(lambda p: ((x @ p["kernel"] + p["bias"]) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)), params, rtol=1e-4, atol=1e-5
    )


@other
def test_train_state(entry):
    ts = TrainState.create(apply_fn=lambda: None, params=PARAMS, tx=entry.pure(**entry.kwargs))
    for _ in range(4):
        ts = ts.apply_gradients(grads=GRADS)
    chex.assert_trees_all_close(ts.params, plain(entry), rtol=2e-6)


@every
def test_tree_utilities(entry):
    tx = entry.pure(**entry.kwargs)
    state = tx.init(PARAMS)
    shifted = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, state)
    chex.assert_trees_all_equal_structs(shifted, state)
    chex.assert_trees_all_close(shifted.states, jax.tree.map(lambda x: x + 1, state.states))
    assert optax.tree_utils.tree_get(state, "count") == 0


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_where_optax_agrees(name):
    """With eps = 0 the formulas are the same."""
    pairs = {
        "sgd": (
            optim.sgd(0.1, momentum=0.9, nesterov=True),
            optax.sgd(0.1, momentum=0.9, nesterov=True),
        ),
        "adam": (optim.adam(0.1, eps=0.0), optax.adam(0.1, eps=0.0)),
        "adamw": (
            optim.adamw(0.1, eps=0.0, weight_decay=0.1),
            optax.adamw(0.1, eps=0.0, weight_decay=0.1),
        ),
    }
    ours, theirs = pairs[name]
    with jax.enable_x64(True):  # so that only the formulas can differ
        params, grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (PARAMS, GRADS))
        got, expected = (run(tx, 10, params, grads)[0] for tx in (ours, theirs))
        chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "schedule",
    [schedules.cosine_decay(0.1, 0.01, 10), schedules.linear(0.1, 0.0, 5), lambda t: 0.1 / (t + 1)],
)
def test_optax_takes_our_schedules_and_we_theirs(schedule):
    ours, _ = run(optim.sgd(lr=schedule))
    theirs, _ = run(optax.sgd(schedule))
    chex.assert_trees_all_close(ours, theirs, rtol=2e-6)


def test_an_optax_schedule_for_any_number():
    ramp = optax.linear_schedule(0.0, 0.4, 4)
    tx = optim.adamw(lr=0.1, weight_decay=ramp, betas=(0.9, lambda t: 0.999))
    state, params = tx.init(PARAMS), PARAMS
    plain_tx = optim.adamw(lr=0.1)
    expected_state, expected = plain_tx.init(PARAMS), PARAMS
    for k in range(3):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
        updates, expected_state = plain_tx.update(
            GRADS, expected_state, expected, weight_decay=0.1 * k
        )
        expected = optax.apply_updates(expected, updates)
    chex.assert_trees_all_close(params, expected, rtol=2e-6)
