"""What sparse training refuses, and what it means at its limits: ties, zeros, empty arrays."""

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sparse_optimizers import RIGL, STATIC, equal, kernel_of, made, mask_of, same_run, tree

import cerebras_jax as cjax
from cerebras_jax import optim, sparse
from cerebras_jax.sparse.masking import is_on, pack
from cerebras_jax.train import report

TOPK: Any = {"init_method": "topk"}


def init(params: Any, sparsity: Any) -> Any:
    return sparse.sparsify(optim.sgd(lr=0.1), sparsity).init(params)


# --- wrong inputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sparse.Static(1.0), ValueError, r"sparsity must be in \[0, 1\), got 1"),
        (lambda: sparse.Static(-0.1), ValueError, r"sparsity must be in \[0, 1\], got -0.1"),
        (lambda: sparse.SET(np.nan), ValueError, "sparsity must be finite, got nan"),
        (lambda: sparse.GMP([0.1, np.inf]), ValueError, r"sparsity\[1\] must be finite, got inf"),
        (lambda: sparse.GMP([]), ValueError, r"a list of numbers or a schedule, got \[\]"),
        (lambda: sparse.Static("0.5"), TypeError, "sparsity must be a number .* got '0.5'"),  # pyright: ignore
        (lambda: sparse.SET(True), TypeError, "sparsity must be a number .* got True"),
        (lambda: sparse.Every(np.nan), ValueError, "freq must be a whole number, got nan"),  # pyright: ignore
        (lambda: sparse.Every(1, np.inf), ValueError, "start must be a whole number, got inf"),  # pyright: ignore
        (lambda: sparse.At([2.5]), ValueError, r"steps\[0\] must be a whole number, got 2.5"),  # pyright: ignore
        (lambda: sparse.Sparsity(STATIC, seed=1.5), ValueError, r"seed must be .*, got 1.5"),  # pyright: ignore
        (lambda: sparse.Sparsity(STATIC, seed=-1), ValueError, r"in \[0, 2\*\*32\), got -1"),
        (lambda: optim.SGD(tree(0), 0.1).apply(sparse.RigL), TypeError, "must be an algorithm"),  # pyright: ignore
    ],
)  # fmt: skip
def test_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_integers_are_no_parameters():
    params = {"w": jnp.ones((2, 2), jnp.int32)}
    with pytest.raises(TypeError, match="'w' must be a floating point or complex array, found int"):
        init(params, STATIC)
    with pytest.raises(TypeError, match="'w' must be a floating point or complex array, found int"):
        optim.SGD(params, lr=0.1).apply(STATIC)


def test_a_sparse_transformation_is_not_made_sparse_again():
    twice = sparse.sparsify(sparse.sparsify(optim.sgd(lr=0.1), STATIC), RIGL)
    with pytest.raises(ValueError, match="a transformation that is sparse already"):
        twice.init(tree(0))


@pytest.mark.parametrize("form", [jax.jit, cjax.trace])
def test_apply_within_a_trace_changes_nothing(form):
    opt = optim.SGD(tree(0), lr=0.1)
    call = (lambda _: opt.apply(STATIC)) if form is jax.jit else lambda opt: opt.apply(STATIC)
    with pytest.raises(RuntimeError, match="outside of traced functions"):
        form(call)(opt if form is cjax.trace else 1.0)
    opt.step(tree(1))
    assert opt.density() == {}
    opt.apply(STATIC)
    assert opt.density() == {"layer.kernel": 0.5}


def test_a_group_that_cannot_be_cut_is_not_added():
    opt = made(sparse.RigL(0.5, balance_out_groups=2, **TOPK))
    with pytest.raises(ValueError, match=r"'v': balance_out_groups=2 must divide axis -1"):
        opt.add_param_group({"params": {"v": jnp.ones((4, 3))}})
    assert len(opt.param_groups) == 1
    opt.step(tree(1))
    assert opt.density() == {"layer.kernel": 0.5}


# --- names ----------------------------------------------------------------------------------------


def test_the_first_group_that_matches_takes_a_parameter():
    groups = {"layer.k*": sparse.Static(0.25), "*": sparse.Static(0.75)}
    opt = made(groups)
    assert opt.density() == {"layer.kernel": 0.75, "layer.bias": 0.25}


def test_biases_and_scalars_by_name():
    """Counts are rounded down: of a single number nothing stays."""
    params = {"bias": jnp.ones(4), "scale": jnp.ones(())}
    state = init(params, {"*": sparse.Static(0.5, **TOPK)})
    equal(state.masks, {"bias": np.array([True, True, False, False]), "scale": np.array(False)})
    with pytest.raises(ValueError, match="'scale': init_method 'checkerboard' needs an axis"):
        init(params, {"scale": sparse.Static(0.5, init_method="checkerboard")})


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [sparse.RigL(0.5), sparse.SET(0.5, **TOPK)])
def test_equal_magnitudes_keep_the_lower_index(algorithm):
    tx = sparse.sparsify(optim.sgd(lr=0.0), algorithm)
    params = {"w": jnp.ones((2, 4))}
    state: Any = tx.init(params)
    state = state._replace(bits={"w": jnp.ones((2, 4), jnp.uint8)})
    grads = {"w": jnp.ones((2, 4))}
    _, state = jax.jit(tx.update)(grads, state, params)
    # All eight are on: int(0.7 * 8) of them stay, and nothing is missing.
    assert np.ravel(state.masks["w"]).tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_arrays(shape):
    params = {"empty": jnp.ones(shape), "w": jnp.ones((2, 2))}
    opt = optim.AdamW(params, lr=0.1)
    opt.apply({"*": sparse.RigL(0.5, balance_out_groups=2)})
    opt.step(params)
    assert opt.density() == {"empty": 0.0, "w": 0.5}
    alone = optim.AdamW({"empty": jnp.ones(shape)}, lr=0.1)
    alone.apply(sparse.SET(0.5))
    assert report.density(alone) == {}


def test_a_sparsity_of_one_leaves_nothing():
    """By a schedule, or a list, or for SET and RigL."""
    for algorithm in (sparse.SET(1.0), sparse.GMP([0.5, 1.0])):
        opt = made(algorithm)
        opt.step(tree(1))
        assert (kernel_of(opt) == 0).all()
        assert opt.density() == {"layer.kernel": 0.0}


def test_infinite_weights():
    """They are the largest; an update cannot make them zero, what replaces parameters can."""
    kernel = jnp.array([[jnp.inf, 1.0], [-jnp.inf, 2.0]])
    state = init({"w": kernel}, sparse.Static(0.5, **TOPK))
    assert state.masks["w"].tolist() == [[True, False], [True, False]]
    opt = optim.SGD({"w": kernel}, lr=0.1)
    opt.apply(sparse.GMP([0.0, 0.75], **TOPK))
    opt.step({"w": jnp.ones((2, 2))})
    assert opt.params["w"].ravel().tolist() == [np.inf, 0, 0, 0]


def test_a_mask_is_on_or_off_whatever_it_was_before():
    packed = pack(jnp.array([1, 1, 0, 0]), jnp.array([1, 0, 1, 0]))
    assert is_on(packed).tolist() == [True, True, False, False]
    assert is_on(packed, 2).tolist() == [True, False, True, False]
    assert is_on(packed, 3).tolist() == [True, False, False, False]


def test_masks_are_bools_after_an_update():
    """In the state, in state dicts, and in the density."""
    opt = made()
    opt.step(tree(1))
    mask = opt.state["layer.kernel"]["mask"]
    assert mask.dtype == bool
    assert opt.state_dict()["sparsity"]["state"]["layer.kernel"]["mask"].dtype == bool
    assert opt.density() == {"layer.kernel": 0.5}


def test_parameters_that_are_set_are_pruned_by_the_next_step():
    opt = made()
    opt.step(tree(1))
    opt.set_parameter("layer.kernel", jnp.ones((6, 8)))
    opt.step(tree(2))
    assert (kernel_of(opt)[~mask_of(opt)] == 0).all()
    assert mask_of(opt).sum() == 24


# --- in the middle of an interval -----------------------------------------------------------------

LATER = sparse.Sparsity({"*kernel": sparse.SET(0.5, update=sparse.Every(3), **TOPK)}, seed=5)


def through_state_dict(opt: Any, tmp_path: Any) -> Any:
    twin = made(LATER)
    for name, p in opt.named_parameters():
        twin.set_parameter(name, p)
    twin.load_state_dict(opt.state_dict())
    return twin


def through_disk(opt: Any, tmp_path: Any) -> Any:
    twin = made(LATER)
    cjax.save(tmp_path / "c", opt=opt)
    cjax.restore(tmp_path / "c", opt=twin)
    return twin


COPIES = {
    "deepcopy": lambda opt, _: copy.deepcopy(opt),
    "pickle": lambda opt, _: pickle.loads(pickle.dumps(opt)),
    "state_dict": through_state_dict,
    "disk": through_disk,
}


@pytest.mark.parametrize("copied", COPIES)
def test_a_run_goes_on_bit_for_bit(copied, tmp_path):
    """Past an update at step 3, and on over the one at step 6."""
    opt = made(LATER)
    for t in range(1, 5):
        opt.step(tree(t))
    twin, before = COPIES[copied](opt, tmp_path), mask_of(opt)
    same_run(opt, twin)
    for t in range(5, 8):
        for o in (opt, twin):
            o.step(tree(t))
    same_run(opt, twin)
    assert (mask_of(opt) != before).any()


def test_the_pure_state_goes_on_bit_for_bit(tmp_path):
    tx = sparse.sparsify(optim.adamw(lr=0.1), LATER)
    update = jax.jit(tx.update)

    def run(params, state, steps):
        for t in steps:
            updates, state = update(tree(t), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    state = tx.init(tree(0))
    half = run(sparse.prune(tree(0), state), state, range(1, 5))
    cjax.save(tmp_path / "c", run=half)
    restored = cjax.restore(tmp_path / "c", run=(tree(0), tx.init(tree(0))))["run"]
    equal(run(*half, range(5, 8)), run(*restored, range(5, 8)))


# --- with everything else -------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "exact", "stochastic"])
def test_skipped_steps_hold_masks_and_bits(rounding):
    opts = []
    for poison in (False, True):
        opt = optim.AdamW(tree(0, jnp.bfloat16), lr=0.1, rounding=rounding)
        opt.skip_nonfinite = True
        opt.apply(RIGL)
        opt.step(tree(1, jnp.bfloat16))
        if poison:
            opt.step(jax.tree.map(lambda x: x * jnp.nan, tree(2, jnp.bfloat16)))
            assert not opt.took_step
        opt.step(tree(3, jnp.bfloat16))
        opts.append(opt)
    same_run(*opts)
    assert (kernel_of(opts[0])[~mask_of(opts[0])] == 0).all()


@pytest.mark.parametrize("watched", [False, True])
def test_a_scaler_that_overflows_holds_masks(watched):
    opt, twin = made(), made()
    scaler = optim.GradScaler("dynamic", init_scale=8.0)
    for o in (opt, twin):
        o.measure_gradients = watched
        o.step(jax.tree.map(lambda g: g * 8, tree(1)), scaler=optim.GradScaler(8.0))
    opt.step(jax.tree.map(lambda g: g * jnp.inf, tree(2)), scaler=scaler)
    np.testing.assert_array_equal(mask_of(opt), mask_of(twin))
    np.testing.assert_array_equal(kernel_of(opt), kernel_of(twin))
    assert opt.state_dict()["sparsity"]["step"] == 1


def test_an_average_goes_beside():
    """It is that of the pruned weights: where a mask never was on it is zero."""
    opt = made(STATIC)
    average = optim.Average(opt, decay=0.5)
    for t in (1, 2):
        opt.step(tree(t))
        average.update()
    mean = np.asarray(average.params["layer"]["kernel"])
    assert (mean[~mask_of(opt)] == 0).all()
    assert (mean[mask_of(opt)] != 0).all()


def test_frozen_parameters_stay_dense():
    params = {"a": tree(0)["layer"]["kernel"], "b": tree(1)["layer"]["kernel"]}
    opt = optim.AdamW(optim.select(params, "b"), lr=0.1)
    with pytest.raises(ValueError, match=r"pattern 'a' matches none of the parameters \['b'\]"):
        opt.apply({"a": RIGL})
    opt.apply(RIGL)
    before = np.asarray(opt.state["b"]["mask"])
    opt.step({"a": None, "b": tree(3)["layer"]["kernel"]})
    np.testing.assert_array_equal(opt.params["a"], params["a"])
    assert opt.density() == {"b": 0.5}
    assert (opt.state["b"]["mask"] != before).any()
