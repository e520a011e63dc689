"""Schedule-free AdamW: the numbers of its authors' package, and two sets of parameters."""

import copy
import pickle
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cerebras_jax import optim

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "schedule_free.npz"))
CASES = {
    "default": {},
    "warmup": dict(
        lr=0.01, betas=(0.95, 0.99), eps=1e-6, weight_decay=0.1, warmup_steps=20
    ),
    "powers": dict(lr=0.02, warmup_steps=50, r=0.5, weight_lr_power=1.0),
    "lr": dict(lr=0.01, weight_decay=0.01),
}  # fmt: skip
LR_AT_STEP = {"lr": {100: 0.005, 200: 0.015}}
STEPS = 300
PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, 0.2])}
GRADS = {"w": jnp.array([[0.3, 0.1], [-0.2, 0.4]]), "b": jnp.array([1.0, -1.0])}

every = pytest.mark.parametrize("case", CASES)


def golden(case, what):
    return {name: GOLDEN[f"{case}/{what}/{name}"] for name in ("w", "b")}


def params0(dtype):
    return {name: jnp.asarray(GOLDEN[f"params0/{name}"], dtype) for name in ("w", "b")}


def grads(step, dtype=np.float32):
    return {name: GOLDEN[f"grads/{name}"][step].astype(dtype) for name in ("w", "b")}


def trajectory(case, dtype):
    """Every tenth y, every fiftieth x, and the last state."""
    tx = optim.adamw_schedule_free(**CASES[case])
    update = jax.jit(lambda g, s, p, lr: tx.update(g, s, p, lr=lr))
    params, ys, xs = params0(dtype), [], []
    state = tx.init(params)
    lr = CASES[case].get("lr", 0.0025)
    for t in range(STEPS):
        lr = LR_AT_STEP.get(case, {}).get(t, lr)
        updates, state = update(grads(t, dtype), state, params, lr)
        params = optax.apply_updates(params, updates)
        if (t + 1) % 10 == 0:
            ys.append(params)
        if (t + 1) % 50 == 0:
            xs.append(optim.eval_params(state, params))
    stack = lambda rows: jax.tree.map(lambda *x: np.stack(x), *rows)  # noqa: E731
    return stack(ys), stack(xs), state


def allowed(case):
    """As in golden/README.md."""
    y, y64 = golden(case, "y"), golden(case, "y64")
    result = {}
    for name, start in params0(np.float32).items():
        path = np.abs(np.diff(np.concatenate([start[None], y64[name]]), axis=0)).cumsum(0)
        rounding = 3 * np.abs(y[name] - y64[name]) + 2e-6 * np.maximum(1, np.abs(y[name]))
        result[name] = 1e-5 * path + rounding
    return result


@every
def test_the_authors_package_in_float32(case):
    ys, xs, state = trajectory(case, np.float32)
    for name, bound in allowed(case).items():
        assert (np.abs(ys[name] - golden(case, "y")[name]) <= bound).all()
        assert (np.abs(xs[name] - golden(case, "x")[name]) <= 2 * bound[4::5]).all()
    chex.assert_trees_all_close(state.states.z, golden(case, "z"), rtol=1e-5, atol=5e-6)
    chex.assert_trees_all_close(state.states.exp_avg_sq, golden(case, "exp_avg_sq"), rtol=5e-5)
    clock = [float(state.clock.weight_sum), float(state.clock.lr_max)]
    np.testing.assert_allclose(clock, GOLDEN[f"{case}/clock"], rtol=1e-5)


@every
def test_the_authors_package_in_float64(case):
    with jax.enable_x64(True):
        ys, _, _ = trajectory(case, np.float64)
    chex.assert_trees_all_close(ys, golden(case, "y64"), rtol=1e-10, atol=1e-12)


def test_the_average_is_that_of_all_z():
    """With r = 0 and a constant rate, x is the mean of z_1 ... z_t; the definition of the paper."""
    tx = optim.adamw_schedule_free(lr=0.1, betas=(0.7, 0.99))
    params, state = PARAMS, tx.init(PARAMS)
    zs = []
    for k in range(1, 8):
        scaled = jax.tree.map(lambda g, k=k: g * np.cos(k), GRADS)
        updates, state = tx.update(scaled, state, params)
        params = optax.apply_updates(params, updates)
        zs.append(state.states.z)
        mean = jax.tree.map(lambda *z: np.mean(z, 0), *zs)
        chex.assert_trees_all_close(optim.eval_params(state, params), mean, rtol=1e-5, atol=1e-6)
        mixed = jax.tree.map(lambda x, z: 0.7 * x + 0.3 * z, mean, state.states.z)
        chex.assert_trees_all_close(params, mixed, rtol=1e-5, atol=1e-6)


def test_optax_warms_up_one_step_later():
    """Without warm-up and decay optax is the same; its warm-up starts with a rate of 0."""

    def ours_and_optax(warmup_steps):
        rate = optax.warmup_constant_schedule(0.0, 0.05, warmup_steps)
        theirs = optax.contrib.schedule_free(
            optax.adam(rate if warmup_steps else 0.05, b1=0.0),
            rate if warmup_steps else 0.05,
            b1=0.9,
        )
        results = []
        for tx in (optim.adamw_schedule_free(lr=0.05, warmup_steps=warmup_steps), theirs):
            params, state = params0(np.float32), tx.init(params0(np.float32))
            update = jax.jit(tx.update)
            for t in range(10):
                updates, state = update(grads(t), state, params)
                params = optax.apply_updates(params, updates)
            results.append(params["w"])
        moved = np.abs(results[0] - params0(np.float32)["w"]).max()
        return np.abs(results[0] - results[1]).max() / moved

    assert ours_and_optax(0) < 1e-5
    assert 0.05 < ours_and_optax(20) < 0.5


def test_a_rate_of_zero_stays_where_it_is():
    tx = optim.adamw_schedule_free(lr=0.0)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    updates, _ = tx.update(GRADS, state, PARAMS, lr=0.1)
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))


def test_states_are_float32_for_low_precision():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = optim.adamw_schedule_free()
    state = tx.init(params)
    assert {x.dtype for x in jax.tree.leaves(state.states)} == {jnp.dtype(jnp.float32)}
    chex.assert_trees_all_equal_dtypes(optim.eval_params(state, params), params)


def test_eval_params_finds_the_state_in_a_chain():
    inner = optim.adamw_schedule_free(lr=0.1)
    tx = optax.chain(optax.clip_by_global_norm(1.0), inner)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    expected = optim.eval_params(state[1], params)
    chex.assert_trees_all_equal(jax.jit(optim.eval_params)(state, params), expected)
    other = optim.adamw()
    with pytest.raises(ValueError, match=r"one state of adamw_schedule_free, found 0"):
        optim.eval_params(other.init(PARAMS), PARAMS)


# --- the class -----------------------------------------------------------------------------------


class Model(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(x)


def loss_fn(model):
    return ((model(jnp.linspace(-1, 1, 12).reshape(4, 3)) - 1) ** 2).mean()


def trained(params, step, n=3):
    opt = optim.AdamWScheduleFree(params, lr=0.05, warmup_steps=2)
    for _ in range(n):
        opt.step(step)
    return opt


def test_the_class_is_the_pure_form():
    tx = optim.adamw_schedule_free(lr=0.05, warmup_steps=2)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    opt = trained(PARAMS, GRADS)
    chex.assert_trees_all_close(opt.params, params, rtol=1e-6)
    expected = optim.eval_params(state, params)
    chex.assert_trees_all_close(opt.eval_params, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "step"),
    [
        (lambda: PARAMS, GRADS),
        (lambda: [{"params": PARAMS}, {"params": {"c": jnp.ones(2)}}], [GRADS, {"c": jnp.ones(2)}]),
        (Model, loss_fn),
    ],
)
def test_eval_and_train_swap_the_parameters(make, step):
    opt = trained(make(), step)
    training, averages = dict(opt.named_parameters()), jax.tree.leaves(opt.eval_params)
    opt.train()  # it is
    opt.eval()
    opt.eval()
    for (name, value), average in zip(opt.named_parameters(), averages, strict=True):
        np.testing.assert_array_equal(value, average)
        assert np.any(value != training[name])
    chex.assert_trees_all_equal(jax.tree.leaves(opt.eval_params), averages)
    for method, argument in [("step", (step,)), ("state_dict", ()), ("load_state_dict", ({},))]:
        with pytest.raises(RuntimeError, match=rf"{method} was called in eval mode; call train"):
            getattr(opt, method)(*argument)
    opt.train()
    for name, value in opt.named_parameters():
        assert value is training[name]
    opt.step(step)


def test_a_module_holds_the_averages_in_eval_mode():
    model = Model()
    opt = trained(model, loss_fn, n=10)
    averages = opt.eval_params
    copied = nnx.clone(model)
    nnx.update(copied, averages)
    expected = loss_fn(copied)
    opt.eval()
    np.testing.assert_allclose(loss_fn(model), expected)
    opt.train()
    assert loss_fn(model) != expected


def test_evaluating_changes_nothing_of_the_training():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    opt, undisturbed = trained(params, GRADS), trained(params, GRADS)
    for _ in range(3):
        opt.eval()
        copies = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
        for other in (opt, *copies):
            other.train()
            other.step(GRADS)
        undisturbed.step(GRADS)
        for other in (opt, *copies):
            chex.assert_trees_all_equal(other.params, undisturbed.params)


def test_a_state_dict_resumes_bit_for_bit():
    opt = trained(PARAMS, GRADS)
    saved = copy.deepcopy(opt.state_dict())
    keys = {"z", "exp_avg_sq", "weight_sum", "lr_max", "beta1", "step"}
    assert set(saved["state"][0]) == keys
    resumed = optim.AdamWScheduleFree(opt.params, lr=0.05, warmup_steps=2)
    resumed.load_state_dict(saved)
    for each in (opt, resumed):
        each.step(GRADS)
    chex.assert_trees_all_equal(resumed.params, opt.params)
    chex.assert_trees_all_equal(resumed.eval_params, opt.eval_params)


def test_beta1_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"betas\[0\] must be in \(0, 1\), got 0"):
        optim.adamw_schedule_free(betas=(0.0, 0.999))
