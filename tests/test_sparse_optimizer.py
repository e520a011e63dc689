"""Sparse training in the class form: golden runs, and what always holds."""

import copy
import itertools
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sparse_cases import CASES, STEPS, Case
from sparse_optimizers import RIGL, STATIC, equal, kernel_of, made, mask_of, same_run, tree

import cerebras_jax as cjax
from cerebras_jax import optim, sparse
from cerebras_jax.optim.masking import Masking
from cerebras_jax.transforms.loss_scale import GradScaler

# --- golden runs ----------------------------------------------------------------------------------


@cjax.trace
def traced_step(opt, grads):
    opt.step(grads)


def plain_step(opt, grads):
    opt.step(grads)


GOLDEN = [c for c in CASES if not c.random_growth and not c.only_counts]
# Traced, one case of each algorithm, optimizer and model: a trace carries what a step does.
TRACED = {(c.algorithm, c.optimizer, c.model, len(c.groups or [])): c for c in GOLDEN}
RUNS = [(c, plain_step) for c in GOLDEN] + [(c, traced_step) for c in TRACED.values()]


@pytest.mark.parametrize(
    ("case", "step"),
    RUNS,
    ids=lambda x: f"{x.id}-{x.algorithm}" if isinstance(x, Case) else getattr(x, "__name__", "t"),
)
def test_trajectory(case, step):
    """Masks, parameters and states of the original, step by step."""
    opt = getattr(optim, case.optimizer)(jax.tree.map(jnp.asarray, case.start()), **case.kwargs)
    opt.apply(case.sparsity())
    path = {name: [value] for name, value in opt.params.items()}
    for t in range(STEPS + 1):
        if t:
            step(opt, jax.tree.map(jnp.asarray, case.grads(t)))
        for name in case.sparse:
            mask = np.asarray(opt.state[name]["mask"])
            np.testing.assert_array_equal(mask, case.mask(name)[t], f"{name} after step {t}")
            assert (np.asarray(opt.params[name])[~mask] == 0).all()
        for name in case.shapes:
            if t:
                path[name].append(np.asarray(opt.params[name]))
                case.check_state(t, name, opt.state[name])
    case.check_params({name: np.stack(rows) for name, rows in path.items()})


@pytest.mark.parametrize(
    "case", [c for c in CASES if c not in GOLDEN], ids=lambda c: f"{c.id}-{c.algorithm}"
)
def test_random_masks_are_those_of_the_pure_form(case):
    """What the original draws cannot be followed: here all forms draw the same."""
    make = getattr(optim, case.optimizer)
    opts = [make(jax.tree.map(jnp.asarray, case.start()), **case.kwargs) for _ in range(2)]
    tx = sparse.sparsify(
        getattr(optim, case.optimizer.lower())(**case.kwargs),
        case.sparsity(),
        states=case.state_names,
    )
    state: Any = tx.init(opts[0].params)
    params = opts[0].params
    params, update = sparse.prune(params, state), jax.jit(tx.update)
    for opt in opts:
        opt.apply(case.sparsity())
    for t in range(STEPS + 1):
        if t:
            grads = jax.tree.map(jnp.asarray, case.grads(t))
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            plain_step(opts[0], grads)
            traced_step(opts[1], grads)
        for opt, name in itertools.product(opts, case.sparse):
            np.testing.assert_array_equal(opt.state[name]["mask"], state.masks[name])
            assert state.masks[name].sum() == case.counts[name][t]


# --- laws -----------------------------------------------------------------------------------------


def test_apply_in_the_middle_keeps_what_is_kept():
    opt, dense = optim.AdamW(tree(0), lr=0.1), optim.AdamW(tree(0), lr=0.1)
    for o in (opt, dense):
        o.step(tree(1))
    opt.apply(STATIC)
    mask = mask_of(opt)
    assert mask.sum() == 24
    for mine, theirs in (
        (opt.params["layer"]["kernel"], dense.params["layer"]["kernel"]),
        *((opt.state["layer.kernel"][k], dense.state["layer.kernel"][k])
          for k in ("exp_avg", "exp_avg_sq")),
    ):  # fmt: skip
        np.testing.assert_array_equal(mine, np.where(mask, theirs, 0))
    equal(dict(opt.state["layer.bias"]), dict(dense.state["layer.bias"]))
    assert opt.density() == {"layer.kernel": 0.5}


def test_no_sparsity_is_the_dense_run():
    """Bit for bit, with the guard in between."""
    opt, dense = made(sparse.Static(0.0)), optim.AdamW(tree(0), lr=0.1)
    for o in (opt, dense):
        o.skip_nonfinite = True
        o.max_gradient_norm = 1.0
        for t in (1, 2, 3):
            o.step(tree(t))
    equal(opt.params, dense.params)


@pytest.mark.parametrize("watch", [{}, {"skip_nonfinite": True, "max_gradient_norm": 0.5}])
def test_nan_in_pruned_places_changes_nothing(watch):
    """No step is skipped for it, and the norm does not see it."""
    opts = [made(STATIC), made(STATIC)]
    mask = mask_of(opts[0])
    for opt in opts:
        for name, value in watch.items():
            setattr(opt, name, value)
    for t in (1, 2):
        for opt, hidden in zip(opts, (0.0, jnp.nan), strict=True):
            grads = tree(t)
            kernel = jnp.where(mask, grads["layer"]["kernel"], hidden)
            opt.step({"layer": {**grads["layer"], "kernel": kernel}})
    same_run(*opts)
    if watch:
        assert opts[1].report.num_skipped_steps == 0


def test_a_skipped_step_changes_no_mask():
    opt, other = made(), made()
    for o in (opt, other):
        o.skip_nonfinite = True
    before = mask_of(opt)
    opt.step(jax.tree.map(lambda x: x * jnp.nan, tree(1)))
    assert not opt.took_step
    np.testing.assert_array_equal(mask_of(opt), before)
    for o in (opt, other):
        o.step(tree(2))
    same_run(opt, other)
    assert (mask_of(opt) != before).any()


def test_rigl_grows_by_dense_gradients_behind_the_guard():
    clipped, plain = made(), made()
    clipped.max_gradient_norm = 1e6
    for t in (1, 2):
        clipped.step(tree(t))
        plain.step(tree(t))
    np.testing.assert_array_equal(mask_of(clipped), mask_of(plain))
    assert clipped.report.clip_factor == 1


def test_the_norm_is_that_of_what_is_left():
    opt = made(STATIC)
    opt.measure_gradients = True
    grads, mask = tree(1), mask_of(opt)
    opt.step(grads)
    left = np.append(np.asarray(grads["layer"]["kernel"])[mask], grads["layer"]["bias"])
    np.testing.assert_allclose(opt.report.gradient_norm, np.linalg.norm(left), rtol=1e-6)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("around", [(), (lambda tx: optax.chain(tx, optax.scale(0.5)),)])
def test_none_gradients_leave_masks_alone(watched, around):
    opt = made(around=around)
    opt.measure_gradients = watched
    before, kernel = mask_of(opt), kernel_of(opt)
    opt.step({"layer": {**tree(1)["layer"], "kernel": None}})
    np.testing.assert_array_equal(mask_of(opt), before)
    np.testing.assert_array_equal(kernel_of(opt), kernel)
    assert (opt.params["layer"]["bias"] != tree(0)["layer"]["bias"]).all()


def test_wrappers_leave_pruned_weights_zero():
    opt = made(around=[lambda tx: optax.chain(tx, optax.scale(0.5))])
    for t in (1, 2, 3):
        opt.step(tree(t))
        assert (kernel_of(opt)[~mask_of(opt)] == 0).all()
        assert mask_of(opt).sum() == 24


@pytest.mark.parametrize("wrap", [optax.MultiSteps, optim.every])
def test_masks_are_chosen_by_the_mean_of_what_is_accumulated(wrap):
    opt, whole = made(around=[lambda tx: wrap(tx, 2)], kind=optim.SGD), made(kind=optim.SGD)
    before = mask_of(opt)
    opt.step(tree(1))
    np.testing.assert_array_equal(mask_of(opt), before)
    opt.step(tree(2))
    whole.step(jax.tree.map(lambda a, b: (a + b) / 2, tree(1), tree(2)))
    np.testing.assert_array_equal(mask_of(opt), mask_of(whole))
    np.testing.assert_allclose(kernel_of(opt), kernel_of(whole), rtol=1e-5, atol=1e-6)
    assert (mask_of(opt) != before).any()
    assert opt.state_dict()["sparsity"]["step"] == 1


def test_parameters_that_a_wrapper_leaves_out_stay_dense():
    kernels = {"layer": {"kernel": True, "bias": False}}
    opt = made(around=[lambda tx: optax.masked(tx, kernels)])
    twin = made(around=[lambda tx: optax.masked(tx, kernels)])
    opt.step(tree(1))
    twin.load_state_dict(opt.state_dict())
    np.testing.assert_array_equal(mask_of(twin), mask_of(opt))
    assert "mask" not in opt.state["layer.bias"]


def test_no_bit_of_a_pruned_weight_stays():
    opt = optim.SGD(tree(0, jnp.bfloat16), lr=0.1, rounding="exact")
    opt.step(tree(1, jnp.bfloat16))
    opt.apply(RIGL)
    for t in (2, 3):
        whole = np.asarray(opt.full_precision()["layer"]["kernel"], np.float32)
        assert (whole[~mask_of(opt)] == 0).all()
        opt.step(tree(t, jnp.bfloat16))
    assert (kernel_of(opt)[~mask_of(opt)] == 0).all()


@pytest.mark.parametrize(
    "kind", [optim.optimizer_of(optax.adam), optim.Lamb, optim.Adafactor, optim.Muon]
)
def test_other_optimizers(kind):
    opt = kind(tree(0), 0.1)
    opt.apply(RIGL)
    for t in (1, 2):
        opt.step(tree(t))
    mask = mask_of(opt)
    assert mask.sum() == 24
    assert (kernel_of(opt)[~mask] == 0).all()
    states = {k: x for k, x in opt.state["layer.kernel"].items() if np.shape(x) == mask.shape}
    assert all((np.asarray(x)[~mask] == 0).all() for k, x in states.items() if k != "mask")


def test_a_scaler():
    opt, plain = made(), made()
    scaler = GradScaler(8.0)
    for t in (1, 2):
        opt.step(jax.tree.map(lambda g: g * 8, tree(t)), scaler=scaler)
        plain.step(tree(t))
    np.testing.assert_array_equal(mask_of(opt), mask_of(plain))
    np.testing.assert_allclose(kernel_of(opt), kernel_of(plain), rtol=1e-5, atol=1e-6)


def test_nothing_recompiles(compilations):
    opt = made()
    traced = cjax.trace(plain_step)
    grads = [tree(t) for t in range(5)]
    opt.step(grads[0])
    traced(opt, grads[1])
    traced(opt, grads[1])
    with compilations(0):
        for g in grads[2:]:
            opt.step(g)
            traced(opt, g)


def test_eight_devices_are_one():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    rigl = sparse.RigL(0.5, update=sparse.Every(1))
    one = optim.AdamW({"kernel": tree(0)["layer"]["kernel"]}, lr=0.1)
    many = optim.AdamW({"kernel": jax.device_put(tree(0)["layer"]["kernel"], sharding)}, lr=0.1)
    for opt in (one, many):
        opt.apply(rigl)
        for t in (1, 2):
            opt.step({"kernel": tree(t)["layer"]["kernel"]})
    masks = [opt.state["kernel"]["mask"] for opt in (one, many)]
    np.testing.assert_array_equal(*masks)
    assert masks[1].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(one.params["kernel"], many.params["kernel"], rtol=1e-5, atol=1e-6)


def test_dense_optimizers_have_plain_plans():
    assert Masking() == Masking(None, (), None)
    opt = optim.AdamW(tree(0), lr=0.1)
    assert opt.density() == {}
    assert "sparsity" not in opt.state_dict()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copied):
    opt = made(sparse.Sparsity({re.compile("kernel"): RIGL}, seed=3))
    opt.step(tree(1))
    twin = copied(opt)
    for o in (opt, twin):
        o.step(tree(2))
    same_run(opt, twin)


def test_groups_and_trees_go_by_the_optimizers_names():
    groups = [{"params": {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}}]
    opt = optim.SGD(groups, lr=0.1)
    opt.apply({"*w": STATIC})
    assert (opt.params[0]["w"] == 0).sum() == 8
    opt.add_param_group({"params": {"w": jnp.ones((2, 2))}, "lr": 0.5})
    assert opt.density() == {"w": 0.5, "1.w": 0.5}
    assert (opt.params[1]["w"] == 0).sum() == 2
    grads = [jax.tree.map(jnp.ones_like, p) for p in opt.params]
    opt.step(grads)
    assert (opt.params[1]["w"] == 0).sum() == 2


def test_visitors_see_no_mask():
    opt = made()
    opt.visit_state(jnp.zeros_like)
    assert mask_of(opt).sum() == 24


def test_torch_sees_no_mask():
    pytest.importorskip("torch")
    opt = made()
    assert opt.torch_state_dict()["state"][1].keys() == {"exp_avg", "exp_avg_sq", "step"}
