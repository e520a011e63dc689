"""Steps that nothing poisons, in class and trace: the oracle is the run without the bad steps."""

import copy
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optimizers import OPTIMIZERS, one_each

import cerebras_jax as cjax
from cerebras_jax import optim
from cerebras_jax.optim import lr_scheduler
from cerebras_jax.transforms.finite import check_skips

RNG = np.random.default_rng(0)


def tree(dtype=jnp.float32):
    return {"a": jnp.linspace(-1, 1, 6, dtype=dtype).reshape(2, 3), "b": jnp.ones(3, dtype)}


def grads(n=3):
    """Numbers of few bits, which bfloat16 can hold."""
    return [
        {k: jnp.asarray(RNG.integers(-8, 9, p.shape) / 8, jnp.float32) for k, p in tree().items()}
        for _ in range(n)
    ]


GRADS = grads()
BAD = jax.tree.map(lambda x: x.at[0].set(jnp.nan), GRADS[0])
LARGE = jax.tree.map(lambda x: x * 1e3, GRADS[0])
FORMS = pytest.mark.parametrize("transformed", [lambda f: f, cjax.trace], ids=["class", "trace"])
ENTRIES = pytest.mark.parametrize("entry", OPTIMIZERS, ids=repr)


def step(opt, sched, g):
    opt.step(g)
    sched.step()


@pytest.mark.parametrize("entry", one_each(1), ids=repr)
def test_a_run_with_bad_batches_is_the_run_without_them(entry):
    def run(step, batches):
        opt = entry.cls(tree(), **entry.kwargs)
        opt.skip_nonfinite, opt.max_gradient_norm = True, 10.0
        key = "lr" if "lr" in opt.param_groups[0] else None
        sched = lr_scheduler.LinearLR(opt, 0.1, 0.01, 10) if key else None
        for g in batches:
            step(opt, sched, g)
        return opt.params, opt.state_dict()["state"], sched.last_epoch

    for form in (step, cjax.trace(step)):
        clean, again = run(form, GRADS), run(form, [BAD, GRADS[0], BAD, BAD, *GRADS[1:]])
        chex.assert_trees_all_equal(again, clean)


@ENTRIES
def test_exact_rounding_is_the_float32_run(entry):
    """Operation by operation: compiled, XLA may contract the sums of one of them into FMAs."""

    def run(params, **kwargs):
        tx = entry.pure(**entry.kwargs, **kwargs)
        state = tx.init(params)
        for g in GRADS[:2]:
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    start = tree(jnp.bfloat16)
    with jax.disable_jit():
        params, state = run(start, rounding="exact")
        wide, wide_state = run(jax.tree.map(lambda x: x.astype(jnp.float32), start))
    chex.assert_trees_all_equal(optim.full_precision(params, state), wide)
    assert params["a"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(state._replace(low_bits=None), wide_state)


def test_the_pure_form_rounds_as_the_class():
    tx = optim.adamw(lr=0.1, rounding="exact")
    params = tree(jnp.bfloat16)
    state = tx.init(params)
    opt = optim.AdamW(params, lr=0.1, rounding="exact")
    for g in GRADS:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        opt.step(g)
    chex.assert_trees_all_equal(params, opt.params)
    chex.assert_trees_all_equal(optim.full_precision(params, state), opt.full_precision())


@FORMS
def test_stochastic_rounding_is_right_on_average(transformed):
    """A step of a quarter of bfloat16's unit: a quarter of the parameters moves by one."""
    opt = optim.SGD({"w": jnp.ones(100_000, jnp.bfloat16)}, lr=2.0**-9, rounding="stochastic")
    transformed(lambda opt, g: opt.step(g))(opt, {"w": jnp.full(100_000, -1.0)})
    moved = (np.asarray(opt.params["w"], np.float32) - 1) * 128
    assert set(np.unique(moved)) == {0.0, 1.0}
    assert abs(moved.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 1e5)  # four standard deviations


def test_a_float32_value_that_is_set_keeps_its_bits():
    opt = optim.SGD({"w": jnp.ones(2, jnp.bfloat16)}, lr=0.1, rounding="exact")
    value = jnp.array([1.2345678, -7.654321])
    opt.set_parameter("w", value)
    chex.assert_trees_all_equal(opt.full_precision()["w"], value)


def _exact_and_nearest():
    """Two optimizers with two steps behind them, which differ in their rounding."""
    opts = [optim.AdamW(tree(jnp.bfloat16), lr=0.1, rounding=how) for how in ("exact", "nearest")]
    for opt in opts:
        opt.step(GRADS[0]), opt.step(GRADS[1])
    return opts


def test_exact_rounding_loads_what_another_rounding_saved():
    exact, nearest = _exact_and_nearest()
    with pytest.warns(UserWarning, match="has no low_bits: .* start from their bfloat16 values"):
        exact.load_state_dict(nearest.state_dict())
    for name in ("a", "b"):
        assert not np.asarray(exact.state[name]["low_bits"]).any()
        np.testing.assert_array_equal(exact.state[name]["exp_avg"], nearest.state[name]["exp_avg"])
    chex.assert_trees_all_equal(exact.full_precision()["a"], exact.params["a"].astype(jnp.float32))
    exact.step(GRADS[2])


def test_another_rounding_says_what_it_drops_of_exact_rounding():
    exact, nearest = _exact_and_nearest()
    with pytest.warns(UserWarning, match="low_bits, .* they are dropped for .*'a', 'b'"):
        nearest.load_state_dict(exact.state_dict())
    assert "low_bits" not in nearest.state["a"]
    nearest.step(GRADS[2])


def test_exact_rounding_goes_through_torch_without_its_bits():
    pytest.importorskip("torch")
    exact, _ = _exact_and_nearest()
    exported = exact.torch_state_dict()
    assert "low_bits" not in exported["state"][0]
    with pytest.warns(UserWarning, match="has no low_bits"):
        exact.load_state_dict(exported)


def test_a_swap_of_averages_keeps_all_bits():
    exact, _ = _exact_and_nearest()
    average = optim.Average(exact)
    exact.step(GRADS[2])
    assert np.asarray(exact.state["a"]["low_bits"]).any()
    before = exact.full_precision()
    with average.swapped():
        pass
    chex.assert_trees_all_equal(exact.full_precision(), before)


@FORMS
def test_a_bfloat16_value_that_is_there_already_keeps_the_bits_that_it_lacks(transformed):
    exact, _ = _exact_and_nearest()
    before = exact.full_precision()
    set_to = transformed(lambda opt, value: opt.set_parameter("a", value))
    set_to(exact, exact.params["a"])
    chex.assert_trees_all_equal(exact.full_precision(), before)
    set_to(exact, jnp.zeros((2, 3), jnp.bfloat16))
    np.testing.assert_array_equal(exact.full_precision()["a"], 0)


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(ValueError, match="'w' is float16"):
        optim.SGD({"w": jnp.ones(2, jnp.float16)}, lr=0.1, rounding="exact")
    with pytest.raises(ValueError, match="rounding must be"):
        optim.sgd(lr=0.1, rounding="up")


@FORMS
def test_a_spike_is_skipped_and_counted(transformed):
    opt = optim.SGD(tree(), lr=0.1)
    opt.skip_spikes = optim.SkipSpikes(window=4, min_history=3)
    run = transformed(lambda opt, g, loss: opt.step(g, loss=loss))
    for g in GRADS:
        run(opt, g, 1.0)
    before = opt.params
    run(opt, LARGE, 1.0)
    chex.assert_trees_all_equal(opt.params, before)
    run(opt, GRADS[0], 1e6)  # the loss is judged as well
    chex.assert_trees_all_equal(opt.params, before)
    assert int(opt.report.num_skipped_steps) == int(opt.report.skipped_in_a_row) == 2
    opt.check_skips(2)
    with pytest.raises(FloatingPointError, match="2 steps in a row were not taken, 2 in all"):
        opt.check_skips(1)


def test_class_and_pure_form_say_the_same_of_skipped_steps():
    opt, tx = optim.SGD(tree(), lr=0.1), optim.skip_nonfinite(optim.sgd(lr=0.1))
    opt.check_skips(0)  # nothing is skipped, and nothing watched
    opt.skip_nonfinite = True
    state = tx.init(tree())
    for n in range(2):
        opt.check_skips(n)
        check_skips(state, n)
        opt.step(BAD)
        _, state = tx.update(BAD, state, tree())
    messages = []
    for check in (lambda: opt.check_skips(1), lambda: check_skips(state, 1)):
        with pytest.raises(FloatingPointError) as caught:
            check()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (jnp.ones(3), ValueError, r"loss must be a scalar, got shape \(3,\)"),
        (jnp.int32(3), TypeError, "loss must be a floating point scalar, got int32"),
        (3, TypeError, "loss must be a floating point scalar, got int64"),
        (True, TypeError, "loss must be a floating point scalar, got bool"),
        (jnp.complex64(3), TypeError, "loss must be a floating point scalar, got complex64"),
        ("3", TypeError, "loss must be a floating point scalar, got '3'"),
        ([3.0], TypeError, "loss must be a floating point scalar"),
    ],
)
def test_a_loss_that_cannot_be_judged_is_refused(loss, error, message, watched):
    opt = optim.SGD(tree(), lr=0.1)
    opt.skip_nonfinite = watched
    before = opt.state_dict()
    with pytest.raises(error, match=message):
        opt.step(GRADS[0], loss=loss)
    chex.assert_trees_all_equal(opt.params, tree())
    assert str(opt.state_dict()) == str(before)
    tx = optim.skip_nonfinite(optim.sgd(lr=0.1))
    with pytest.raises(error, match=message):
        tx.update(GRADS[0], tx.init(tree()), tree(), loss=loss)


@FORMS
def test_a_loss_that_is_not_finite_is_a_step_not_taken(transformed):
    opt = optim.SGD({"w": jnp.ones(2)}, lr=0.1)
    opt.skip_nonfinite = True
    run = transformed(lambda opt, x: opt.step(lambda p: p["w"].sum() + x))
    assert np.isnan(run(opt, jnp.nan))
    np.testing.assert_array_equal(opt.params["w"], jnp.ones(2))
    assert not opt.took_step


@FORMS
def test_the_first_step_may_be_skipped_and_gradients_may_be_none(transformed):
    run = transformed(lambda opt, g: opt.step(g))
    opt, other = (optim.Adam(tree(), lr=0.1) for _ in range(2))
    opt.skip_nonfinite = True
    run(opt, BAD)
    for each in (opt, other):
        run(each, {**GRADS[0], "a": None})
        run(each, GRADS[1])
    chex.assert_trees_all_equal(opt.params, other.params)
    run(opt, {"a": None, "b": None})
    assert opt.report.gradient_norm == 0
    assert opt.took_step


@FORMS
def test_a_scaler_scales_unscales_skips_and_moves(transformed):
    """Against the same by hand with the pure functions."""
    scaling = optim.LossScaling("dynamic", overflow_tolerance=0.0)
    scaler = optim.GradScaler("dynamic", overflow_tolerance=0.0, max_gradient_norm=1.0)
    opt = optim.SGD({"w": jnp.ones(3, jnp.float16)}, lr=0.1, momentum=0.9)

    def loss_fn(params, x):
        return (params["w"] * x).sum().astype(jnp.float32)

    run = transformed(lambda opt, scaler, x: opt.step(lambda p: loss_fn(p, x), scaler=scaler))
    tx = optim.guard(optim.sgd(0.1, momentum=0.9), max_norm=1.0, skip_nonfinite=True)
    params, state, scale = {"w": jnp.ones(3, jnp.float16)}, None, scaling.init()
    state = tx.init(params)
    for x in (1.0, 2.0, 3.0, 1.0, 0.5):
        x = jnp.float16(x)
        value = run(opt, scaler, x)
        g = jax.grad(lambda p, x, scale: scaling.scale(scale, loss_fn(p, x)))(params, x, scale)
        assert float(value) == float(loss_fn(params, x))
        updates, state = tx.update(g, state, params, loss_scale=scale.loss_scale)
        params = optax.apply_updates(params, updates)
        scale = scaling.update(scale, finite=state.norm < jnp.inf)
        chex.assert_trees_all_equal(scaler.state, scale)
        np.testing.assert_allclose(opt.params["w"], params["w"], rtol=1e-3)  # one float16 unit
    assert int(scaler.state.num_skipped_steps) > 0


def test_a_scaler_and_gradients_of_the_scaled_loss():
    scaler = optim.GradScaler(1024.0)
    opt, plain = (optim.SGD({"w": jnp.ones(2)}, lr=0.1) for _ in range(2))
    opt.step({"w": jnp.full(2, 1024.0)}, scaler=scaler)
    plain.step({"w": jnp.ones(2)})
    chex.assert_trees_all_equal(opt.params, plain.params)


def test_a_scaler_from_outside_a_trace_is_refused():
    scaler, opt = optim.GradScaler("dynamic"), optim.SGD({"w": jnp.ones(2)}, lr=0.1)
    with pytest.raises(RuntimeError, match="a scaler"):
        cjax.trace(lambda opt: opt.step(lambda p: p["w"].sum(), scaler=scaler))(opt)
    assert scaler.get_scale() == 2.0**15
    np.testing.assert_array_equal(opt.params["w"], jnp.ones(2))


def test_a_scaler_of_the_wrong_kind_and_two_bounds_are_refused():
    opt = optim.SGD({"w": jnp.ones(2)}, lr=0.1)
    with pytest.raises(TypeError, match="scaler must be a GradScaler"):
        opt.step({"w": jnp.ones(2)}, scaler=3)
    opt.max_gradient_norm = 1.0
    scaler = optim.GradScaler()
    scaler.max_gradient_norm = -1.0
    with pytest.raises(ValueError, match="max_gradient_norm must be > 0, got -1"):
        opt.step({"w": jnp.ones(2)}, scaler=scaler)
    with pytest.raises(ValueError, match="on the optimizer and on the scaler"):
        opt.step({"w": jnp.ones(2)}, scaler=optim.GradScaler(max_gradient_norm=1.0))


@FORMS
def test_accumulation_is_one_step(transformed):
    x = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)

    def loss_fn(params, x):
        return ((params["a"] @ x.T) ** 2).mean() + params["b"].sum()

    opt, whole = (optim.AdamW(tree(), lr=0.1) for _ in range(2))
    run = transformed(lambda opt, x: opt.step(cjax.accumulate(loss_fn, x, steps=4)))
    for _ in range(2):
        value = run(opt, x)
        np.testing.assert_allclose(value, whole.step(lambda p: loss_fn(p, x)), rtol=1e-6)
    chex.assert_trees_all_close(opt.params, whole.params, rtol=1e-5, atol=1e-7)


def test_a_scaled_accumulation_has_the_same_gradients():
    x = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)

    def loss_fn(params, x):
        return ((params["a"] @ x.T) ** 2).mean()

    opt, plain = (optim.SGD(tree(), lr=0.1) for _ in range(2))
    opt.step(cjax.accumulate(loss_fn, x, steps=4), scaler=optim.GradScaler(1024.0))
    plain.step(cjax.accumulate(loss_fn, x, steps=4))
    chex.assert_trees_all_equal(opt.params, plain.params)  # a power of two changes no bit


class Normed(nnx.Module):
    """Statistics, random numbers and a frozen parameter."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


def normed_loss(model, x):
    return (model(x) ** 2).mean()


@FORMS
@pytest.mark.parametrize(
    "closure",
    [
        lambda x: lambda model: normed_loss(model, x),
        lambda x: cjax.accumulate(normed_loss, x, 2),
    ],
    ids=["whole", "in parts"],
)
@pytest.mark.parametrize("wrt", [None, "linear.*"], ids=["all", "some"])
def test_a_step_not_taken_writes_no_statistics(transformed, closure, wrt):
    """Nor moves random streams: all of the module is that of the run without the bad batch."""
    x = jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32)
    step = transformed(lambda opt, x: opt.step(closure(x)))

    def run(batches):
        model = Normed()
        opt = optim.SGD(optim.select(model, wrt) if wrt else model, lr=0.1)
        opt.skip_nonfinite = True
        for batch in batches:
            step(opt, batch)
        return nnx.state(model)

    def as_numbers(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    again, clean = run([x, x * jnp.nan, 2 * x]), run([x, 2 * x])
    chex.assert_trees_all_equal(*(jax.tree.map(as_numbers, s) for s in (again, clean)))


def test_without_a_judge_statistics_are_as_the_closure_wrote_them():
    model = Normed()
    optim.SGD(model, lr=0.1).step(lambda model: normed_loss(model, jnp.full((4, 2), jnp.nan)))
    assert np.isnan(model.norm.mean[...]).all()


# --- settings -------------------------------------------------------------------------------------


def test_settings_compile_once_each_and_bounds_never():
    opt = optim.SGD(tree(), lr=0.1)
    count = []

    def body(opt, g):
        count.append(1)
        opt.step(g)

    run = cjax.trace(body)
    for norm in (1.0, 2.0, 3.0):
        opt.max_gradient_norm = norm
        run(opt, GRADS[0])
    assert len(count) == 1
    opt.skip_nonfinite = True
    run(opt, GRADS[0])
    run(opt, BAD)
    assert len(count) == 2


def test_settings_keep_the_state():
    opt, plain = (optim.AdamW(tree(), lr=0.1) for _ in range(2))
    plain.step(GRADS[0]), opt.step(GRADS[0])
    opt.measure_gradients = True
    plain.step(GRADS[1]), opt.step(GRADS[1])
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in GRADS[1].values()))
    np.testing.assert_allclose(opt.report.gradient_norm, norm, rtol=1e-6)
    opt.measure_gradients = False
    with pytest.raises(RuntimeError, match="set measure_gradients=True"):
        _ = opt.report
    chex.assert_trees_all_equal(opt.state_dict()["state"], plain.state_dict()["state"])


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("max_gradient_norm", -1.0, ValueError, "max_gradient_norm must be > 0, got -1"),
        ("max_gradient_norm", "1", TypeError, "max_gradient_norm must be a number or None"),
        ("skip_nonfinite", 1, TypeError, "skip_nonfinite must be True or False"),
        ("skip_spikes", True, TypeError, "skip_spikes must be a SkipSpikes"),
        ("max_grad_norm", 1.0, AttributeError, "did you mean 'max_gradient_norm'"),
        ("skip_non_finite", True, AttributeError, "did you mean 'skip_nonfinite'"),
        ("lr", 0.1, AttributeError, r"set param_groups\[i\]\['lr'\]"),
    ],
)
def test_wrong_settings_are_refused_when_they_are_set(name, value, error, message):
    opt = optim.SGD(tree(), lr=0.1)
    with pytest.raises(error, match=message):
        setattr(opt, name, value)


def test_a_class_with_a_step_of_its_own_refuses_what_it_cannot_do():
    class Own(optim.Optimizer):
        def preinitialize(self):
            pass

        def state_names_to_sparsify(self):
            return []

        def step(self, grads_or_closure):
            pass

    opt = Own(tree())
    opt.anything = 3
    with pytest.raises(AttributeError, match="Own does not act on skip_nonfinite"):
        opt.skip_nonfinite = True


def test_what_was_measured_is_saved_copied_and_loaded_as_far_as_both_have_it():
    opt = optim.AdamW(tree(), lr=0.1)
    opt.skip_nonfinite = True
    opt.step(BAD)
    for twin in (copy.copy(opt), copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert int(twin.report.num_skipped_steps) == 1
    loaded = optim.AdamW(tree(), lr=0.1)
    loaded.load_state_dict(opt.state_dict())
    loaded.skip_spikes = optim.SkipSpikes()
    loaded.load_state_dict(opt.state_dict())
    assert int(loaded.report.num_skipped_steps) == 1
    with pytest.raises(TypeError, match="'guard' must be a dict"):
        loaded.load_state_dict({**opt.state_dict(), "guard": 3})


def test_a_wrapper_around_the_guard_sees_unscaled_gradients():
    seen = []

    def note(updates, state, params=None, **extra):
        jax.debug.callback(lambda x: seen.append(float(x)), updates["w"][0])
        return updates, state

    noting = optax.GradientTransformation(lambda params: optax.EmptyState(), note)
    opt = optim.SGD({"w": jnp.ones(2)}, lr=0.1, around=[lambda tx: optax.chain(noting, tx)])
    opt.step({"w": jnp.full(2, 1024.0)}, scaler=optim.GradScaler(1024.0))
    jax.effects_barrier()
    assert seen == [1.0]
    np.testing.assert_allclose(opt.params["w"], 0.9)
