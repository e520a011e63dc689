"""The watch over steps among wrappers: the oracle is the run without the bad steps."""

import copy
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cerebras_jax as cjax
from cerebras_jax import optim, sparse

RNG = np.random.default_rng(0)
FORMS = pytest.mark.parametrize(
    "step",
    [lambda opt, g: opt.step(g), cjax.trace(lambda opt, g: opt.step(g))],
    ids=["class", "trace"],
)


def tree():
    return {"a": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.ones(3)}


GRADS = [
    {k: jnp.asarray(RNG.integers(-8, 9, p.shape) / 8, jnp.float32) for k, p in tree().items()}
    for _ in range(4)
]
BAD = jax.tree.map(lambda x: x.at[0].set(jnp.nan), GRADS[0])


def norm(grads):
    return jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))


def smoothed(tx):
    return optax.chain(optax.ema(0.5), tx)


def every_second(tx):
    return optax.MultiSteps(tx, 2)


def counting(tx):
    """A transformation of one's own, which counts and sums what it sees."""

    def init(params):
        return jnp.zeros((), jnp.int32), jnp.zeros(()), tx.init(params)

    def update(grads, state, params=None):
        count, total, inner = state
        updates, inner = tx.update(grads, inner, params)
        return updates, (count + 1, total + norm(grads), inner)

    return optax.GradientTransformation(init, update)


def spiky(tx):
    return optim.skip_spikes(tx, window=4)


WRAPPERS = {
    "ema": [smoothed],
    "MultiSteps": [every_second],
    "own": [counting],
    "skip_nonfinite": [optim.skip_nonfinite],
    "several": [counting, spiky, smoothed],
}
AROUND = pytest.mark.parametrize("around", WRAPPERS.values(), ids=WRAPPERS)


def without_guard(opt):
    found = opt.state_dict()
    return found["state"], found.get("around"), opt.params


def equal(a, b):
    chex.assert_trees_all_equal(a, b)


@FORMS
@AROUND
def test_wrappers_never_see_a_step_that_is_not_taken(around, step):
    def run(batches):
        opt = optim.AdamW(tree(), lr=0.1, around=around)
        opt.skip_nonfinite, opt.max_gradient_norm = True, 1.0
        for g in batches:
            step(opt, g)
        return opt

    clean, again = run(GRADS), run([BAD, GRADS[0], BAD, BAD, *GRADS[1:]])
    equal(without_guard(again), without_guard(clean))
    assert int(again.report.num_skipped_steps) == 3


@AROUND
def test_settings_keep_the_states_of_wrappers(around):
    """Of wrappers whose states look like ours too."""
    opt = optim.AdamW(tree(), lr=0.1, around=around)
    for g in GRADS[:3]:
        opt.step(g)
    before = without_guard(opt)
    for name, on, off in [
        ("skip_nonfinite", True, False),
        ("measure_gradients", True, False),
        ("skip_spikes", optim.SkipSpikes(4), None),
        ("skip_spikes", optim.SkipSpikes(8), optim.SkipSpikes(16)),
        ("max_gradient_norm", 1.0, None),
    ]:
        setattr(opt, name, on)
        equal(without_guard(opt), before)
        setattr(opt, name, off)
        equal(without_guard(opt), before)


@FORMS
def test_the_report_is_of_our_own_guard(step):
    opt = optim.SGD(tree(), lr=0.1, around=[optim.skip_nonfinite])
    assert opt.took_step is True
    with pytest.raises(RuntimeError, match="the gradients are not measured"):
        _ = opt.report
    step(opt, BAD)  # skipped by the wrapper
    assert int(opt.state_dict()["around"]["num_skipped_steps"]) == 1
    opt.skip_nonfinite = True
    assert int(opt.report.num_skipped_steps) == 0
    step(opt, BAD)  # skipped by the class
    assert int(opt.report.num_skipped_steps) == 1
    assert int(opt.state_dict()["around"]["num_skipped_steps"]) == 1
    assert not opt.took_step


@AROUND
def test_copies_pickles_and_state_dicts_hold_both(around):
    opt = optim.AdamW(tree(), lr=0.1, around=around)
    opt.skip_nonfinite, opt.skip_spikes = True, optim.SkipSpikes(4)
    for g in (*GRADS[:2], BAD):
        opt.step(g)
    loaded = optim.AdamW(tree(), lr=0.1, around=around)
    loaded.skip_nonfinite, loaded.skip_spikes = True, optim.SkipSpikes(4)
    loaded.load_state_dict(opt.state_dict())
    for name, value in opt.named_parameters():
        loaded.set_parameter(name, value)
    twins = [copy.copy(opt), copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), loaded]
    opt.step(GRADS[2])
    for twin in twins:
        twin.step(GRADS[2])
        equal(twin.state_dict()["guard"], opt.state_dict()["guard"])
        equal(without_guard(twin), without_guard(opt))


def test_a_new_group_keeps_both():
    opt = optim.SGD({"w": jnp.ones(2)}, lr=0.1, around=[every_second, optim.skip_nonfinite])
    opt.skip_nonfinite = True
    opt.step({"w": jnp.full(2, jnp.nan)})
    opt.step({"w": jnp.ones(2)})
    opt.add_param_group({"params": {"v": jnp.ones(2)}})
    assert int(opt.report.num_skipped_steps) == 1
    around = opt.state_dict()["around"]
    assert int(around["mini_step"]) == 1


@FORMS
def test_the_guard_around_wrappers_is_the_pure_guard_around_them(step):
    opt = optim.AdamW(tree(), lr=0.1, around=[smoothed])
    opt.skip_nonfinite = True
    tx = optim.skip_nonfinite(smoothed(optim.adamw(lr=0.1)))
    params, state = tree(), None
    state = tx.init(params)
    update = jax.jit(tx.update)
    for g in (GRADS[0], BAD, GRADS[1]):
        step(opt, g)
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(opt.params, params, rtol=1e-6)
    assert int(state.num_skipped_steps) == int(opt.report.num_skipped_steps) == 1


@FORMS
def test_a_loss_is_judged_before_wrappers_that_would_drop_it(step):
    opt = optim.SGD(tree(), lr=0.1, around=[counting])
    opt.skip_nonfinite = True
    before = without_guard(opt)
    opt.step(GRADS[0], loss=jnp.nan)
    equal(without_guard(opt), before)


def test_what_is_clipped_after_wrappers_has_no_known_factor():
    opt = optim.SGD(tree(), lr=0.1, around=[counting])
    opt.max_gradient_norm = 0.1
    opt.step(GRADS[0])
    assert np.isnan(opt.report.clip_factor)
    scaled = optim.SGD(tree(), lr=0.1, around=[counting])
    scaled.step(GRADS[0], scaler=optim.GradScaler(max_gradient_norm=0.1))
    assert np.isnan(scaled.report.clip_factor)
    equal(scaled.params, opt.params)
    np.testing.assert_allclose(opt.report.gradient_norm, norm(GRADS[0]), rtol=1e-6)


def test_a_scaler_comes_before_the_wrappers():
    opt, plain = (optim.AdamW(tree(), lr=0.1, around=[counting, smoothed]) for _ in range(2))
    scaler = optim.GradScaler(1024.0)
    for g in (GRADS[0], BAD, GRADS[1]):
        opt.step(jax.tree.map(lambda x: x * 1024, g), scaler=scaler)
    for g in GRADS[:2]:
        plain.step(g)
    equal(without_guard(opt), without_guard(plain))
    assert int(scaler.state.num_skipped_steps) == 1


@FORMS
def test_a_nan_that_a_mask_hides_does_not_reach_wrappers(step):
    """Wrappers see all gradients, so all are judged."""
    params = {"w": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
    opt = optim.SGD(params, lr=1.0, around=[counting])
    opt.apply(sparse.Static(0.5, init_method="topk"))
    opt.skip_nonfinite = True
    before = without_guard(opt)
    step(opt, {"w": jnp.array([[jnp.nan, 1.0], [1.0, 1.0]])})
    equal(without_guard(opt), before)
    alone = optim.SGD(params, lr=1.0)
    alone.apply(sparse.Static(0.5, init_method="topk"))
    alone.skip_nonfinite = True
    step(alone, {"w": jnp.array([[jnp.nan, 1.0], [1.0, 1.0]])})
    assert alone.took_step


def sparse_within(tx):
    return sparse.sparsify(tx, sparse.Static(0.5, init_method="topk"))


def test_masks_of_a_wrapper_are_its_own():
    opts = [optim.SGD(tree(), lr=0.1, momentum=0.9, around=[sparse_within]) for _ in range(2)]
    opts[0].step(GRADS[0])
    opts[1].load_state_dict(opts[0].state_dict())
    for name, value in opts[0].named_parameters():
        opts[1].set_parameter(name, value)
    for opt in opts:
        opt.step(GRADS[1])
    equal(without_guard(opts[0]), without_guard(opts[1]))
    with pytest.raises(ValueError, match="sparse already: by a wrapper"):
        opts[0].apply(sparse.Static(0.5, init_method="topk"))


@pytest.mark.parametrize("rounding", ["exact", "stochastic"])
def test_updates_in_float32_do_not_change_the_dtypes_of_wrappers(rounding):
    """The states of wrappers are like the parameters, the updates are not."""

    def run(batches):
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree())
        opt = optim.SGD(params, lr=0.1, rounding=rounding, around=[after])
        opt.skip_nonfinite = True
        for g in batches:
            opt.step(g)
        return without_guard(opt)

    equal(run([BAD, *GRADS[:2]]), run(GRADS[:2]))


def after(tx):
    return optax.chain(tx, optax.ema(0.5))


def test_what_was_measured_is_loaded_with_the_bound_it_was_measured_for():
    opt, loaded = (optim.SGD(tree(), lr=0.1) for _ in range(2))
    opt.max_gradient_norm = 0.5
    opt.step(GRADS[0])
    loaded.load_state_dict(opt.state_dict())
    assert float(loaded.report.gradient_norm) == float(opt.report.gradient_norm) > 0
    other = optim.SGD(tree(), lr=0.1, around=[smoothed])
    with pytest.raises(ValueError, match="lacks 'around'"):
        other.load_state_dict(opt.state_dict())
    assert other.max_gradient_norm is None
    with pytest.raises(RuntimeError, match="not measured"):
        _ = other.report
    other.step(GRADS[0])
