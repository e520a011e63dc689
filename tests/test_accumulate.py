"""Accumulation: the large batch itself is the oracle."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import as_shipped
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cerebras_jax.transforms.accumulate import (
    Accumulation,
    GradientNoise,
    accumulate,
    accumulated_value_and_grad,
)
from cerebras_jax.transforms.loss_scale import LossScaling

RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(3, 2)), "b": RNG.normal(size=2), "none": None}
BATCH = {"x": RNG.normal(size=(12, 3)), "y": RNG.normal(size=(12, 2)), "shift": 0.5}
# Tokens per row, padding last; some parts of it have none at all.
WEIGHTS = np.array([1.0, 5, 0, 2, 0, 0, 9, 4, 0, 1, 0, 0])


def errors(params, batch):
    return jnp.tanh(batch["x"] @ params["w"] + params["b"]) - batch["y"] - batch["shift"]


def mean_loss(params, batch):
    return (errors(params, batch) ** 2).mean()


def sum_loss(params, batch):
    return (errors(params, batch) ** 2).sum()


def weighted_loss(params, batch):
    """A mean over the tokens; NaN, as users write it, where there is none."""
    weight = batch["weight"].sum()
    rows = (errors(params, batch) ** 2).mean(1)
    return (rows * batch["weight"]).sum() / weight, weight


def typed(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


# --- the large batch --------------------------------------------------------------------------


@pytest.mark.parametrize(("x64", "rtol"), [(True, 1e-12), (False, 2e-6)])
@pytest.mark.parametrize("steps", [1, 4, 12])
@pytest.mark.parametrize(("reduce", "loss_fn"), [("mean", mean_loss), ("sum", sum_loss)])
def test_equals_the_large_batch(reduce, loss_fn, steps, x64, rtol):
    with jax.enable_x64(x64):
        params, batch = typed((PARAMS, BATCH), float)
        expected = jax.value_and_grad(loss_fn)(params, batch)
        got = accumulated_value_and_grad(loss_fn, steps, reduce=reduce)(params, batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
        chex.assert_trees_all_close(got, expected, rtol=rtol, atol=rtol)
        closure = accumulate(loss_fn, batch, steps, reduce=reduce)
        chex.assert_trees_all_close(closure.value_and_grad(params), got, rtol=rtol)
        np.testing.assert_allclose(closure(params), got[0], rtol=rtol)
        chex.assert_trees_all_close(jax.grad(closure)(params), got[1], rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("x64", "rtol"), [(True, 1e-12), (False, 2e-6)])
@pytest.mark.parametrize("steps", [1, 3, 12])
def test_weights_make_a_mean_over_tokens_not_of_means(steps, x64, rtol):
    """Parts without a token are NaN and must not count."""
    with jax.enable_x64(x64):
        params, batch = typed((PARAMS, {**BATCH, "weight": WEIGHTS}), float)
        expected = jax.value_and_grad(lambda p, b: weighted_loss(p, b)[0])(params, batch)
        got = accumulated_value_and_grad(weighted_loss, steps, reduce="weighted")(params, batch)
        chex.assert_trees_all_close(got, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("steps", [1, 3])
def test_no_weight_at_all_gives_zeros(steps):
    params, batch = typed((PARAMS, {**BATCH, "weight": np.zeros(12)}), jnp.float32)
    loss, grads = accumulated_value_and_grad(weighted_loss, steps, reduce="weighted")(params, batch)
    assert loss == 0
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, params))


def test_weights_are_not_differentiated():
    def loss_fn(w, batch):
        return (w * batch).mean(), w  # the weight depends on the parameter

    grads = accumulated_value_and_grad(loss_fn, 2, reduce="weighted")(2.0, jnp.arange(4.0))[1]
    assert grads == 1.5


def test_as_a_loop_of_torch():
    torch = pytest.importorskip("torch")
    params, batch = typed((PARAMS, BATCH), jnp.float32)
    w, b = (torch.tensor(np.array(params[k]), requires_grad=True) for k in "wb")
    x, y = (torch.tensor(np.array(batch[k])) for k in "xy")
    for i in range(4):
        loss = ((torch.tanh(x[i::4] @ w + b) - y[i::4] - 0.5) ** 2).mean()
        (loss / 4).backward()
    _, grads = accumulated_value_and_grad(mean_loss, 4)(params, batch)
    np.testing.assert_allclose(grads["w"], w.grad, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(grads["b"], b.grad, rtol=2e-6, atol=1e-7)


def test_one_step_changes_no_bit():
    params, batch = typed((PARAMS, BATCH), jnp.bfloat16)
    got = accumulated_value_and_grad(mean_loss, 1)(params, batch)
    chex.assert_trees_all_equal(got, jax.value_and_grad(mean_loss)(params, batch))
    chex.assert_trees_all_equal_dtypes(got[1], params)


def test_sums_are_kept_in_float32():
    """Sixty-four bfloat16 gradients: their bfloat16 sum is wrong by 1 %."""
    w = jnp.ones((200,), jnp.bfloat16)
    batch = jnp.asarray(RNG.normal(size=(64, 200)) + 1, jnp.bfloat16)

    def loss_fn(w, x):
        return (w * x).sum()

    truth = np.asarray(batch, np.float64).mean(0)
    run = functools.partial(accumulated_value_and_grad, loss_fn, 64)
    _, grads = run()(w, batch)
    assert grads.dtype == jnp.float32
    np.testing.assert_allclose(grads, truth, rtol=1e-6)
    _, low = run(dtype=jnp.bfloat16)(w, batch)
    assert low.dtype == jnp.bfloat16
    assert np.abs(np.asarray(low, np.float64) - truth).max() > 1e-3


# --- what is cut, and what is not -----------------------------------------------------------------


def test_parts_are_strided_and_aux_is_stacked():
    def loss_fn(w, batch):
        return w * batch["x"].mean(), (batch["x"], batch["scalar"])

    batch = {"x": np.arange(12).reshape(2, 6), "scalar": 7}
    run = accumulated_value_and_grad(loss_fn, 3, axis=1, has_aux=True)
    (loss, (parts, scalars)), grads = run(1.0, batch)
    np.testing.assert_array_equal(parts, [batch["x"][:, i::3] for i in range(3)])
    np.testing.assert_array_equal(scalars, [7, 7, 7])
    assert loss == grads == 5.5
    for steps in (1, 3):
        closure = accumulate(loss_fn, batch, steps, axis=-1, has_aux=True)
        _, (parts, _) = closure(1.0)
        assert closure.has_aux
        assert parts.shape == (steps, 2, 6 // steps)


def test_random_keys_are_split_and_arrays_of_keys_cut():
    def loss_fn(w, batch):
        noise = jax.random.normal(batch["key"], (3,))
        return w * noise.sum(), (noise, jax.random.key_data(batch["keys"]))

    keys = jax.random.split(jax.random.key(1), 4)
    batch = {"key": jax.random.key(0), "keys": keys}
    (_, (noise, parts)), _ = accumulated_value_and_grad(loss_fn, 2, has_aux=True)(1.0, batch)
    expected = [jax.random.normal(k, (3,)) for k in jax.random.split(jax.random.key(0), 2)]
    np.testing.assert_array_equal(noise, expected)
    data = jax.random.key_data(keys)
    np.testing.assert_array_equal(parts, [data[0::2], data[1::2]])


def test_a_sharded_batch_stays_where_it_is():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    params = typed(PARAMS, jnp.float32)
    batch = {k: jnp.asarray(np.tile(BATCH[k], (4, 1)), jnp.float32) for k in "xy"} | {"shift": 0.5}
    expected = jax.value_and_grad(mean_loss)(params, batch)
    rows = NamedSharding(mesh, PartitionSpec("x"))
    sharded = {k: jax.device_put(batch[k], rows) for k in "xy"} | {"shift": 0.5}
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    run = jax.jit(accumulated_value_and_grad(mean_loss, 3))
    chex.assert_trees_all_close(run(params, sharded), expected, rtol=2e-6, atol=1e-7)
    program = as_shipped(run.lower(params, sharded)).as_text()
    assert "all-to-all" not in program
    assert "all-gather" not in program


# --- the program ----------------------------------------------------------------------------------


def test_memory_does_not_depend_on_the_number_of_steps():
    w = jnp.zeros((64, 64))

    def loss_fn(w, x):
        return (jnp.tanh(x @ w) ** 2).mean()

    def temporaries(steps, size):
        run = jax.jit(accumulated_value_and_grad(loss_fn, steps))
        compiled = as_shipped(run.lower(w, jnp.zeros((size, 64))))
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = (temporaries(steps, steps * 32) for steps in (2, 64))
    assert many <= few + w.nbytes // 4
    assert temporaries(1, 64 * 32) > 4 * many  # what it saves


def test_one_program_for_all_batches(compilations):
    params, batch = typed((PARAMS, BATCH), jnp.float32)
    traces = []

    def loss_fn(params, batch):
        traces.append(1)
        return mean_loss(params, batch)

    accumulate(loss_fn, batch, 3).value_and_grad(params)
    assert len(traces) == 1
    with compilations(0):
        accumulate(loss_fn, {**batch, "shift": jnp.float32(0.7)}, 3).value_and_grad(params)
    assert len(traces) == 1


# --- modules --------------------------------------------------------------------------------------


class Model(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.linear = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.linear(self.dropout(self.norm(x)))


def model_loss(model, batch):
    return ((model(batch["x"]) - batch["y"]) ** 2).mean()


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_modules_keep_parameters_and_carry_the_rest(steps, jit):
    """The oracle: one part after the other, by hand, on a module of the same seed."""
    batch = {k: jnp.asarray(BATCH[k], jnp.float32) for k in "xy"}
    model, by_hand = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
    sums, losses = None, []
    for i in range(steps):
        part = jax.tree.map(lambda x, i=i: x[i::steps], batch)
        loss, grads = nnx.value_and_grad(model_loss)(by_hand, part)
        losses.append(loss)
        sums = grads if sums is None else jax.tree.map(jnp.add, sums, grads)

    def run(model, batch):
        return accumulate(model_loss, batch, steps).value_and_grad(model)

    got, grads = (nnx.jit(run) if jit else run)(model, batch)
    np.testing.assert_allclose(got, np.mean(losses), rtol=1e-6)
    expected = jax.tree.map(lambda x: x / steps, sums)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    chex.assert_trees_all_close(grads, expected, rtol=2e-6, atol=1e-7)
    for kind in (nnx.BatchStat, nnx.RngCount, nnx.RngKey, nnx.Param):
        data = [jax.tree.leaves(nnx.state(m, kind)) for m in (model, by_hand)]
        assert data[0]
        for ours, theirs in zip(*data, strict=True):
            if kind is nnx.RngKey:
                ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-7)


def test_a_module_may_not_change_its_structure():
    def loss_fn(model, x):
        model.linear.extra = nnx.Param(jnp.zeros(()))
        return model.linear(x).sum()

    with pytest.raises(ValueError, match="loss_fn may not change the structure of the module"):
        accumulate(loss_fn, jnp.ones((4, 3)), 2).value_and_grad(Model(nnx.Rngs(0)))


# --- loss scale and noise -------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
def test_a_scaled_loss_gives_scaled_gradients_and_its_own_value(steps):
    params, batch = typed((PARAMS, BATCH), jnp.float32)
    closure = accumulate(mean_loss, batch, steps)
    loss, grads = closure.value_and_grad(params)
    scaling = LossScaling(1024.0)
    state = scaling.init()
    got, scaled = closure.value_and_grad(params, loss_scale=state.loss_scale)
    assert got == loss
    chex.assert_trees_all_close(scaling.unscale(state, scaled), grads, rtol=1e-6)


def test_noise_tells_small_gradients_from_large_ones():
    """Against the parts' gradients in NumPy; a loss scale changes nothing."""
    params, batch = typed((PARAMS, BATCH), jnp.float32)
    parts = [
        jax.grad(mean_loss)(params, {**batch, "x": batch["x"][i::4], "y": batch["y"][i::4]})
        for i in range(4)
    ]
    flat = np.stack([np.concatenate([np.ravel(g["w"]), np.ravel(g["b"])]) for g in parts])
    for scale in (None, 2.0**10):
        run = accumulated_value_and_grad(mean_loss, 4, noise=True)
        (loss, noise), _ = run(params, batch, loss_scale=scale)
        np.testing.assert_allclose(loss, mean_loss(params, batch), rtol=1e-6)
        assert isinstance(noise, GradientNoise)
        np.testing.assert_allclose(noise.part, (flat**2).sum(1).mean(), rtol=1e-5)
        np.testing.assert_allclose(noise.whole, (flat.mean(0) ** 2).sum(), rtol=1e-5)


def test_noise_estimates_are_unbiased():
    """Gradients of known mean and covariance: their trace and squared norm come out."""
    true, std, steps, size = jnp.array([1.0, -2.0, 0.5]), 0.7, 4, 8

    def one(key):
        x = true + std * jax.random.normal(key, (size, 3))
        run = accumulated_value_and_grad(lambda w, x: (x @ w).mean(), steps, noise=True)
        return run(jnp.zeros(3), x)[0][1].estimate(size, steps)

    trace, norm = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4000))
    for x, expected in ((trace, 3 * std**2), (norm, 5.25)):
        error = float(x.std()) / np.sqrt(len(x))
        assert abs(float(x.mean()) - expected) < 4 * error


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be >= 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an integer, got 2.0"),
        ({"loss_fn": 3}, TypeError, "loss_fn must be a function, got 3"),
        ({"reduce": "max"}, ValueError, "reduce must be 'mean', 'sum' or 'weighted', got 'max'"),
        ({"dtype": jnp.int32}, ValueError, "dtype must be a floating point dtype"),
        ({"steps": 1, "noise": True}, ValueError, "noise needs steps >= 2 and parts of equal"),
        ({"steps": 5}, ValueError, "must be a multiple of steps=5, 'x' has 12"),
        ({"axis": 1}, ValueError, r"the arrays of the batch must have one size, found {'x': 3"),
        ({"axis": 2}, ValueError, r"axis=2 is no axis of 'x', of shape \(12, 3\)"),
        ({"batch": {"shift": 1.0}}, ValueError, "must have an array to cut, found only scalars"),
        (
            {"batch": {"x": np.ones((4, 3)), "key": np.zeros(2, np.uint32)}},
            ValueError,
            "must have one size, found {'key': 2, 'x': 4}",
        ),
    ],
)
def test_errors_name_argument_rule_and_value(kwargs, error, message):
    with pytest.raises(error, match=message):
        accumulate(**{"loss_fn": mean_loss, "batch": BATCH, "steps": 2, **kwargs})


def test_a_weight_that_is_missing():
    with pytest.raises(TypeError, match=r"loss_fn must return \(loss, weight\), got"):
        accumulate(mean_loss, BATCH, 2, reduce="weighted").value_and_grad(PARAMS)


def test_closures_have_no_hidden_parts():
    closure = accumulate(mean_loss, BATCH, 2)
    assert isinstance(closure, Accumulation)
    assert not closure.has_aux
    assert accumulate(mean_loss, BATCH, 2, noise=True).has_aux
