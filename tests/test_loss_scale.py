"""Loss scaling: what the original's scaler did, exactly (see golden/README.md)."""

import functools
import inspect
import json
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cerebras_jax import optim
from cerebras_jax.transforms.finite import guard
from cerebras_jax.transforms.loss_scale import GradScaler, LossScaling, unscale

GOLDEN = json.loads((Path(__file__).parent / "golden" / "grad_scaler.json").read_text())
COUNTERS = ("steps_since_rescale", "overflows_since_rescale")


def scaling_of(kwargs):
    return LossScaling(**{k: v for k, v in kwargs.items() if k != "max_gradient_norm"})


def array(values):
    return jnp.asarray(np.array(values, float), jnp.float32)  # reads "nan" and "inf" as well


# --- golden ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: c["id"])
def test_golden_trajectories(case):
    scaling = scaling_of(case["kwargs"])
    assert scaling.is_dynamic == case["dynamic"]
    state = scaling.init()
    assert float(state.loss_scale) == case["loss_scale_at_start"]

    def step(state, finite):
        state = scaling.update(state, finite)
        return state, state

    finite = np.array(case["finite"], bool)
    _, states = jax.jit(functools.partial(jax.lax.scan, step))(state, finite)
    np.testing.assert_array_equal(states.loss_scale, np.float32(case["loss_scale"]))
    np.testing.assert_array_equal(states.num_skipped_steps, np.cumsum(~finite))
    for name in COUNTERS:
        expected = case[name] if case["dynamic"] else np.zeros(len(finite))
        np.testing.assert_array_equal(getattr(states, name), expected)


@pytest.mark.parametrize("case", GOLDEN["cases"][:5], ids=lambda c: c["id"])
def test_the_scaler_moves_as_its_pure_form(case):
    scaler = GradScaler(**case["kwargs"])
    for finite, scale in zip(case["finite"], case["loss_scale"], strict=True):
        scaler.update(bool(finite))
        assert scaler.get_scale() == np.float32(scale)


@pytest.mark.parametrize("case", GOLDEN["errors"], ids=lambda c: str(c["kwargs"]))
def test_golden_errors(case):
    if case["error"] is None:
        GradScaler(**case["kwargs"])
    else:
        with pytest.raises(ValueError, match=case["argument"]):
            GradScaler(**case["kwargs"])


@pytest.mark.parametrize("case", GOLDEN["norms"], ids=lambda c: f"norm {c['global_norm']}")
def test_golden_norms(case):
    """The measured norm, the verdict, and what reaches the parameters of SGD with lr 1."""
    scaling = scaling_of(case["kwargs"])
    scale = scaling.init().loss_scale
    grads = [array(g) for g in case["grads"]]
    params = jax.tree.map(jnp.zeros_like, grads)
    tx = guard(optim.sgd(lr=1.0), case["kwargs"]["max_gradient_norm"], skip_nonfinite=True)
    scaled = jax.tree.map(lambda g: g * scale, grads)
    updates, state = jax.jit(tx.update)(scaled, tx.init(params), params, loss_scale=scale)
    np.testing.assert_allclose(state.norm, float(case["global_norm"]), rtol=1e-5)
    assert bool(state.took_step) == case["finite"]
    for u, expected in zip(updates, case["applied"], strict=True):
        np.testing.assert_allclose(-u, array(expected), rtol=1e-5)


@pytest.mark.parametrize("case", GOLDEN["steps"], ids=lambda c: c["id"])
def test_golden_steps(case):
    """Whole runs: gradients of the scaled loss in, parameters, states and scale out."""
    scaling = scaling_of(case["scaler"])
    inner = getattr(optim, case["optimizer"].lower())(**case["kwargs"])
    tx = guard(inner, case["scaler"].get("max_gradient_norm"), skip_nonfinite=True)

    @jax.jit
    def step(params, state, scaler, grads):
        grads = jax.tree.map(lambda g: g * scaler.loss_scale, grads)
        updates, state = tx.update(grads, state, params, loss_scale=scaler.loss_scale)
        params = optax.apply_updates(params, updates)
        return params, state, scaling.update(scaler, state.norm < jnp.inf)

    params = {name: array(values) for name, values in case["params0"].items()}
    state, scaler = tx.init(params), scaling.init()
    for i, finite in enumerate(case["finite"]):
        grads = {name: array(values[i]) for name, values in case["grads"].items()}
        params, state, scaler = step(params, state, scaler, grads)
        assert bool(state.took_step) == bool(finite)
        np.testing.assert_allclose(state.norm, float(case["global_norm"][i]), rtol=1e-5)
        for name in ("loss_scale", *COUNTERS):
            assert float(getattr(scaler, name)) == case[name][i]
        for name, values in case["params"].items():
            np.testing.assert_allclose(params[name], values[i], rtol=3e-5, atol=3e-6)
    clock = getattr(state.inner.clock, "_asdict", dict)()
    for name, states in case["states"].items():
        for key, expected in states.items():
            got = clock[key] if key in clock else getattr(state.inner.states, key)[name]
            np.testing.assert_allclose(got, np.squeeze(expected), rtol=3e-5, atol=3e-6)


# --- scale and unscale ---------------------------------------------------------------------------


def test_scaling_keeps_float16_gradients_that_would_underflow():
    scaling = LossScaling(2.0**12)
    state = scaling.init()
    weights = jnp.array([1.0, 2.0], jnp.float16)

    def loss_fn(w):
        return (w.astype(jnp.float32) * 1e-8).sum()

    assert not np.any(jax.grad(loss_fn)(weights))
    grads = jax.grad(lambda w: scaling.scale(state, loss_fn(w)))(weights)
    assert grads.dtype == jnp.float16
    unscaled = scaling.unscale(state, grads)
    assert unscaled.dtype == jnp.float32
    np.testing.assert_allclose(unscaled, 1e-8, rtol=1e-3)


def test_dtypes_and_missing_gradients():
    scaling = LossScaling(4.0)
    state = scaling.init()
    assert scaling.scale(state, jnp.float16(60000)) == 240000
    grads = {"a": jnp.ones(2, jnp.bfloat16), "b": None, "c": jnp.array([4j], jnp.complex64)}
    got = scaling.unscale(state, grads)
    assert (got["a"].dtype, got["b"], got["c"][0]) == (jnp.float32, None, 1j)
    assert unscale(grads, None) is grads
    with jax.enable_x64(True):
        assert scaling.unscale(state, [jnp.ones(2, jnp.float64)])[0].dtype == jnp.float64


def test_static_scale_as_torch():
    torch = pytest.importorskip("torch")
    theirs = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=10**6)
    w = torch.tensor([1.5, -2.0], requires_grad=True)
    theirs.scale((w**2).sum()).backward()
    theirs_scaled = w.grad.clone()
    theirs.unscale_(torch.optim.SGD([w], lr=1.0))
    ours = GradScaler(128.0)
    grads = jax.grad(lambda w: ours.scale((w**2).sum()))(jnp.array([1.5, -2.0]))
    np.testing.assert_array_equal(grads, theirs_scaled)
    np.testing.assert_array_equal(ours.unscale(grads), w.grad)


# --- the class ---------------------------------------------------------------------------------


def test_signature_is_the_originals():
    parameters = inspect.signature(GradScaler).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        "loss_scale": None,
        "init_scale": 2.0**15,
        "steps_per_increase": 2000,
        "min_loss_scale": 2.0**-14,
        "max_loss_scale": 2.0**15,
        "overflow_tolerance": 0.05,
        "max_gradient_norm": None,
    }
    assert list(parameters)[:-1] == list(inspect.signature(LossScaling).parameters)


def test_state_dict_goes_there_and_back():
    scaler = GradScaler("dynamic", overflow_tolerance=0.5, init_scale=64.0)
    for finite in (False, True, True, True, False):
        scaler.update(finite)
    saved = scaler.state_dict()
    assert saved == {
        "loss_scale": 32.0,
        "steps_since_rescale": 4,
        "overflows_since_rescale": 1,
        "num_skipped_steps": 2,
    }
    assert [x.dtype.name for x in saved.values()] == ["float32", "int64", "int64", "int64"]
    other = GradScaler("dynamic", overflow_tolerance=0.5)
    other.load_state_dict(saved)
    assert [x.dtype for x in other.state] == [x.dtype for x in scaler.state]
    for finite in (False, False, True):
        scaler.update(finite)
        other.update(finite)
    assert scaler.state_dict() == other.state_dict()
    assert pickle.loads(pickle.dumps(scaler)).state_dict() == scaler.state_dict()


def test_counts_beyond_int32_saturate():
    scaler = GradScaler("dynamic")
    scaler.load_state_dict({"num_skipped_steps": np.int64(2**40), "steps_since_rescale": 5.0})
    assert scaler.state_dict()["num_skipped_steps"] == 2**31 - 1
    assert scaler.state_dict()["steps_since_rescale"] == 5


def test_state_dicts_of_the_original():
    scaler = GradScaler("dynamic")
    scaler.update(False)
    scaler.load_state_dict({})
    assert scaler.state_dict() == GradScaler("dynamic").state_dict()
    static = GradScaler(2.0)
    static.load_state_dict({"loss_scale": np.float32(512)})
    assert static.get_scale() == 512
    assert static.scale(jnp.float32(1)) == 512
    assert static.unscale(jnp.float32(512)) == 1


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        ({"scale": 1.0, "_growth_tracker": 0}, r"got \['_growth_tracker', 'scale'\]"),
        ({"loss_scale": 0.0}, "loss_scale must be > 0"),
        ({"loss_scale": np.nan}, "loss_scale must be a finite number >= 0, got nan"),
        ({"num_skipped_steps": -1}, "num_skipped_steps must be a finite number >= 0, got -1"),
        ({"loss_scale": np.ones(2)}, "loss_scale must be a finite number"),
        ({"loss_scale": "2"}, "loss_scale must be a finite number"),
        ({"loss_scale": True}, "loss_scale must be a finite number"),
        ({"loss_scale": 1e39}, "loss_scale must be .* inf in float32"),
        ({"loss_scale": 1e-50}, "loss_scale must be > 0, got 1e-50, which is 0 in float32"),
        ({"steps_since_rescale": 2.5}, "steps_since_rescale must be a whole number, got 2.5"),
    ],
)
def test_other_state_dicts_are_refused_as_a_whole(state_dict, message):
    scaler = GradScaler("dynamic")
    scaler.update(False)
    before = scaler.state_dict()
    with pytest.raises(ValueError, match=message):
        scaler.load_state_dict({"steps_since_rescale": 5, **state_dict})
    assert scaler.state_dict() == before


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"loss_scale": "static"}, TypeError, 'loss_scale must be a number, or "dynamic", got'),
        ({"loss_scale": -2.0}, ValueError, "loss_scale must be > 0, got -2"),
        ({"loss_scale": np.inf}, ValueError, "loss_scale must be finite, got inf"),
        ({"init_scale": -1.0}, ValueError, "init_scale must be > 0, got -1"),
        ({"steps_per_increase": 2.5}, ValueError, "must be a positive integer, got 2.5"),
        ({"steps_per_increase": True}, ValueError, "must be a positive integer, got True"),
        ({"max_loss_scale": "2"}, TypeError, "max_loss_scale must be a number, got '2'"),
        ({"max_gradient_norm": 0.0}, ValueError, "max_gradient_norm must be > 0, got 0"),
    ],
)
def test_errors_name_argument_rule_and_value(kwargs, error, message):
    with pytest.raises(error, match=message):
        GradScaler(**{"loss_scale": "dynamic", **kwargs})


def test_one_program_for_all_states(compilations):
    scaling = LossScaling("dynamic", overflow_tolerance=0.0)
    update = jax.jit(scaling.update)
    state = update(scaling.init(), True)
    with compilations(0):
        for finite in (False, True, False):
            state = update(state, finite)
    assert float(state.loss_scale) == 2.0**13
