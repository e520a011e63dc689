"""Norms per parameter: the oracle is NumPy on what a step was given, and on what it changed."""

import copy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import OPTIMIZERS

import cerebras_jax as cjax
from cerebras_jax import optim, sparse

PARAMS = {"a": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.ones(3)}
GRADS = {"a": jnp.linspace(1, 2, 6).reshape(2, 3), "b": jnp.array([3.0, 0.0, -4.0])}
BAD = {**GRADS, "a": GRADS["a"].at[0, 0].set(jnp.nan)}
FORMS = pytest.mark.parametrize("transformed", [lambda f: f, cjax.trace], ids=["class", "trace"])


def norms_of(tree):
    return {k: np.linalg.norm(np.asarray(x, np.float64)) for k, x in tree.items()}


def check(norms, gradients, old, new):
    updates = {k: np.asarray(new[k], np.float64) - np.asarray(old[k], np.float64) for k in old}
    chex.assert_trees_all_close(dict(norms.gradients), norms_of(gradients), rtol=1e-6)
    chex.assert_trees_all_close(dict(norms.updates), norms_of(updates), rtol=1e-5)
    chex.assert_trees_all_close(dict(norms.parameters), norms_of(old), rtol=1e-6)
    for named in norms:
        assert named["a"].dtype == jnp.float32
        assert list(named) == ["a", "b"]


def step(opt, grads):
    opt.step(grads)
    return opt.report


@FORMS
def test_norms_are_those_of_what_was_given_and_applied(transformed):
    opt = optim.AdamW(PARAMS, lr=0.1, weight_decay=0.1)
    opt.measure_norms, opt.max_gradient_norm = True, 1.0
    chex.assert_trees_all_equal(dict(opt.report.norms.updates), {"a": 0.0, "b": 0.0})
    run = transformed(step)
    for _ in range(2):
        old = opt.params
        norms = run(opt, GRADS).norms
        check(norms, GRADS, old, opt.params)  # before clipping
    chex.assert_trees_all_equal(jax.tree.leaves(opt.report.norms), jax.tree.leaves(norms))


@FORMS
def test_a_step_not_taken_shows_its_gradients_and_no_update(transformed):
    opt = optim.SGD(PARAMS, lr=0.1, momentum=0.9)
    opt.measure_norms = opt.skip_nonfinite = True
    run = transformed(step)
    run(opt, GRADS)
    norms = run(opt, BAD).norms
    assert np.isnan(norms.gradients["a"])
    assert float(norms.gradients["b"]) == 5.0
    chex.assert_trees_all_equal(dict(norms.updates), {"a": 0.0, "b": 0.0})


@FORMS
def test_a_missing_gradient_has_the_norm_zero(transformed):
    opt = optim.AdamW(PARAMS, lr=0.1, weight_decay=0.1)
    opt.measure_norms = True
    norms = transformed(step)(opt, {**GRADS, "a": None}).norms
    assert float(norms.gradients["a"]) == float(norms.updates["a"]) == 0.0
    assert float(norms.parameters["a"]) > 0
    assert float(norms.updates["b"]) > 0


@pytest.mark.parametrize("entry", OPTIMIZERS[1::6], ids=repr)
def test_measuring_changes_no_step(entry):
    plain, measured = (entry.cls(PARAMS, **entry.kwargs) for _ in range(2))
    measured.measure_norms = True
    for _ in range(2):
        old = measured.params
        plain.step(GRADS)
        measured.step(GRADS)
    chex.assert_trees_all_equal(measured.params, plain.params)
    check(measured.report.norms, GRADS, old, measured.params)


def test_only_what_is_asked_for():
    opt = optim.SGD(PARAMS, lr=0.1)
    opt.measure_norms = ("gradients",)
    opt.step(GRADS)
    norms = opt.report.norms
    assert float(norms.gradients["b"]) == 5.0
    assert norms.updates is None
    assert norms.parameters is None
    opt.measure_norms = False
    with pytest.raises(RuntimeError, match="not measured"):
        _ = opt.report
    opt.measure_gradients = True
    assert opt.report.norms is None


def test_a_setting_is_one_program_and_numbers_are_none(compilations):
    opt = optim.SGD(PARAMS, lr=0.1)
    run = cjax.trace(lambda opt, grads: opt.step(grads))
    run(opt, GRADS)
    opt.measure_norms = True
    with compilations(1):
        run(opt, GRADS)
    opt.param_groups[0]["lr"] = 0.2
    with compilations(0):
        run(opt, GRADS)
        opt.measure_norms = False
        run(opt, GRADS)


def test_off_it_is_the_same_program():
    """The state has no more leaves than before it was ever on."""
    opt = optim.Adam(PARAMS, lr=0.1)
    before = jax.tree.structure(opt)
    opt.measure_norms = True
    opt.measure_norms = False
    assert jax.tree.structure(opt) == before


def test_scaled_half_precision_gradients_are_unscaled_in_float32():
    params = {"w": jnp.ones(4, jnp.float16)}
    opt = optim.SGD(params, lr=0.5)
    opt.measure_norms = True
    scaler = optim.GradScaler(2.0**12)
    opt.step({"w": jnp.full(4, 2.0**12, jnp.float16)}, scaler=scaler)
    assert float(opt.report.norms.gradients["w"]) == 2.0
    assert float(opt.report.norms.updates["w"]) == 1.0


def test_updates_are_those_that_wrappers_and_masks_leave():
    opt = optim.SGD(PARAMS, lr=1.0, around=[lambda tx: optax.MultiSteps(tx, 2)])
    opt.measure_norms = True
    opt.step(GRADS)
    assert float(opt.report.norms.updates["b"]) == 0.0
    opt.step(GRADS)
    assert float(opt.report.norms.updates["b"]) == 5.0

    opt = optim.SGD({"w": jnp.array([[1.0, -4.0], [3.0, 2.0]])}, lr=1.0)
    opt.measure_norms = True
    opt.apply(sparse.Static(0.5, init_method="topk"))
    opt.step({"w": jnp.array([[100.0, 3.0], [4.0, 100.0]])})
    norms = opt.report.norms
    assert float(norms.gradients["w"]) == float(norms.updates["w"]) == 5.0
    assert float(opt.report.gradient_norm) == 5.0
    opt.state_dict()


def test_a_wrapper_of_the_same_kind_keeps_its_own_state():
    opt = optim.SGD(PARAMS, lr=1.0, around=[optim.measure_norms])
    opt.measure_norms = True
    opt.step(GRADS)
    opt.measure_norms = False
    opt.step(GRADS)
    assert any("norms" in path for path in opt.state_dict()["around"])


def test_norms_are_not_saved_but_copied():
    opt = optim.Adam(PARAMS, lr=0.1)
    opt.measure_norms = True
    opt.step(GRADS)
    assert "norms" not in str(sorted(opt.state_dict()))
    assert "around" not in opt.state_dict()
    twin = copy.copy(opt)
    chex.assert_trees_all_equal(dict(twin.report.norms.gradients), norms_of_float32(GRADS))
    other = optim.Adam(PARAMS, lr=0.1)
    other.load_state_dict(opt.state_dict())
    other.step(GRADS)
    opt.add_param_group({"params": {"c": jnp.ones(2)}})
    assert len(opt.report.norms.updates) == 3


def test_several_trees_and_steps_of_a_wrapper_not_taken():
    opt = optim.SGD([{"params": {"u": jnp.ones(2)}}, {"params": {"v": jnp.ones(2)}}], lr=1.0)
    opt.measure_norms = True
    opt.step([{"u": jnp.array([3.0, 4.0])}, {"v": jnp.zeros(2)}])
    assert {k: float(x) for k, x in opt.report.norms.updates.items()} == {"u": 5.0, "v": 0.0}
    opt = optim.SGD(PARAMS, lr=1.0, around=[lambda tx: optax.chain(tx, optax.scale(2.0))])
    opt.measure_norms = opt.skip_nonfinite = True
    opt.max_gradient_norm = 100.0
    opt.step(GRADS)
    assert float(opt.report.norms.updates["b"]) == 10.0
    opt.step(BAD)
    assert float(opt.report.norms.updates["b"]) == 0.0
    assert float(opt.report.norms.gradients["b"]) == 5.0
    assert not opt.took_step


def norms_of_float32(tree):
    return {k: jnp.linalg.norm(x) for k, x in tree.items()}


def test_scan_over_the_optimizer():
    opt = optim.SGD(PARAMS, lr=0.1, momentum=0.9)
    opt.measure_norms = True

    def body(opt, grads):
        opt.step(grads)
        return opt, opt.report.norms

    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x, x]), GRADS)
    opt, norms = jax.jit(lambda opt: jax.lax.scan(body, opt, many))(opt)
    chex.assert_trees_all_close(norms.gradients["b"], jnp.array([5.0, 10.0, 5.0]))
    chex.assert_trees_all_equal(opt.report.norms.updates["b"], norms.updates["b"][-1])


@pytest.mark.parametrize("transformed", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_pure_form(transformed):
    tx = optim.measure_norms(optim.guard(optim.adamw(lr=0.1), 1.0, skip_nonfinite=True))
    update = transformed(tx.update)
    params, state = PARAMS, tx.init(PARAMS)
    for grads in (GRADS, GRADS):
        updates, state = update(grads, state, params)
        new = optax.apply_updates(params, updates)
        check(state.norms, grads, params, new)
        params = new
    updates, state = update(BAD, state, params)
    assert float(state.norms.updates["a"]) == 0.0
    assert float(state.norms.gradients["b"]) == 5.0
    _, state = update({**GRADS, "a": None}, state, params)
    assert float(state.norms.gradients["a"]) == 0.0
    scaled = jax.tree.map(lambda x: x * 8, GRADS)
    _, state = update(scaled, state, params, loss_scale=8.0)
    assert float(state.norms.gradients["b"]) == 5.0


def test_the_pure_form_under_scan_and_vmap():
    tx = optim.measure_norms(optax.sgd(1.0))

    def body(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), state.norms

    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), GRADS)
    _, norms = jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), many)
    np.testing.assert_allclose(norms.updates["b"], [5.0, 10.0])
    batch = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    _, state = jax.vmap(lambda g, p: tx.update(g, tx.init(p), p))(many, batch)
    np.testing.assert_allclose(state.norms.gradients["b"], [5.0, 10.0])


@pytest.mark.parametrize(
    ("value", "error"), [(1, TypeError), ("updates", TypeError), (("grads",), ValueError)]
)
def test_other_settings_are_refused(value, error):
    opt = optim.SGD(PARAMS, lr=0.1)
    with pytest.raises(error, match="measure_norms must be True, False or some of"):
        opt.measure_norms = value
    with pytest.raises(error, match="measure_norms must be"):
        optim.measure_norms(optax.sgd(0.1), value)
    with pytest.raises(KeyError, match="no parameter is called 'x'"):
        _ = optim.Norms.start(["a"]).updates["x"]


def test_it_needs_parameters():
    tx = optim.measure_norms(optax.sgd(0.1))
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(GRADS, tx.init(PARAMS))
